"""GPTQ: round one input's weights after another, and let those to come make up for each error.

Rounding W to Q changes a layer's output by X (W - Q)^T, so an error counts by H = X^T X, the
inputs' products on calibration text, and not alone by its size. Once input i is rounded with error
e, the best change of all later weights is known in closed form from the inverse of H.

Frantar et al., "GPTQ", arXiv:2210.17323, after Optimal Brain Surgeon (Hassibi and Stork, 1993).
Grids are found beforehand from the weights as they were, so that inputs may be taken in any order.
Unlike the paper, which lets every block read what the blocks before it, already quantized, write,
all products come from the plain model.

Axes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from companion.calibration import Inputs, seen
from companion.checks import require_number, require_whole
from companion.curvature import factor
from companion.quantization.grids import grouped
from companion.quantization.layers import Scheme, regrouped
from companion.quantization.replacing import Coding, Rounded, Rounding


def gptq(
    inputs: Mapping[str, Inputs],
    *,
    ordered: bool = True,
    damping: float = 0.01,
    block: int = 128,
) -> Rounding:
    """A rounding for `quantize` that knows each layer's inputs, as `observe` saw them.

    `ordered` takes the inputs with the largest squares first, while most weights can still make up
    for errors. `damping` is added to the diagonal of H, as a share of its mean. `block` inputs are
    finished before the change is carried to the rest, which changes the speed alone.
    """
    require_number("damping", damping, above=0)
    require_whole("block", block)
    prepared: dict[int, tuple[Tensor, Tensor]] = {}  # by inputs: layers that share them share it

    def prepare(found: Inputs) -> tuple[Tensor, Tensor]:
        if id(found) not in prepared:
            squares = found.products.diagonal()
            order = squares.argsort(descending=True) if ordered else torch.arange(len(squares))
            prepared[id(found)] = order, factor(found.products[order][:, order], damping)
        return prepared[id(found)]

    def rounding(name: str, weight: Tensor, coding: Coding) -> Rounded:
        order, upper = prepare(seen(inputs, name, weight))
        numbers = grouped(weight, coding.group)
        scheme = coding.scheme(numbers)
        permuted = _permuted(scheme, numbers, order)
        codes = compensated(weight[:, order], permuted, upper, block)
        back = torch.empty_like(codes)
        back[:, order] = codes
        return Rounded(back.view(numbers.shape), scheme)

    return rounding


def compensated(weight: Tensor, scheme: Scheme, upper: Tensor, block: int = 128) -> Tensor:
    """Codes (O, I) of a weight, rounded input by input; scheme tensors are (O, I), `upper` (I, I).

    Later columns take over each error: W[:, later] -= e U[i, later] / U[i, i].
    """
    weight = weight.clone()
    parts = []
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        inside = upper[start:stop, start:stop]
        now = weight[:, start:stop]  # a view: the loop below works on the weight itself
        errors = torch.zeros_like(now)
        for i in range(stop - start):
            column = now[:, i : i + 1]
            grid = regrouped(scheme, lambda tensor, at=start + i: tensor[:, at : at + 1])
            codes = grid.codes(column)
            parts.append(codes)
            errors[:, i : i + 1] = (column - grid.numbers(codes)) / inside[i, i]
            now[:, i + 1 :] -= errors[:, i : i + 1] * inside[i, i + 1 :]
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return torch.cat(parts, dim=1)


def _permuted(scheme: Scheme, numbers: Tensor, order: Tensor) -> Scheme:
    """The scheme with a column of its own, (O, I), for each input in the new order."""
    return regrouped(
        scheme, lambda tensor: tensor.expand(numbers.shape).reshape(-1, len(order))[:, order]
    )

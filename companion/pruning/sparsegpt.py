"""SparseGPT: remove one input's weights after another, and let those to come make up for it.

Removing weight w_i changes a layer's output by X w_i, which later weights can partly give back. How
much is lost after the best such change is (w_i / U_ii)^2, with U from the curvature of what the
layer reads: that is the score. Scores see weights that have made up for earlier losses already, so
which ones go is decided as the work goes on, some inputs at a time.

Frantar and Alistarh, arXiv:2301.00774. Unlike the paper, which lets every block read what the
pruned blocks before it write, all inputs come from the plain model.

Axes: O outputs, I inputs. The work is done on the transpose, where an input's weights lie together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from companion.calibration import Inputs, seen
from companion.checks import require_number, require_whole
from companion.curvature import factor
from companion.pruning.criteria import Scores
from companion.pruning.replacing import Choice, Method

Decide = Callable[[int, Tensor], Tensor]  # first input, scores (O, n) of n -> which are kept
CARRIED = 128  # inputs after which the change is carried to the rest; matters for speed alone


def sparsegpt(inputs: Mapping[str, Inputs], *, damping: float = 0.01, columns: int = 128) -> Method:
    """A method for `prune` that knows each layer's inputs, as `observe` saw them.

    Which weights go is decided for `columns` inputs at a time, each time the share asked for:
    for groups of 4, take 4. With `scores` given to `prune`, the weights they rank lowest go, and
    only the making up is SparseGPT's. `damping` is added to the diagonal of the inputs' products,
    as a share of its mean.
    """
    require_number("damping", damping, above=0)
    require_whole("columns", columns)
    factors: dict[int, Tensor] = {}  # by inputs: layers that share them share it

    def method(name: str, weight: Tensor, scores: Scores | None, choice: Choice) -> Tensor:
        found = seen(inputs, name, weight)
        if id(found) not in factors:
            factors[id(found)] = factor(found.products, damping)
        upper = factors[id(found)].to(weight.dtype)
        if scores is None:
            return compensated(weight, upper, lambda _, lost: choice(lost), columns)
        kept = choice(scores(name, weight))
        return compensated(weight, upper, lambda i, lost: kept[:, i : i + lost.shape[1]], columns)

    return method


def compensated(weight: Tensor, upper: Tensor, decide: Decide, columns: int = 128) -> Tensor:
    """The weight (O, I) with zeros where `decide` has it, later inputs making up for each.

    `upper` (I, I) is the Cholesky factor U of the inverse. Removing w[i] changes later weights by
    w[later] -= w[i] U[i, later] / U[i, i].
    """
    weight = weight.T.clone(memory_format=torch.contiguous_format)
    size = columns * max(1, CARRIED // columns)
    for start in range(0, len(weight), size):
        stop = min(start + size, len(weight))
        errors = _remove(weight[start:stop], upper[start:stop, start:stop], start, decide, columns)
        weight[stop:] -= upper[start:stop, stop:].T @ errors
    return weight.T.contiguous()


def _remove(now: Tensor, upper: Tensor, start: int, decide: Decide, columns: int) -> Tensor:
    """Prune the inputs (n, O) in place; their errors (n, O), each in units of U[i, i]."""
    errors, kept = torch.zeros_like(now), torch.ones_like(now, dtype=torch.bool)
    for i in range(len(now)):
        if i % columns == 0:
            diagonal = upper.diagonal()[i : i + columns, None]
            losses = (now[i : i + columns] / diagonal).square()
            kept[i : i + columns] = decide(start + i, losses.T).T
        errors[i] = now[i].masked_fill(kept[i], 0) / upper[i, i]
        now[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
    now.masked_fill_(~kept, 0)
    return errors

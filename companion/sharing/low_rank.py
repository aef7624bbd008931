"""Low-rank factors: a matrix (O, I) as the product of an (O, R) and an (R, I) matrix.

All rows are mixed from the same R rows; R is the *inner width*. The product holds R (O + I) numbers
in place of O I, and computes as many fewer, so it pays where R is below O I / (O + I): half the
width of a square matrix. Of all products of this inner width the truncated singular value
decomposition is nearest in Frobenius norm; its error is the root of the sum of squares of the
singular values left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from companion.checks import require, require_whole
from companion.sharing.ties import require_untied
from companion.surgery import Where, chosen, linears, swapped


class LowRank(nn.Module):
    """A linear layer without bias whose weight is `up.weight @ down.weight`."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        """From factors (O, R) and (R, I)."""
        super().__init__()
        self.down, self.up = linear_of(down), linear_of(up)

    @property
    def inner(self) -> int:
        return self.down.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def truncated(weight: Tensor, inner: int) -> tuple[Tensor, Tensor]:
    """The factors (O, R) and (R, I) whose product is nearest to a weight (O, I).

    Each gets the roots of the singular values, so that both are of the same size. Raises
    ValueError for an inner width above the smaller side, where nothing is left to truncate.
    """
    outputs, inputs = weight.shape
    require_inner(inner, outputs, inputs)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    roots = values[:inner].sqrt()
    up, down = left[:, :inner] * roots, roots[:, None] * right[:inner]
    return up.to(weight.dtype), down.to(weight.dtype)


def saving_width(outputs: int, inputs: int) -> int:
    """The largest inner width at which factors hold fewer numbers than the matrix."""
    return (outputs * inputs - 1) // (outputs + inputs)


def require_inner(inner: int, outputs: int, inputs: int) -> None:
    """Raise ValueError for an inner width that a matrix (O, I) cannot have."""
    require_whole("inner width", inner)
    most, saving = min(outputs, inputs), saving_width(outputs, inputs)
    text = f"inner width {inner} is above {most}, the smaller side of a {outputs} x {inputs} matrix"
    require(inner <= most, f"{text}; numbers are saved up to {saving}")


def factored(model: nn.Module, inner: int, *, where: Where = linears) -> nn.Module:
    """A copy with `LowRank` layers of this inner width in place of the chosen linear ones.

    Raises ValueError for an inner width too large for one of them, layers with a bias, and a layer
    whose weight another layer holds too.
    """

    def make(name: str, layer: nn.Module) -> LowRank:
        require_plain(name, layer)
        try:
            return LowRank(*truncated(layer.weight.detach(), inner))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    require_untied(model, chosen(model, where))
    return swapped(model, where, make)


def require_plain(name: str, layer: nn.Module) -> None:
    """Raise ValueError unless it is a linear layer without bias."""
    plain = isinstance(layer, nn.Linear) and layer.bias is None
    require(plain, f"{name} is a {type(layer).__name__}; a linear layer without bias is needed")


def linear_of(weight: Tensor) -> nn.Linear:
    """A linear layer without bias that holds a copy of this weight (O, I)."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    return layer

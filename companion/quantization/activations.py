"""Activations in eight bits too: both factors of a product are integers, and so is the sum.

With X = s_x (P - z) and W = s_w Q, row by row, X W^T = s_x s_w (P Q^T - z sum(Q)): the large
product runs on small integers. What is chosen is the range of X:

    per token    each vector has a scale of its own, found when it comes: dynamic
    per tensor   one scale for all vectors of a call, found when they come: dynamic
    static       one scale, fixed beforehand from calibration text; larger values are cut off

The difference between dynamic and static lies in the activations; weights are converted once in
either. Jacob et al., arXiv:1712.05877; Dettmers et al., "LLM.int8()", arXiv:2208.07339.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from companion.calibration import Inputs, seen
from companion.checks import require, require_finite
from companion.model import LanguageModel
from companion.quantization.grids import Grid, affine, code_range, fit
from companion.quantization.layers import QuantizedLinear
from companion.surgery import Where, swapped

Range = Callable[[Tensor], Grid]


class PerToken:
    """A grid for each vector of (N, I), from its own extremes."""

    def __init__(self, bits: int = 8) -> None:
        code_range(bits)
        self.bits = bits

    def __call__(self, x: Tensor) -> Grid:
        return fit(x, self.bits, mapping=affine)


class PerTensor(PerToken):
    """One grid for all of (N, I), from the extremes of this call."""

    def __call__(self, x: Tensor) -> Grid:
        return fit(x.reshape(1, -1), self.bits, mapping=affine)


class Static:
    """One grid for all calls, from the extremes seen in calibration."""

    def __init__(self, low: float, high: float, bits: int = 8) -> None:
        code_range(bits)
        good = math.isfinite(high - low) and low <= 0 <= high and low < high
        require(good, f"the range is {low} to {high}; it must hold 0 and more")
        self.grid = affine(torch.tensor([[low]]), torch.tensor([[high]]), bits)

    def __call__(self, x: Tensor) -> Grid:
        require_finite(x)
        if self.grid.scale.device != x.device:
            scale, zero = self.grid.scale.to(x.device), self.grid.zero.to(x.device)
            self.grid = replace(self.grid, scale=scale, zero=zero)
        return self.grid


class IntegerLinear(nn.Module):
    """y = x W^T with integers on both sides, from a `QuantizedLinear` of one scale a row.

    Sums are exact: products of 8-bit codes are added in FP64 here, which holds them all, so that
    any machine gives the same. `companion.quantization.kernels` has the same product at speed.
    """

    def __init__(self, linear: QuantizedLinear, range_of: Range) -> None:
        super().__init__()
        require_rows(linear)
        self.matrix, self.range_of = linear.matrix, range_of

    def forward(self, x: Tensor) -> Tensor:
        rows = x.detach().flatten(0, -2).float()
        grid, weight = self.range_of(rows), self.matrix.scheme
        p, q = grid.codes(rows).double(), self.matrix.unpacked().double()
        sums = p @ q.T - grid.zero.double() * q.sum(1)
        y = sums * grid.scale.double() * weight.scale.view(1, -1).double()
        return y.to(x.dtype).view(*x.shape[:-1], -1)


class FirstKept(nn.Module):
    """Integers for all positions but the first of each text, which keeps its floating point."""

    def __init__(self, linear: QuantizedLinear, range_of: Range) -> None:
        super().__init__()
        self.plain, self.integer = linear, IntegerLinear(linear, range_of)

    def forward(self, x: Tensor) -> Tensor:
        """Of (B, T, I): the first of the T positions as it is, all others in integers."""
        first = self.plain(x[:, :1])
        return torch.cat([first, self.integer(x[:, 1:])], dim=1) if x.shape[1] > 1 else first


def integer(
    model: LanguageModel,
    range_of: Range | Mapping[str, Range] | None = None,
    *,
    where: Where | None = None,
    layer: Callable[[QuantizedLinear, Range], nn.Module] = IntegerLinear,
) -> LanguageModel:
    """A new model whose quantized layers inside the blocks read integers: W8A8 if both are 8 bits.

    `range_of` finds the grid of what a layer reads (`PerToken()` if None), or does so by the
    layer's name. `layer` is `IntegerLinear`, or `FirstKept` to spare each text's first position: a
    text then has to be read in one call. Raises ValueError for a model whose weights are not on
    symmetric grids, one a row.
    """
    ranges = PerToken() if range_of is None else range_of

    def make(name: str, linear: nn.Module) -> nn.Module:
        own = ranges
        if isinstance(ranges, Mapping):
            require(name in ranges, f"no range is given for {name}; calibrate on the same model")
            own = ranges[name]
        try:
            return layer(linear, own)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return swapped(model, where or _inside, make)


def static_ranges(
    model: LanguageModel, inputs: Mapping[str, Inputs], bits: int = 8
) -> dict[str, Static]:
    """The `Static` range of each quantized layer, from what `observe` saw on the plain model."""
    found = {}
    for name, module in model.named_modules():
        if _inside(name, module):
            one = seen(inputs, name, module.matrix)
            found[name] = Static(one.low, one.high, bits)
    return found


def _inside(name: str, module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear) and name.startswith("blocks.")


def require_rows(linear: nn.Module) -> None:
    """Raise ValueError unless the layer's codes are on symmetric grids, one a row."""
    require(isinstance(linear, QuantizedLinear), f"{type(linear).__name__} is no QuantizedLinear")
    good, wanted = linear.matrix.symmetric_rows, 'quantize(..., group="row", mapping=symmetric)'
    require(good, f"it has no symmetric grid a row, which integer products need; use {wanted}")

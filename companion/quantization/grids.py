"""From numbers to small integers and back: the numbers between two limits on an even grid.

A *code* is a whole number of a few bits. Rounding to the nearest point of the grid is wrong by at
most half a scale; what lies beyond the limits is moved to the nearest end, and is wrong by more.

    symmetric   scale x code: 0 is a point, and the grid reaches as far down as up
    affine      scale x (code - zero), zero itself a code: 0 is a point, and the limits may differ
    minimum     scale x (code - lowest code) + offset, the lowest number: 0 is hardly ever a point

Axes: a weight (O outputs, I inputs) is looked at as (O, G, N): G groups of N inputs, and each group
has a grid of its own. One group a row is "per channel"; (1, 1, O x I) is "per tensor".
Jacob et al., arXiv:1712.05877 (symmetric, affine); llama.cpp's Q4_1 (minimum).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from companion.checks import require, require_finite, require_number, require_whole

FEWEST, MOST = 2, 8  # bits of a code


def code_range(bits: int) -> tuple[int, int]:
    """The lowest and highest code: -2^(bits - 1) and 2^(bits - 1) - 1. ValueError outside 2..8."""
    require_whole("bits", bits)
    require(FEWEST <= bits <= MOST, f"bits is {bits}; it must be {FEWEST} to {MOST}")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


@dataclass(frozen=True, eq=False)
class Grid:
    """Evenly spaced numbers, a grid for each group: all tensors (..., 1), to fit (..., N)."""

    bits: int
    scale: Tensor  # distance from one number to the next
    zero: Tensor | None = None  # the code that stands for 0, if the grid is affine
    offset: Tensor | None = None  # the number of the lowest code, if the grid begins there

    @property
    def origin(self) -> Tensor | int:
        """The code that stands for the offset, or for 0 where there is none."""
        if self.offset is not None:
            return code_range(self.bits)[0]
        return 0 if self.zero is None else self.zero

    def codes(self, numbers: Tensor) -> Tensor:
        """The nearest codes, int8, of numbers (..., N). A symmetric grid leaves the lowest out."""
        steps = numbers if self.offset is None else numbers - self.offset
        lowest, highest = code_range(self.bits)
        lowest = -highest if self.zero is None and self.offset is None else lowest
        return ((steps / self.scale).round() + self.origin).clamp(lowest, highest).to(torch.int8)

    def numbers(self, codes: Tensor) -> Tensor:
        """What codes (..., N) stand for, in the type of the scale."""
        steps = (codes.to(self.scale.dtype) - self.origin) * self.scale
        return steps if self.offset is None else steps + self.offset

    def rounded(self, numbers: Tensor) -> Tensor:
        """Each of the numbers (..., N) moved to the grid."""
        return self.numbers(self.codes(numbers))

    def stored_as(self, dtype: torch.dtype) -> Grid:
        """The grid whose scale and offset survive being stored as `dtype`; its types unchanged.

        Raises ValueError where they are too large for it. A scale below its normal numbers is
        rounded up, so that the grid still reaches the limits.
        """
        info = torch.finfo(dtype)
        step = info.smallest_normal * info.eps  # between the numbers below the normal ones
        up = (self.scale / step).ceil() * step
        near = self.scale.to(dtype).to(self.scale.dtype)
        scale = torch.where(self.scale < info.smallest_normal, up, near)
        offset = None if self.offset is None else self.offset.to(dtype).to(self.offset.dtype)
        good = scale.isfinite().all() and (offset is None or offset.isfinite().all())
        require(bool(good), f"a scale or offset is larger than {dtype} can hold, {info.max:,}")
        return replace(self, scale=scale, offset=offset)


def symmetric(low: Tensor, high: Tensor, bits: int) -> Grid:
    """The grid from -m to m around 0, m the larger limit: 2^bits - 1 points."""
    _, highest = code_range(bits)
    return Grid(bits, _positive(torch.maximum(low.abs(), high.abs()) / highest))


def affine(low: Tensor, high: Tensor, bits: int) -> Grid:
    """The grid from `low` to `high`, moved apart to enclose 0, and shifted to hit 0 exactly."""
    lowest, _ = code_range(bits)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _positive((high - low) / (2**bits - 1))
    return Grid(bits, scale, zero=(-low / scale).round() + lowest)


def minimum(low: Tensor, high: Tensor, bits: int) -> Grid:
    """The grid whose lowest code stands for `low` and whose highest for `high`."""
    code_range(bits)
    return Grid(bits, _positive((high - low) / (2**bits - 1)), offset=low)


def _positive(scale: Tensor) -> Tensor:
    """1 in place of 0, for groups in which all numbers are the same: any scale will do for them."""
    return torch.where(scale > 0, scale, 1.0)


GridMapping = Callable[[Tensor, Tensor, int], Grid]
Make = Callable[[Tensor, Tensor], Grid]
Limits = Callable[[Tensor, Make], Grid]


def extremes(numbers: Tensor, make: Make) -> Grid:
    """The grid from the least to the greatest number of each group: nothing is cut off."""
    return make(numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True))


def percentile(share: float) -> Limits:
    """Limits that cut off `share` of the numbers at either end: 0.01 is two of a group of 200."""
    require_number("share", share, above=0)
    require(share < 0.5, f"share is {share}; it must be below 0.5, or nothing is left")

    def limits(numbers: Tensor, make: Make) -> Grid:
        ordered = numbers.sort(dim=-1).values
        last = numbers.shape[-1] - 1
        low, high = round(share * last), round((1 - share) * last)
        require(low < high, f"share {share} leaves nothing of groups of {last + 1}")
        return make(ordered[..., low : low + 1], ordered[..., high : high + 1])

    return limits


SHRUNK = tuple(1 - step / 20 for step in range(15))  # 1, 0.95, ... 0.3 of the extremes


def least_squares(numbers: Tensor, make: Make) -> Grid:
    """Of 15 grids, with limits from 1 to 0.3 times the extremes, the one of least squared error."""
    low, high = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)
    best, kept = torch.full_like(low, torch.inf), torch.ones_like(low)
    for share in SHRUNK:
        error = (make(share * low, share * high).rounded(numbers) - numbers).square()
        error = error.sum(-1, keepdim=True)
        best, kept = torch.minimum(best, error), torch.where(error < best, share, kept)
    return make(kept * low, kept * high)


def fit(
    numbers: Tensor, bits: int, *, mapping: GridMapping = affine, limits: Limits = extremes
) -> Grid:
    """A grid of `bits` for each group of numbers (..., N).

    Raises ValueError for bits outside 2..8, no numbers, and numbers that are not finite.
    """
    code_range(bits)
    require(numbers.numel() > 0, "there are 0 numbers to fit a grid to")
    require_finite(numbers)
    return limits(numbers, partial(mapping, bits=bits))


def grouped(weight: Tensor, group: int | str = "row") -> Tensor:
    """A weight (O, I) as (O, G, N): groups of `group` inputs, "row" or "tensor" for one alone.

    Raises ValueError for a group that does not divide the inputs.
    """
    if group == "tensor":
        return weight.reshape(1, 1, -1)
    if group == "row":
        return weight.unsqueeze(1)
    require(not isinstance(group, str), f"group is {group!r}; give a number, 'row' or 'tensor'")
    require_whole("group", group)
    inputs = weight.shape[1]
    require(inputs % group == 0, f"group {group} does not divide the {inputs} inputs")
    return weight.unflatten(1, (-1, group))

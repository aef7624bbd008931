"""Arithmetic in a format that this machine may not have: FP32, rounded after each operation.

A unit for FP16 products takes FP16 numbers, multiplies them exactly, adds the products up in FP32
and rounds the sum once. FP32 units give the same number when operands and result are rounded, for
FP32 holds the product of two FP16 numbers exactly. Gradients pass the same roundings on their way
back. So the memory is that of FP32 and the speed is lower, but the numbers are the format's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from companion.checks import require_known
from companion.precision.formats import FORMATS
from companion.precision.policy import ELIGIBLE, Policy, converted, within
from companion.precision.rounding import rounded

Rounding = Callable[[Tensor], Tensor]


@dataclass
class Lost:
    """What rounding took from gradients on their way back, added up over backward passes."""

    values: int = 0  # numbers other than zero that were rounded, each time they were
    underflowed: int = 0  # of them, became zero
    overflowed: int = 0  # of them, were finite and became infinite or NaN

    def count(self, before: Tensor, after: Tensor) -> None:
        """Add one rounding of a gradient."""
        there = before != 0
        lost = there & (after == 0)
        broken = before.isfinite() & ~after.isfinite()
        sums = torch.stack([there.sum(), lost.sum(), broken.sum()]).tolist()
        self.values += sums[0]
        self.underflowed += sums[1]
        self.overflowed += sums[2]


def emulated(model: nn.Module, format: str = "FP16", *, lost: Lost | None = None) -> nn.Module:
    """A copy that computes as `mixed_precision` does in `format`, on a device without its units.

    Operands, results and gradients of each operation that works in the low format are rounded to
    it; what stays in FP32 there stays in FP32 here; the parameters are the FP32 master weights.
    Numbers agree with native ones to the last bit where the order of the FP32 sum does not matter.
    `lost`, if given, counts the gradients that underflow and overflow. Raises ValueError for an
    unknown format.
    """
    return within(model, Emulation(format, lost))


def to_format(format: str) -> Rounding:
    """The function that rounds FP32 tensors to a format: torch's cast, where it has the type."""
    require_known("format", format, FORMATS)
    found = FORMATS[format]
    if found.dtype is None:
        return lambda x: rounded(x, format)
    return lambda x: x.to(found.dtype).to(x.dtype)


class Rounded(torch.autograd.Function):
    """Round a tensor on its way forward, and its gradient on its way back."""

    @staticmethod
    def forward(ctx, x: Tensor, forth: Rounding, back: Rounding, lost: Lost | None) -> Tensor:
        ctx.back, ctx.lost = back, lost
        return forth(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        result = ctx.back(gradient)
        if ctx.lost is not None:
            ctx.lost.count(gradient, result)
        return result, None, None, None


def nothing(x: Tensor) -> Tensor:
    """The same numbers, as a tensor of its own to autograd."""
    return x.view_as(x)


class Emulation(Policy):
    """A policy whose tensors are all FP32; those that stand for the low format carry a mark.

    The mark takes the place of a type: an operation on marked tensors alone works in the low
    format, and one that meets an unmarked tensor works in FP32, as types are promoted.
    """

    def __init__(self, format: str, lost: Lost | None = None) -> None:
        super().__init__(torch.float32)
        self.rounding, self.lost = to_format(format), lost

    def round(self, x: Tensor) -> Tensor:
        """Round what is not yet in the format, and the gradient that comes back in any case."""
        return Rounded.apply(
            x, nothing if is_marked(x) else self.rounding, self.rounding, self.lost
        )

    def product(self, func: Callable, inputs: tuple) -> object:
        args, kwargs = converted(inputs, self.round)
        return converted(func(*args, **kwargs), lambda result: marked(self.round(result)))

    def wide(self, func: Callable, inputs: tuple) -> object:
        return super().wide(func, converted(inputs, self.marked_only))

    def other(self, func: Callable, inputs: tuple) -> object:
        leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        low = all(is_marked(leaf) for leaf in leaves if leaf.dtype in ELIGIBLE)
        results = super().other(func, converted(inputs, self.marked_only))
        if not low:
            return results
        return converted(results, lambda x: marked(x if x._is_view() else self.round(x)))

    def marked_only(self, x: Tensor) -> Tensor:
        """An operand that stands for the low format gets a gradient of the low format."""
        return marked(self.round(x)) if is_marked(x) else x


def marked(x: Tensor) -> Tensor:
    """The tensor, with the mark of the low format."""
    x.low = True
    return x


def is_marked(x: Tensor) -> bool:
    """Whether a tensor stands for numbers of the low format."""
    return getattr(x, "low", False)

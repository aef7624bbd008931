"""Weights in fewer bits without a grid: floating-point formats, and sixteen numbers of a table.

A floating-point number spends its bits on an exponent, so its steps grow with its size: small
weights keep more digits than on an even grid, large ones fewer.

    bfloat16        8 bits of exponent, 7 of fraction; the range of FP32
    float16         5 and 10; up to 65,504
    float8_e4m3fn   4 and 3; up to 448      Micikevicius et al., arXiv:2209.05433
    float8_e5m2     5 and 2; up to 57,344
    nf4             16 quantiles of the normal distribution    Dettmers et al., arXiv:2305.14314
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from companion.checks import require, require_finite, require_known

CASTS = {
    name: getattr(torch, name) for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
}
FORMATS = (*CASTS, "nf4")


@dataclass(frozen=True, eq=False)
class Cast:
    """Numbers divided by a scale and stored in a floating-point type."""

    dtype: torch.dtype
    scale: Tensor | None = None  # (..., 1); None: 1

    def codes(self, numbers: Tensor) -> Tensor:
        """Numbers (..., N) in the type of storage."""
        return (numbers if self.scale is None else numbers / self.scale).to(self.dtype)

    def numbers(self, codes: Tensor) -> Tensor:
        """What the stored (..., N) stand for, in FP32."""
        return codes.float() if self.scale is None else codes.float() * self.scale


@dataclass(frozen=True, eq=False)
class Table:
    """Numbers divided by a scale and replaced by the nearest of 2^bits in a table."""

    bits: int
    scale: Tensor  # (..., 1)
    levels: Tensor  # (2^bits,), rising

    def codes(self, numbers: Tensor) -> Tensor:
        """The nearest entries, counted from -2^(bits - 1), of numbers (..., N)."""
        between = (self.levels[1:] + self.levels[:-1]) / 2
        entry = torch.bucketize((numbers / self.scale).contiguous(), between)
        return (entry - 2 ** (self.bits - 1)).to(torch.int8)

    def numbers(self, codes: Tensor) -> Tensor:
        """What codes (..., N) stand for."""
        return self.levels[codes.long() + 2 ** (self.bits - 1)] * self.scale


def nf4_levels() -> Tensor:
    """The 16 numbers of NF4, from -1 to 1 with an exact 0: 8 below it counting 0, and 8 above.

    Quantiles of the normal distribution at evenly spaced shares, divided by the largest; the shares
    end at 1 - (1/32 + 1/30) / 2, so that no quantile is infinite. QLoRA, arXiv:2305.14314, E.
    """
    end = 1 - (1 / 32 + 1 / 30) / 2
    normal = torch.distributions.Normal(
        torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    )
    above = normal.icdf(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    zero = torch.zeros(1, dtype=torch.float64)
    return (torch.cat([below, zero, above.flip(0)]) / above.max()).float()


def in_format(numbers: Tensor, name: str) -> Cast | Table:
    """How numbers (..., N) are stored in a named format; 8 and 4 bits get a scale for each group.

    Raises ValueError for an unknown format, and for numbers that are not finite or too large.
    """
    require_known("format", name, FORMATS)
    require_finite(numbers)
    largest = numbers.abs().amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    if name == "nf4":
        return Table(4, largest, nf4_levels().to(numbers.device))
    dtype = CASTS[name]
    if dtype.itemsize == 2:
        most, limit = largest.max().item(), torch.finfo(dtype).max
        require(most <= limit, f"a number of size {most:,} exceeds the {limit:,} of {name}")
        return Cast(dtype)
    return Cast(dtype, largest / torch.finfo(dtype).max)

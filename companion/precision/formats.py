"""How numbers are stored: a sign, e bits of exponent, f bits of fraction.

With the exponent bits read as a whole number E, the fraction bits as F, and bias = 2^(e-1) - 1,

    E > 0:  (-1)^sign (1 + F / 2^f) 2^(E - bias)      a normal number
    E = 0:  (-1)^sign (0 + F / 2^f) 2^(1 - bias)      a denormal, or zero

Numbers between two powers of two lie evenly; their spacing doubles at the next power. The largest E
may mean something else: infinities and NaN (IEEE 754), NaN at its last code only (E4M3 of
Micikevicius et al., arXiv:2209.05433), or nothing special (E2M1 of the OCP Microscaling formats).
Everything here is done on integers, so that flushing denormals to zero changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from companion.checks import require, require_known

TOPS = ("infinities", "one NaN", "numbers")
FP32_BIAS, FP32_FRACTION = 127, 23


class Parts(NamedTuple):
    """The three fields of stored numbers, each a tensor of whole numbers."""

    sign: Tensor  # 0 or 1
    exponent: Tensor  # E, as stored: with the bias in it
    fraction: Tensor  # F


@dataclass(frozen=True)
class Format:
    """How a number is stored. `top` says what the codes with the largest exponent mean."""

    name: str
    exponent_bits: int
    fraction_bits: int
    top: str = "infinities"
    dtype: torch.dtype | None = None  # torch's own, where it has one that holds one number

    def __post_init__(self) -> None:
        require_known("top", self.top, TOPS)
        fits = 2 <= self.exponent_bits <= 8 and 1 <= self.fraction_bits <= FP32_FRACTION
        fields = f"{self.exponent_bits} bits of exponent and {self.fraction_bits} of fraction"
        require(fits, f"{fields}; 2 to 8 and 1 to {FP32_FRACTION} fit into FP32")

    @property
    def bits(self) -> int:
        """Of one number. TF32 has 19, but lies in memory as 32."""
        return 1 + self.exponent_bits + self.fraction_bits

    @property
    def bias(self) -> int:
        """What the stored exponent is larger by."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def lowest_exponent(self) -> int:
        """Of the smallest normal number, and of all denormals."""
        return 1 - self.bias

    @property
    def largest(self) -> float:
        """The largest finite number."""
        exponent, fraction = divmod(self.largest_code, 2**self.fraction_bits)
        return (1 + fraction / 2**self.fraction_bits) * 2.0 ** (exponent - self.bias)

    @property
    def largest_code(self) -> int:
        """The code of the largest finite number: all ones, less those that mean something else."""
        codes = 2 ** (self.exponent_bits + self.fraction_bits)
        special = {"infinities": 2**self.fraction_bits, "one NaN": 1, "numbers": 0}[self.top]
        return codes - 1 - special

    @property
    def smallest_normal(self) -> float:
        """Below it the spacing shrinks no further."""
        return 2.0**self.lowest_exponent

    @property
    def smallest_denormal(self) -> float:
        """The smallest number above zero, and the spacing of all denormals."""
        return 2.0 ** (self.lowest_exponent - self.fraction_bits)

    @property
    def has_infinity(self) -> bool:
        """Where there is none, numbers that are too large become the largest."""
        return self.top == "infinities"

    def spacing(self, x: Tensor | float) -> Tensor:
        """From |x| to the next number away from zero: 2^(max(floor(log2 |x|), lowest) - f), FP64.

        x is of any shape; 0 counts as a denormal. NaN where |x| is above the largest, or NaN.
        """
        size = torch.as_tensor(x, dtype=torch.float64).abs()
        exponent = torch.frexp(size).exponent - 1  # size = m 2^(exponent + 1), m from 0.5 to 1
        exponent = torch.where(size > 0, exponent, self.lowest_exponent)
        steps = exponent.clamp(min=self.lowest_exponent) - self.fraction_bits
        return torch.where(size <= self.largest, power_of_two(steps), torch.nan)

    def codes(self, x: Tensor) -> Tensor:
        """The bits of FP32 numbers x, of any shape, as whole numbers (int64) from 0 to 2^bits - 1.

        Raises ValueError for another dtype, and for numbers that the format does not hold.
        """
        pattern = patterns(x).long()
        sign, size = pattern >> 31 & 1, pattern & 0x7FFFFFFF
        stored = size >> FP32_FRACTION
        significand = (size & 0x7FFFFF) + (stored.clamp(max=1) << FP32_FRACTION)
        exponent = stored.clamp(min=1) - FP32_BIAS + self.bias  # would be E if normal
        drop = FP32_FRACTION - self.fraction_bits + (1 - exponent).clamp(0, 32)
        count = significand >> drop  # in units of the spacing: a leading 1 counts into E
        codes = (exponent.clamp(min=1) - 1 << self.fraction_bits) + count
        held = (count << drop == significand) & (codes <= self.largest_code)
        for special, code in ((x.isinf(), self._infinity), (x.isnan(), self._nan)):
            if code is not None:
                codes, held = torch.where(special, code, codes), held | special
        bad = x[~held][:1].tolist()
        require(not bad, f"{self.name} does not hold {bad}; round to it first")
        return codes + (sign << self.bits - 1)

    def parts(self, x: Tensor) -> Parts:
        """Sign, exponent and fraction of FP32 numbers that the format holds, else ValueError."""
        return self.split(self.codes(x))

    def split(self, codes: Tensor) -> Parts:
        """The fields of codes (int64, any shape) from 0 to 2^bits - 1, else ValueError."""
        inside = bool(((codes >= 0) & (codes < 2**self.bits)).all())
        require(inside, f"{self.name} has codes from 0 to {2**self.bits - 1:,}")
        exponent = codes >> self.fraction_bits & 2**self.exponent_bits - 1
        return Parts(codes >> self.bits - 1, exponent, codes & 2**self.fraction_bits - 1)

    def value(self, parts: Parts) -> Tensor:
        """The numbers that fields stand for, by the formula above, in FP64."""
        sign, exponent, fraction = parts
        leading = exponent.clamp(max=1)
        power = power_of_two(exponent.clamp(min=1) - self.bias)
        size = (leading + fraction.double() / 2**self.fraction_bits) * power
        code = (exponent << self.fraction_bits) + fraction
        beyond = torch.inf if self.has_infinity else torch.nan
        size = torch.where(code == self.largest_code + 1, beyond, size)
        size = torch.where(code > self.largest_code + 1, torch.nan, size)
        return torch.where(sign == 1, -size, size)

    @property
    def _infinity(self) -> int | None:
        """The code of infinity."""
        return self.largest_code + 1 if self.has_infinity else None

    @property
    def _nan(self) -> int | None:
        """A code of NaN: infinity's with the first fraction bit set, or the only one."""
        quiet = self.largest_code + 1 + 2 ** (self.fraction_bits - 1)
        return {"infinities": quiet, "one NaN": self.largest_code + 1, "numbers": None}[self.top]


def patterns(x: Tensor) -> Tensor:
    """The bits of FP32 numbers as int32. Raises ValueError for another dtype."""
    require(x.dtype == torch.float32, f"x is {x.dtype}; the formats are made from torch.float32")
    return x.detach().view(torch.int32)


def format_of(format: Format | str) -> Format:
    """A format, or the one of that name. Raises ValueError for an unknown name."""
    if isinstance(format, Format):
        return format
    require_known("format", format, FORMATS)
    return FORMATS[format]


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in FP64, exact on every device, for whole exponents from -1022 to 1023."""
    return (exponent.long() + 1023 << 52).view(torch.float64)  # the exponent field of FP64


FORMATS = {
    found.name: found
    for found in (
        Format("FP32", 8, 23, dtype=torch.float32),
        Format("TF32", 8, 10),
        Format("BF16", 8, 7, dtype=torch.bfloat16),
        Format("FP16", 5, 10, dtype=torch.float16),
        Format("E4M3", 4, 3, "one NaN", torch.float8_e4m3fn),
        Format("E5M2", 5, 2, dtype=torch.float8_e5m2),
        Format("E2M1", 2, 1, "numbers"),
    )
}

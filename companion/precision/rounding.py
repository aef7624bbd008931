"""Rounding to a format: to the nearest number, or to one of the two neighbours by chance.

Read as a whole number, the bits of a positive FP32 number count the FP32 numbers below it. Numbers
of a format with f fraction bits are those whose count is a multiple of 2^(23 - f), so rounding is
that of whole numbers, and what is carried into the exponent bits is right there too:

    1.2109375  0 01111111 0011011 0000000000000000    BF16 keeps the first 16 bits
    1.2119     0 01111111 0011011 0001111110001010    down: the rest is below half

Only below the smallest normal number does a format with fewer exponent bits need something else:
the spacing stays what it is, and the number is rounded to a multiple of it. Results are FP32.
TF32 is rounded as the others; units that read FP32 may drop its bits in another way.
Stochastic rounding as in Xia et al., arXiv:2006.00489.
"""

from __future__ import annotations

import torch
from torch import Tensor

from companion.precision.formats import FP32_FRACTION, Format, format_of, patterns

DRAWN = 24  # random bits for a number; no format drops more of FP32's


def rounded(x: Tensor, format: Format | str) -> Tensor:
    """The nearest numbers of a format, FP32 and of x's shape; of two equally near the even one.

    Numbers too large become infinite, or the largest where there is no infinity, as torch's casts
    do (up to 2.11 they made NaN of what E4M3 cannot hold). NaN stays, even in E2M1, which has no
    code for it. No gradient passes. Raises ValueError for an unknown format or another dtype.
    """
    found, count = format_of(format), _count(x)
    drop = FP32_FRACTION - found.fraction_bits
    if drop > 0:
        odd = count >> drop & 1
        count = count + (2 ** (drop - 1) - 1) + odd >> drop << drop
    size = count.view(torch.float32)
    if found.exponent_bits < 8:
        shift = found.smallest_denormal * 2**FP32_FRACTION  # FP32 has there this very spacing
        size = torch.where(size < found.smallest_normal, (x.abs() + shift) - shift, size)
    return _finished(size, x, found)


def stochastically_rounded(
    x: Tensor, format: Format | str, generator: torch.Generator | None = None
) -> Tensor:
    """Up with the chance (x - below) / spacing, else down: its mean is x, as FP32 of x's shape.

    Numbers of the format stay as they are, and so do zeros. Beyond the largest number there is no
    neighbour to choose, so those are rounded to the nearest. No gradient passes. Raises ValueError
    for an unknown format or another dtype.
    """
    found, count = format_of(format), _count(x)
    drop = FP32_FRACTION - found.fraction_bits
    draw = torch.randint(2**DRAWN, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    size = (count + (draw >> DRAWN - drop) >> drop << drop).view(torch.float32)
    if found.exponent_bits < 8:
        steps = x.detach().abs() / found.smallest_denormal
        up = draw < (steps - steps.floor()) * 2**DRAWN
        even = (steps.floor() + up) * found.smallest_denormal
        size = torch.where(x.abs() < found.smallest_normal, even, size)
    inside = x.abs() <= found.largest
    return torch.where(inside, size.copysign(x.detach()), rounded(x, found))


def _count(x: Tensor) -> Tensor:
    """The bits of |x| as whole numbers."""
    return patterns(x) & 0x7FFFFFFF


def _finished(size: Tensor, x: Tensor, format: Format) -> Tensor:
    """Sizes with the sign of x, those above the largest number replaced, and NaN where x has it."""
    beyond = torch.inf if format.has_infinity else format.largest
    size = torch.where(size > format.largest, beyond, size).copysign(x)
    return torch.where(x.isnan(), x, size).detach()

"""MXFP4: 4-bit numbers that share a scale, 32 at a time.

E2M1 has eight sizes: 0, 0.5, 1, 1.5, 2, 3, 4, 6. That is no range to speak of, so each block of 32
numbers has a power of two of its own, stored in 8 bits (E8M0: an exponent and nothing else):

    scale = 2^(floor(log2(max |x|)) - 2)

The largest number of a block then lies from 4 to 8 scales, and what is above 6 becomes 6. A number
takes 4 + 8/32 = 4.25 bits. Open Compute Project, Microscaling Formats (MX) v1.0, as torchao has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from companion.checks import require, require_finite
from companion.precision.formats import FORMATS, FP32_FRACTION, patterns
from companion.precision.rounding import rounded

BLOCK = 32
E2M1 = FORMATS["E2M1"]
LARGEST_POWER = 2  # of E2M1: 4 = 2^2


@dataclass(frozen=True, eq=False)
class Blocks:
    """Numbers (..., N) in MXFP4."""

    codes: Tensor  # (..., N) uint8 from 0 to 15: the bits of an E2M1 number
    scales: Tensor  # (..., N / 32) uint8: the scale is 2^(code - 127)

    @property
    def bytes(self) -> float:
        """With two codes in a byte, as hardware stores them."""
        return self.codes.numel() / 2 + self.scales.numel()

    def numbers(self) -> Tensor:
        """What is stored, FP32 (..., N)."""
        elements = E2M1.value(E2M1.split(self.codes.long())).float()
        double = _power(self.scales + 1)  # the scale itself may be 2^-127, a denormal
        return (_blocks(elements / 2) * double[..., None]).flatten(-2)


def mx_blocks(x: Tensor) -> Blocks:
    """FP32 numbers (..., N) in MXFP4, each rounded to the nearest, ties to even.

    Raises ValueError unless x is FP32 and finite and N a multiple of 32.
    """
    size = x.shape[-1] if x.ndim else 0
    whole = size > 0 and size % BLOCK == 0
    require(whole, f"x has shape {tuple(x.shape)}; its last size must be a multiple of {BLOCK}")
    require_finite(x)
    blocks = _blocks(x)
    stored = patterns(blocks.abs().amax(-1)) >> FP32_FRACTION  # floor(log2) + 127
    scales = (stored - LARGEST_POWER).clamp(min=0).to(torch.uint8)
    elements = rounded(blocks.detach() * _power(254 - scales)[..., None], E2M1)
    return Blocks(E2M1.codes(elements).to(torch.uint8).flatten(-2), scales)


def mx_rounded(x: Tensor) -> Tensor:
    """The numbers of MXFP4 that x (..., N) is stored as, FP32. No gradient; errors as above."""
    return mx_blocks(x).numbers()


def _blocks(x: Tensor) -> Tensor:
    """(..., N) as (..., N / 32, 32)."""
    return x.unflatten(-1, (-1, BLOCK))


def _power(code: Tensor) -> Tensor:
    """2^(code - 127) in FP32 for codes from 1 to 254: the code is the exponent field."""
    return (code.int() << FP32_FRACTION).view(torch.float32)

"""Codes of 2 to 8 bits side by side in bytes, so that four bits really take half a byte.

Some codes fill a whole number of bytes together: one of 8 bits, two of 4, eight of 3 (three bytes).
They are written into one wide integer, lowest first, and that integer is cut into bytes.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from companion.checks import require
from companion.quantization.grids import code_range


def together(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and how many bytes: (2, 1) for 4 bits."""
    code_range(bits)
    return 8 // gcd(bits, 8), bits // gcd(bits, 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (O, I), int8, as bytes (O, I x bits / 8), uint8.

    Raises ValueError if a row does not fill whole bytes, or a code needs more bits.
    """
    lowest, highest = code_range(bits)
    count, size = together(bits)
    inputs = codes.shape[-1]
    require(inputs % count == 0, f"{inputs} codes of {bits} bits do not fill whole bytes")
    low, high = int(codes.min()), int(codes.max())
    require(low >= lowest and high <= highest, f"codes {low} to {high} need more than {bits} bits")
    unsigned = (codes.short() - lowest).unflatten(-1, (-1, count)).long()
    word = sum(unsigned[..., i] << (bits * i) for i in range(count))
    return torch.stack([word >> (8 * i) & 255 for i in range(size)], -1).flatten(-2).to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes (O, I), int8, that `pack` wrote as bytes."""
    lowest, _ = code_range(bits)
    if bits == 8:
        return (packed ^ 128).view(torch.int8)
    count, size = together(bits)
    held = packed.shape[-1]
    require(held % size == 0, f"{held} bytes are no whole number of {bits}-bit codes")
    if size == 1:
        return _spread(packed, bits, count).view(torch.int8) + lowest
    parts = packed.unflatten(-1, (-1, size)).to(torch.int32 if size < 4 else torch.int64)
    word = sum(parts[..., i] << (8 * i) for i in range(size))
    each = [word >> (bits * i) & (2**bits - 1) for i in range(count)]
    codes = torch.stack(each, -1).flatten(-2)
    return (codes + lowest).to(torch.int8)


def _spread(packed: Tensor, bits: int, count: int) -> Tensor:
    """2 or 4 bits: every byte becomes an integer of `count` bytes, with one code in each.

    The byte is laid over itself, shifted so that each code meets the bottom of a byte, and all else
    is masked out: a few passes over short integers instead of one for each code.
    """
    wide = {2: torch.int16, 4: torch.int32}[count]
    word = packed.to(wide)
    laid = word
    for i in range(1, count):
        laid = laid | word << ((8 - bits) * i)
    mask = sum((2**bits - 1) << (8 * i) for i in range(count))
    return (laid & mask).view(torch.uint8)

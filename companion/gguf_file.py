"""Read a GGUF file: metadata, then a table of tensors, then their numbers in small blocks.

GGUF is the file format of llama.cpp. Its quantized tensors are rows of blocks: a block of Q4_1
holds 32 numbers as four-bit integers with one scale and one offset, 20 bytes in all; a block of
Q8_0 holds 32 eight-bit integers with one scale, 34 bytes. The file is mapped into memory, so a
tensor costs nothing until it is expanded.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian.
The header is read here because `gguf.GGUFReader` spends seconds on its 98,000 strings.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from companion.checks import require

NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as the file holds it."""

    kind: GGMLQuantizationType  # the format of its blocks: F32, Q4_1, Q8_0
    shape: tuple[int, ...]  # of the expanded tensor, output axis first as in torch
    data: np.ndarray  # bytes, one row for each index of the first axes

    def expand(self) -> torch.Tensor:
        """The numbers in FP32, a new tensor of `shape`."""
        numbers = np.require(dequantize(self.data, self.kind), requirements="W")  # F32 is a view
        return torch.from_numpy(numbers.reshape(self.shape))


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """What a GGUF file holds: metadata by key, tensors by llama.cpp's names."""

    metadata: dict[str, object]
    tensors: dict[str, StoredTensor]


def read_gguf(path: str | Path) -> GGUFFile:
    """Map a GGUF file into memory. Raises FileNotFoundError, or ValueError for a damaged file."""
    require(Path(path).stat().st_size > 0, f"{path} is empty")
    data = np.memmap(path, mode="r").view(np.ndarray)
    try:
        return _parse(data)
    except (struct.error, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no whole GGUF file of version 3: {error}") from error


def _parse(data: np.ndarray) -> GGUFFile:
    header = _Header(data)
    start = bytes(data[:8])
    require(start == b"GGUF" + struct.pack("<I", 3), f"it starts with {start!r}")
    header.at = 8
    tensors, pairs = header.number("Q"), header.number("Q")
    metadata = {header.text(): header.value(header.number("I")) for _ in range(pairs)}
    table = [header.entry() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    first = math.ceil(header.at / alignment) * alignment
    stored = {name: _tensor(data, name, shape, kind, first + at) for name, shape, kind, at in table}
    return GGUFFile(metadata, stored)


def _tensor(data: np.ndarray, name: str, shape: tuple, kind: int, start: int) -> StoredTensor:
    kind = GGMLQuantizationType(kind)
    numbers, size = GGML_QUANT_SIZES[kind]  # of one block
    row = shape[-1] // numbers * size
    stop = start + math.prod(shape[:-1]) * row
    require(stop <= data.size, f"tensor {name} ends at byte {stop} of {data.size}")
    return StoredTensor(kind, shape, data[start:stop].reshape(*shape[:-1], row))


class _Header:
    """Reads the values at the start of the file one after another."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = memoryview(data), 0

    def number(self, code: str) -> int | float | bool:
        """A number by its code in `struct`."""
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        length = self.number("Q")
        start, self.at = self.at, self.at + length
        require(self.at <= len(self.data), f"a string ends at byte {self.at} of {len(self.data)}")
        return str(self.data[start : self.at], "utf-8")

    def value(self, kind: int) -> object:
        """A value of metadata: a number, a string, or a list of either."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            kind, length = self.number("I"), self.number("Q")
            return [self.value(kind) for _ in range(length)]
        return self.number(NUMBERS[kind])

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """One tensor of the table: name, shape, kind, and where its data start."""
        name = self.text()
        lengths = [self.number("Q") for _ in range(self.number("I"))]  # fastest axis first
        return name, tuple(reversed(lengths)), self.number("I"), self.number("Q")

"""Layers that hold their weight in few bits and expand it when it is used.

`QuantizedMatrix` is the storage: packed codes, and the scales they are read with. A linear layer
and an embedding read from one; a tied head and its embedding read from the same, which is stored
once. Expanding costs time: this is the plain path that runs everywhere and that every faster kernel
must agree with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from companion.quantization.formats import Cast, Table
from companion.quantization.grids import Grid
from companion.quantization.packing import pack, unpack

Scheme = Grid | Cast | Table


def regrouped(scheme: Scheme, change: Callable[[Tensor], Tensor]) -> Scheme:
    """The scheme with `change` made to each tensor that has an entry for each group."""
    found = {name: getattr(scheme, name, None) for name in ("scale", "zero", "offset")}
    return replace(scheme, **{name: change(t) for name, t in found.items() if t is not None})


class QuantizedMatrix(nn.Module):
    """A weight (O, I), stored as codes and a scheme: bytes count as they lie in memory."""

    def __init__(
        self, codes: Tensor, scheme: Scheme, inputs: int, columns: Tensor | None = None
    ) -> None:
        """Store codes (O, G, N), or (1, 1, O x I), whose rows have `inputs` numbers.

        `columns` (I,) multiplies each column of what the codes stand for.
        """
        super().__init__()
        self.kind, self.inputs = type(scheme), inputs
        self.bits = getattr(scheme, "bits", None)  # None: codes are floating-point numbers
        rows = codes.reshape(-1, inputs)
        self.register_buffer("codes", rows if self.bits is None else pack(rows, self.bits))
        for field in fields(scheme):
            value = getattr(scheme, field.name)
            if isinstance(value, Tensor):
                self.register_buffer(field.name, _narrow(value, field.name, self.kind))
        self.register_buffer("columns", None if columns is None else columns.half())

    @classmethod
    def of(
        cls, kind: type, bits: int | None, inputs: int, tensors: Mapping[str, Tensor]
    ) -> QuantizedMatrix:
        """A matrix from the tensors that its `state_dict` gave."""
        matrix = cls.__new__(cls)
        nn.Module.__init__(matrix)
        matrix.kind, matrix.bits, matrix.inputs = kind, bits, inputs
        for name, tensor in {"columns": None, **tensors}.items():
            matrix.register_buffer(name, tensor)
        matrix.expand()  # fails where the tensors do not belong together
        return matrix

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.inputs

    @property
    def scheme(self) -> Scheme:
        """How codes are read, in FP32."""
        rest = {"dtype": self.codes.dtype} if self.bits is None else {"bits": self.bits}
        named = [field.name for field in fields(self.kind) if hasattr(self, field.name)]
        held = {name: getattr(self, name).float() for name in named if name != "bits"}
        return self.kind(**rest, **held)

    @property
    def symmetric_rows(self) -> bool:
        """Whether a code is its number but for one factor a row, as integer products need."""
        scheme = self.scheme
        rows = self.kind is Grid and scheme.scale.shape[:2] == (self.shape[0], 1)
        return rows and scheme.zero is None and scheme.offset is None and self.columns is None

    def unpacked(self) -> Tensor:
        """The codes (O, I): int8, or the floating-point type they are stored in."""
        return self.codes if self.bits is None else unpack(self.codes, self.bits)

    def expand(self) -> Tensor:
        """The weight (O, I) in FP32."""
        return self._read(self.unpacked(), self.scheme)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows (..., I) by their numbers (...), in FP32; the others stay packed."""
        flat = ids.flatten()
        codes = self.codes[flat]
        codes = codes if self.bits is None else unpack(codes, self.bits)
        scheme = self.scheme
        if scheme.scale is not None and len(scheme.scale) == len(self.codes):  # not one for all
            scheme = regrouped(scheme, lambda tensor: tensor[flat])
        return self._read(codes, scheme).view(*ids.shape, self.inputs)

    def _read(self, codes: Tensor, scheme: Scheme) -> Tensor:
        """Numbers (R, I) from codes (R, I): each group through its own scale."""
        if scheme.scale is not None:
            codes = codes.reshape(*scheme.scale.shape[:2], -1)
        numbers = scheme.numbers(codes).view(-1, self.inputs)
        return numbers if self.columns is None else numbers * self.columns.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedMatrix:
        """Follow the model to another device; codes and scales keep their types."""
        for name, tensor in self._buffers.items():
            if tensor is not None:
                self._buffers[name] = tensor.to(fn(tensor.new_empty(0)).device)
        return self

    def extra_repr(self) -> str:
        stored = self.kind.__name__.lower() if self.bits is None else f"bits={self.bits}"
        return f"{self.shape[0]} x {self.shape[1]}, {stored}"


def _narrow(tensor: Tensor, name: str, kind: type) -> Tensor:
    """Scales and offsets of a grid in 16 bits, zeros in 8; the tables of other formats as given."""
    if kind is not Grid:
        return tensor
    return tensor.to(torch.int8 if name == "zero" else torch.float16)


class QuantizedLinear(nn.Module):
    """y = x W^T with W expanded from a `QuantizedMatrix`, in the type of x."""

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    @property
    def in_features(self) -> int:
        return self.matrix.shape[1]

    @property
    def out_features(self) -> int:
        return self.matrix.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.matrix.expand().to(x.dtype))


class QuantizedEmbedding(nn.Module):
    """Rows of a `QuantizedMatrix` by token id, in the type of the model's vectors."""

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return self.matrix.rows(tokens).to(self.dtype)

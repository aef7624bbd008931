"""The same products at speed: torch's own kernels for packed weights on a processor.

    Int4Weights    4-bit codes and BF16 vectors: under a third of BF16's bytes are read
    Int8Weights    8-bit codes and BF16 vectors
    Int8Products   8-bit codes and 8-bit vectors: integer arithmetic (see `product_grid`)

Each is made from a `QuantizedMatrix` and computes with the same codes. The first two round scales
and vectors to BF16, the third rounds vectors to 8 bits; their tests say how far that goes.
Where torch lacks a kernel, `kernel` returns the plain layer.

They are made for few vectors, when reading the weight is the wait. Many vectors share the reading,
and then the first two had better expand their weight once and multiply in FP32; `many` says when.
The third stays ahead with many vectors; each is first rounded on a grid of its own, since one large
vector would spoil a range that all share.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from companion.checks import require, require_known
from companion.quantization.grids import Grid, affine, symmetric
from companion.quantization.layers import QuantizedLinear, QuantizedMatrix
from companion.quantization.packing import unpack

GROUPS = (32, 64, 128, 256)  # of inputs, that the 4-bit kernel takes
ROWS = 16  # it takes rows by so many


class Kernel(nn.Module):
    """A linear layer that multiplies a few vectors by packed codes, and many by the full weight."""

    dtype: torch.dtype  # of vectors that the kernel takes, and gives
    many: float  # vectors from which on the weight is expanded

    def multiply(self, x: Tensor) -> Tensor:
        """Vectors (N, I) times the packed weight, (N, O)."""
        raise NotImplementedError

    def expand(self) -> Tensor:
        """The weight (O, I) in FP32."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (..., I) to (..., O), in the type they came in."""
        rows = x.reshape(-1, x.shape[-1])
        if x.dtype == self.dtype and len(rows) < self.many:
            y = self.multiply(rows)
        else:
            y = linear(rows.float(), self.expand()).to(x.dtype)
        return y.view(*x.shape[:-1], -1)


class Int4Weights(Kernel):
    """`aten._weight_int4pack_mm_for_cpu`: scale x (code - 8) + zero, in groups of inputs.

    The kernel's order of codes is its own, so they are kept in plain order too, to expand them.
    """

    dtype, many = torch.bfloat16, 16

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__()
        scheme = _grid(matrix, 4)
        outputs, self.group = matrix.shape[0], matrix.inputs // scheme.scale.shape[1]
        shapes = f"{outputs} rows in groups of {self.group}"
        fits = outputs % ROWS == 0 and self.group in GROUPS and len(scheme.scale) == outputs
        require(fits, f"{shapes} do not suit the kernel: rows by {ROWS}, groups of {GROUPS}")
        middle = scheme.numbers(torch.zeros_like(scheme.scale))  # what code 0 stands for
        both = torch.cat([scheme.scale, middle], dim=-1).transpose(0, 1)  # (G, O, 2)
        unsigned = matrix.unpacked().int() + 8
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        self.register_buffer("packed", packed)
        self.register_buffer("scale_and_zero", both.contiguous().to(self.dtype))
        self.register_buffer("codes", matrix.codes)

    def multiply(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.packed, self.group, self.scale_and_zero
        )

    def expand(self) -> Tensor:
        scale, zero = self.scale_and_zero.transpose(0, 1).float().split(1, dim=-1)  # (O, G, 1)
        codes = unpack(self.codes, 4).float().view(*scale.shape[:2], -1)
        return torch.addcmul(zero, codes, scale).flatten(1)


class Int8Weights(Kernel):
    """`torch._weight_int8pack_mm`: one scale a row, codes around 0."""

    dtype, many = torch.bfloat16, 16

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__()
        scheme = _rows(matrix)
        self.register_buffer("codes", matrix.unpacked())
        self.register_buffer("scale", scheme.scale.flatten().to(self.dtype))

    def multiply(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.codes, self.scale)

    def expand(self) -> Tensor:
        return self.codes.float().mul_(self.scale.float()[:, None])


class Int8Products(Kernel):
    """`quantized.linear_dynamic`: FP32 in and out, integers between, a range for each vector.

    Without VNNI instructions the kernel adds pairs of products in 16 bits. They overflow unless
    either the weights or the vectors keep to 7 bits; better the weights, on a `product_grid`.
    """

    dtype, many = torch.float32, math.inf

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__()
        scale = _rows(matrix).scale.flatten().double()
        zeros = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():  # torch means to remove such tensors; `available` looks
            warnings.simplefilter("ignore", UserWarning)
            weight = torch._make_per_channel_quantized_tensor(matrix.unpacked(), scale, zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(weight, None)
        self.register_buffer("sums", matrix.expand().sum(1), persistent=False)  # of rows
        large = matrix.unpacked().abs().amax() > 63
        self.seven_bits = bool(large) and products_bits() == 7  # of vectors

    def multiply(self, x: Tensor) -> Tensor:
        if len(x) == 1:  # its range is its own as it is
            return torch.ops.quantized.linear_dynamic(x, self.packed, self.seven_bits)
        grid = affine(*x.aminmax(dim=1, keepdim=True), 7 if self.seven_bits else 8)
        # Whole numbers: torch's own grid then holds them as they are
        codes = grid.codes(x).to(x.dtype)
        y = torch.ops.quantized.linear_dynamic(codes, self.packed, self.seven_bits)
        return y.addcmul_(grid.zero, self.sums, value=-1).mul_(grid.scale)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Show the packed codes among the tensors, so that their bytes are counted."""
        weight, _ = torch.ops.quantized.linear_unpack(self.packed)
        destination[f"{prefix}codes"] = weight.int_repr()
        destination[f"{prefix}scale"] = weight.q_per_channel_scales().float()


def products_bits() -> int:
    """Bits for weights of `Int8Products` on this processor, so that vectors may have 8."""
    return 8 if torch.cpu.get_capabilities().get("avx512_vnni", False) else 7


def product_grid(low: Tensor, high: Tensor, bits: int) -> Grid:
    """`symmetric` for weights of `Int8Products`: where 7 bits are needed, stored as 8."""
    return replace(symmetric(low, high, bits - 8 + products_bits()), bits=bits)


KERNELS = {kind.__name__: kind for kind in (Int4Weights, Int8Weights, Int8Products)}


def _grid(matrix: QuantizedMatrix, bits: int) -> Grid:
    good = matrix.kind is Grid and matrix.bits == bits and matrix.columns is None
    where = matrix.codes.device.type
    require(where == "cpu", f"the kernel runs on the processor, and the codes are on {where}")
    require(good, f"the kernel needs {bits}-bit codes on a grid and no scaled columns")
    return matrix.scheme


def _rows(matrix: QuantizedMatrix) -> Grid:
    scheme = _grid(matrix, 8)
    require(
        matrix.symmetric_rows,
        'the kernel needs a symmetric grid a row: group="row", mapping=symmetric',
    )
    return scheme


@lru_cache
def available(name: str) -> bool:
    """Whether this torch computes with the kernel on this processor, found by trying it once."""
    require_known("kernel", name, KERNELS)
    bits = 4 if name == "Int4Weights" else 8
    codes = torch.arange(32 * 32).view(32, 1, 32) * 7 % 15 - 7
    matrix = QuantizedMatrix(codes.to(torch.int8), Grid(bits, torch.ones(32, 1, 1)), 32)
    try:
        kernel = KERNELS[name](matrix)
        x = torch.arange(32.0)[None]
        expected = x @ matrix.expand().T
        return torch.allclose(kernel(x.to(kernel.dtype)).float(), expected, rtol=0.02, atol=20)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def kernel(linear: QuantizedLinear, name: str) -> nn.Module:
    """The layer through a kernel by name, or the plain layer where torch has none for it here.

    Raises ValueError for an unknown name, and for codes that the kernel cannot read.
    """
    require_known("kernel", name, KERNELS)
    return KERNELS[name](linear.matrix) if available(name) else linear

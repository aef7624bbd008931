"""torch's own kernels for packed weights on a processor.

    Int4Weights    4-bit codes and BF16 vectors: under a third of BF16's bytes are read
    Int8Weights    8-bit codes and BF16 vectors
    Int8Products   8-bit codes and 8-bit vectors: integer arithmetic (see `product_grid`)

Each is made from a `QuantizedMatrix` and computes with the same codes. The first two round scales
and vectors to BF16, the third rounds vectors to 8 bits; their tests say how far that goes.

The third stays ahead of FP32 with many vectors; each is first rounded on a grid of its own, since
one large vector would spoil a range that all share.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from companion.checks import require
from companion.quantization.grids import Grid, affine, symmetric
from companion.quantization.layers import QuantizedMatrix
from companion.quantization.packed import Kernel, on_grid, on_rows
from companion.quantization.packing import unpack

GROUPS = (32, 64, 128, 256)  # of inputs, that the 4-bit kernel takes
ROWS = 16  # it takes rows by so many


class Int4Weights(Kernel):
    """`aten._weight_int4pack_mm_for_cpu`: scale x (code - 8) + zero, in groups of inputs.

    The kernel's order of codes is its own, so they are kept in plain order too, to expand them.
    """

    dtype, many = torch.bfloat16, 16

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__()
        scheme = on_grid(matrix, 4)
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
        scheme = on_rows(matrix)
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
        scale = on_rows(matrix).scale.flatten().double()
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

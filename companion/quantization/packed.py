"""A linear layer on packed codes: what every fast kernel shares.

Kernels are made for few vectors, when reading the weight is the wait. Many vectors share the
reading, and then most kernels expand the weight once and multiply in FP32; `many` says when.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from companion.checks import require
from companion.quantization.grids import Grid
from companion.quantization.layers import QuantizedMatrix


class Kernel(nn.Module):
    """A linear layer that multiplies a few vectors by packed codes, and many by the full weight."""

    dtype: torch.dtype  # of vectors that the kernel takes, and gives
    many: float  # from this many vectors on, the weight is expanded

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


def on_grid(matrix: QuantizedMatrix, bits: int) -> Grid:
    """The grid of a matrix that a kernel can read. Raises ValueError for any other."""
    good = matrix.kind is Grid and matrix.bits == bits and matrix.columns is None
    where = matrix.codes.device.type
    require(where == "cpu", f"the kernel runs on the processor, and the codes are on {where}")
    require(good, f"the kernel needs {bits}-bit codes on a grid and no scaled columns")
    return matrix.scheme


def on_rows(matrix: QuantizedMatrix) -> Grid:
    """The same, of 8 bits and one scale a row."""
    scheme = on_grid(matrix, 8)
    require(
        matrix.symmetric_rows,
        'the kernel needs a symmetric grid a row: group="row", mapping=symmetric',
    )
    return scheme


def steps_and_lowest(matrix: QuantizedMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit codes 0 to 15 (O, I), scale (O, G) and what code 0 stands for (O, G).

    Raises ValueError unless each row has scales of its own.
    """
    scheme = on_grid(matrix, 4)
    rows = len(scheme.scale) == matrix.shape[0]
    require(rows, "the kernel needs scales for each row; do not share a grid between rows")
    lowest = scheme.numbers(torch.full_like(scheme.scale, -8))
    return matrix.unpacked() + 8, scheme.scale[..., 0], lowest[..., 0]

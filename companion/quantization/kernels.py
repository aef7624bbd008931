"""Every fast kernel by its name, and whether it runs here.

torch's own (`torch_kernels`) and compiled ones (`compiled_kernels`), each made from a
`QuantizedMatrix`, compute with the same codes; what they round besides, their tests say. Where this
processor lacks one, `kernel` returns the plain layer.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from numba.core.errors import NumbaError
from torch import nn

from companion.checks import require_known
from companion.quantization.compiled_kernels import Int4Compiled, Int8Compiled
from companion.quantization.grids import Grid
from companion.quantization.layers import QuantizedLinear, QuantizedMatrix
from companion.quantization.torch_kernels import Int4Weights, Int8Products, Int8Weights

_KINDS = (Int4Weights, Int8Weights, Int8Products, Int4Compiled, Int8Compiled)
KERNELS = {kind.__name__: kind for kind in _KINDS}


def bits_of(name: str) -> int:
    """How many bits the codes of a kernel have."""
    require_known("kernel", name, KERNELS)
    return 4 if name.startswith("Int4") else 8


@lru_cache
def available(name: str) -> bool:
    """Whether a kernel computes rightly on this processor, found by trying it once."""
    bits = bits_of(name)
    codes = torch.arange(32 * 32).view(32, 1, 32) * 7 % 15 - 7
    matrix = QuantizedMatrix(codes.to(torch.int8), Grid(bits, torch.ones(32, 1, 1)), 32)
    try:
        kernel = KERNELS[name](matrix)
        x = torch.arange(32.0)[None]
        expected = x @ matrix.expand().T
        return torch.allclose(kernel(x.to(kernel.dtype)).float(), expected, rtol=0.02, atol=20)
    except (RuntimeError, NotImplementedError, AttributeError, ValueError, NumbaError):
        return False


def kernel(linear: QuantizedLinear, name: str) -> nn.Module:
    """The layer through a kernel by name, or the plain layer where there is none for it here.

    Raises ValueError for an unknown name, and for codes that the kernel cannot read.
    """
    require_known("kernel", name, KERNELS)
    return KERNELS[name](linear.matrix) if available(name) else linear

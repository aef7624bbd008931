"""Layers on the compiled products: weights in the order in which `compiled` reads them.

    Int4Compiled   4-bit codes, scales for 32 inputs or a multiple; vectors are rounded to 7 bits
    Int8Compiled   8-bit codes, a scale a row; vectors stay in FP32, so that nothing else is rounded

They are for processors on which torch has no such kernel or a slow one: without AVX-512 it reads
4-bit codes in BF16, which such a processor has to imitate.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor

from companion.checks import require
from companion.quantization import compiled
from companion.quantization.layers import QuantizedMatrix
from companion.quantization.packed import Kernel, on_rows, steps_and_lowest


def threads() -> int:
    """Set numba's number of threads to torch's, at most the machine's, and return it."""
    wanted = torch.get_num_threads()
    count = min(wanted, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(count)
    if torch.get_num_threads() != wanted:  # starting numba's threads changes it, where both use
        torch.set_num_threads(wanted)  # one OpenMP
    return count


def unsigned(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as an array; int16 becomes uint16, which torch hardly supports."""
    array = tensor.numpy()
    return array.view(np.uint16) if tensor.dtype == torch.int16 else array


class Compiled(Kernel):
    """A weight as a tuple of tensors, multiplied by one vector after the other."""

    dtype, many = torch.float32, 16
    names: tuple[str, ...]  # of the tensors
    product: Callable[..., None]  # of the arrays and a vector, into a third

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The weight as `compiled.product` takes it; the same memory."""
        return tuple(unsigned(getattr(self, name)) for name in self.names)

    def multiply(self, x: Tensor) -> Tensor:
        """Vectors (N, I) times the packed weight, (N, O). No gradient passes."""
        shares = threads()
        arrays, vectors = self.arrays, x.detach().contiguous().numpy()
        out = np.empty((len(x), self.outputs), np.float32)
        for vector, row in zip(vectors, out, strict=True):
            self.product(arrays, vector, row, shares)
        return torch.from_numpy(out)


class Int4Compiled(Compiled):
    """Four inputs of one output a word, output after output."""

    names = ("codes", "scale", "lowest")
    product = staticmethod(compiled.four_bits)

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__()
        self.outputs, inputs = matrix.shape
        steps, scale, lowest = steps_and_lowest(matrix)
        group, shared = inputs // scale.shape[1], compiled.GROUP
        fits = group % shared == 0
        shapes = f"{self.outputs} rows in groups of {group}"
        require(fits, f"{shapes} do not suit the kernel: groups by {shared}")
        fours = steps.short().T.unflatten(0, (-1, 4)).unbind(1)  # by place in the word: (I/4, O)
        codes = sum(four << 4 * place for place, four in enumerate(fours))
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale.T.contiguous())
        self.register_buffer("lowest", lowest.T.contiguous())

    def expand(self) -> Tensor:
        threads()
        transposed = np.empty((4 * len(self.codes), self.outputs), np.float32)
        compiled.expanded(self.arrays, transposed)
        return torch.from_numpy(transposed).T


class Int8Compiled(Compiled):
    """Codes as they are."""

    names = ("codes", "scale")
    product = staticmethod(compiled.eight_bits)

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__()
        self.outputs = matrix.shape[0]
        self.register_buffer("scale", on_rows(matrix).scale.flatten())
        self.register_buffer("codes", matrix.unpacked())

    def expand(self) -> Tensor:
        return self.codes.float().mul_(self.scale[:, None])

"""torch's kernels for packed weights on a CUDA GPU: those that torchao calls there too.

    Int4Cuda    4-bit codes and BF16 vectors: under a third of BF16's bytes are read
    Int8Cuda    8-bit codes and 8-bit vectors: integer products

Each is made from the `QuantizedMatrix` that the processor's kernels are made from, and computes
with the same codes. A GPU reads memory so fast that starting a kernel, some microseconds, takes
longer than reading a small matrix: few bits pay where matrices are large and vectors few. What was
measured stands in the study `gpu_kernels`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from companion.checks import require, require_known
from companion.model import LanguageModel
from companion.quantization.grids import minimum, symmetric
from companion.quantization.layers import QuantizedLinear, QuantizedMatrix
from companion.quantization.packed import Kernel, on_grid, on_rows
from companion.quantization.packing import unpack
from companion.quantization.replacing import Coding, quantize
from companion.surgery import chosen, copied

ROWS, INPUTS = 8, 16  # the 4-bit kernel takes outputs by so many, and inputs in tiles of so many
GROUPS = (32, 64, 128, 256)  # of inputs, that it takes
TILES = (8, 4, 2)  # tiles packed side by side: the most that divide the inputs
FEWEST = 32  # vectors in one integer product: fewer are filled up with zeros


class CudaKernel(Kernel):
    """A `Kernel` on a GPU: vectors are BF16, and many meet the expanded weight in BF16."""

    dtype, bits = torch.bfloat16, 8

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (..., I) to (..., O), in the type they came in."""
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        few = len(rows) < self.many
        y = self.multiply(rows) if few else linear(rows, self.expand().to(self.dtype))
        return y.to(x.dtype).view(*x.shape[:-1], -1)


class Int4Cuda(CudaKernel):
    """`aten._weight_int4pack_mm`: scale x (code - 8) + zero, in groups of inputs."""

    many, bits = 256, 4

    def __init__(self, matrix: QuantizedMatrix, device: torch.device | str = "cuda") -> None:
        super().__init__()
        scheme = on_grid(matrix, 4)
        outputs, self.group = matrix.shape[0], matrix.inputs // scheme.scale.shape[1]
        tiles = [count for count in TILES if matrix.inputs % (count * INPUTS) == 0]
        fits = outputs % ROWS == 0 and self.group in GROUPS and len(scheme.scale) == outputs
        shapes = f"{outputs} rows of {matrix.inputs} in groups of {self.group}"
        wanted = f"rows by {ROWS}, inputs by {TILES[-1] * INPUTS}, groups of {GROUPS}"
        require(fits and bool(tiles), f"{shapes} do not suit the kernel: {wanted}")
        middle = scheme.numbers(torch.zeros_like(scheme.scale))  # what code 0 stands for
        both = torch.cat([scheme.scale, middle], dim=-1).transpose(0, 1).contiguous()  # (G, O, 2)
        unsigned = (matrix.unpacked() + 8).to(device=device, dtype=torch.uint8)
        pairs = unsigned[:, ::2] << 4 | unsigned[:, 1::2]
        self.register_buffer("packed", torch._convert_weight_to_int4pack(pairs, tiles[0]))
        self.register_buffer("scale_and_zero", both.to(device=device, dtype=self.dtype))
        self.register_buffer("codes", matrix.codes.to(device))  # in plain order, to expand them

    def multiply(self, x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm(x, self.packed, self.group, self.scale_and_zero)

    def expand(self) -> Tensor:
        scale, zero = self.scale_and_zero.transpose(0, 1).float().split(1, dim=-1)  # (O, G, 1)
        codes = unpack(self.codes, 4).float().view(*scale.shape[:2], -1)
        return torch.addcmul(zero, codes, scale).flatten(1)


class Int8Cuda(CudaKernel):
    """`torch._int_mm`: each vector rounded to 8 bits on a range of its own, whole numbers between.

    LLM.int8(), arXiv:2208.07339, section 2.1, without its separate path for outliers.
    """

    many = math.inf

    def __init__(self, matrix: QuantizedMatrix, device: torch.device | str = "cuda") -> None:
        super().__init__()
        scheme = on_rows(matrix)
        outputs, inputs = matrix.shape
        fits = outputs % 8 == 0 and inputs % 8 == 0
        require(fits, f"{outputs} rows of {inputs} do not suit the kernel: both by 8")
        self.register_buffer("codes", matrix.unpacked().to(device))
        self.register_buffer("scale", scheme.scale.flatten().float().to(device))

    def multiply(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 127
        codes = (x / scale).round_().to(torch.int8)
        filled = pad(codes, (0, 0, 0, max(0, FEWEST - len(codes))))
        whole = torch._int_mm(filled, self.codes.T)[: len(codes)]
        return (whole * scale * self.scale).to(self.dtype)

    def expand(self) -> Tensor:
        return self.codes.float() * self.scale[:, None]


CUDA_KERNELS = {kind.__name__: kind for kind in (Int4Cuda, Int8Cuda)}
CODINGS = {
    "Int4Cuda": Coding(bits=4, group=32, mapping=minimum),
    "Int8Cuda": Coding(bits=8, mapping=symmetric),
}


def on_cuda(model: LanguageModel, name: str) -> nn.Module:
    """A plain model on a GPU in BF16, the layers of its blocks quantized and on a kernel by name.

    Embedding and head stay in BF16. Raises ValueError for an unknown kernel, where there is no
    CUDA GPU, and for layers that the kernel cannot take; the model given stays as it was.
    """
    require_known("kernel", name, CUDA_KERNELS)
    require(torch.cuda.is_available(), f"{name} needs a CUDA GPU; there is none here")
    coding = CODINGS[name]
    options = {"group": coding.group, "mapping": coding.mapping, "head": None}
    quantized = quantize(copied(model).cpu().float(), coding.bits, **options)
    layers = chosen(quantized, lambda _, module: isinstance(module, QuantizedLinear))
    for layer, module in layers.items():
        quantized.set_submodule(layer, CUDA_KERNELS[name](module.matrix))
    return _in_bf16(quantized)


def _in_bf16(model: nn.Module) -> nn.Module:
    """Whatever is not inside a kernel, in BF16 on the GPU; the kernels keep their types."""
    kernels = chosen(model, lambda _, module: isinstance(module, CudaKernel))
    for name in kernels:
        model.set_submodule(name, nn.Identity())
    model = model.to(device="cuda", dtype=torch.bfloat16)
    for name, kernel in kernels.items():
        model.set_submodule(name, kernel)
    return model

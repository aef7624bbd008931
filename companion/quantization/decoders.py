"""Models made for writing: from a plain model to a fast one, by the name of a kernel."""

from __future__ import annotations

from companion.model import LanguageModel
from companion.quantization.compiled_kernels import Compiled
from companion.quantization.compiled_model import CompiledModel
from companion.quantization.fused import FusedModel, fused
from companion.quantization.grids import minimum, symmetric
from companion.quantization.kernels import KERNELS, available, bits_of
from companion.quantization.replacing import Coding, quantize
from companion.quantization.torch_kernels import product_grid


def on_kernel(model: LanguageModel, name: str) -> FusedModel:
    """A plain model quantized in the bits that a kernel needs, then rewritten by `fused`.

    Four bits are on a grid with a free minimum in groups of 32, as in the blocks of SmolLM2's file;
    head and embedding have eight, a scale a row. Raises ValueError as `quantize` and `fused` do.
    """
    head = head_of(name)
    rows = Coding(bits=8, mapping=product_grid if head == "Int8Products" else symmetric)
    if bits_of(name) == 4:
        quantized = quantize(model, 4, group=32, mapping=minimum, head=rows)
    else:
        quantized = quantize(model, 8, mapping=rows.mapping, head=rows)
    kind = CompiledModel if issubclass(KERNELS[name], Compiled) else FusedModel
    return fused(quantized, name, head=head, kind=kind)


def head_of(name: str) -> str:
    """The kernel with 8 bits for the head of a model whose blocks run on the one named."""
    if bits_of(name) == 8:
        return name
    if issubclass(KERNELS[name], Compiled):
        return "Int8Compiled"
    return "Int8Products" if available("Int8Products") else "Int8Weights"

"""A model rewritten for decoding: fewer and larger steps, on kernels that read packed codes.

A token of SmolLM2 passes 210 linear layers and, in the readable model, some forty calls from Python
a block. Each call costs microseconds whatever it computes, so that small matrices wait for Python:

    query, key and value are one matrix, gate and up another: 4 products a block instead of 7
    queries and keys are turned together, by tables made once: 3 calls instead of 12
    a norm is six calls instead of nine, and casts to the kernels' number format once

A long prompt is read in FP32, through expanded weights, where the kernel is made for few vectors.

The result is used as the model it came from, and computes the same but for that number format.

Axes: B batch, T positions, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from companion.checks import require
from companion.model import Block, KeyValueCache, LanguageModel, RMSNorm, attend
from companion.quantization.grids import Grid
from companion.quantization.kernels import available, kernel
from companion.quantization.layers import QuantizedEmbedding, QuantizedLinear, QuantizedMatrix
from companion.surgery import chosen, copied


def joined(linears: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """One layer whose outputs are those of several, one after another; their codes as they are.

    Raises ValueError unless all are quantized in the same way and read vectors of the same width.
    """
    matrices = [linear.matrix for linear in linears]
    first = matrices[0]
    grids = all(matrix.kind is Grid for matrix in matrices)
    require(grids, "only codes on a grid can be joined, not floating-point formats or tables")
    alike = {(m.kind, m.bits, m.inputs, m.scheme.scale.shape[1:], m.columns is None)
             for m in matrices}  # fmt: skip
    require(len(alike) == 1 and first.columns is None, "the layers are not quantized alike")
    states = [m.state_dict() for m in matrices]
    same = all(state.keys() == states[0].keys() for state in states)
    require(same, "the layers are not quantized alike: their grids have other mappings")
    rows = all(len(m.scheme.scale) == m.shape[0] for m in matrices)
    require(rows, "layers are joined row by row; use a grid a row or group of inputs")
    tensors = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    return QuantizedLinear(QuantizedMatrix.of(first.kind, first.bits, first.inputs, tensors))


class Norm(nn.Module):
    """`RMSNorm` in fewer steps, cast to a number format at the end."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        epsilon = torch.tensor(norm.epsilon, device=norm.weight.device)
        self.register_buffer("epsilon", epsilon, persistent=False)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        mean_square = torch.addcmul(self.epsilon, size, size, value=1 / x.shape[-1])
        return (x * mean_square.rsqrt_()).mul_(self.weight).to(dtype)


class FusedBlock(nn.Module):
    """A `Block` of four products. The sum that runs through the blocks stays in FP32."""

    def __init__(self, block: Block, name: str) -> None:
        super().__init__()
        attention, mlp = block.attention, block.mlp
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        parts = (attention.query, attention.key, attention.value)
        self.query_key_value = kernel(joined(parts), name)
        self.out = kernel(attention.out, name)
        self.gate_up = kernel(joined((mlp.gate, mlp.up)), name)
        self.down = kernel(mlp.down, name)
        self.attention_norm, self.mlp_norm = Norm(block.attention_norm), Norm(block.mlp_norm)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: KeyValueCache | None
    ) -> Tensor:
        heads, turning = self.heads, self.heads + self.kv_heads
        every = self.query_key_value(self.attention_norm(x, cos.dtype))
        every = every.unflatten(-1, (turning + self.kv_heads, -1)).transpose(1, 2)
        turned, value = every[:, :turning], every[:, turning:]
        half = turned.shape[-1] // 2
        turned = torch.addcmul(turned * cos, turned.roll(half, -1), sin)
        query, key = turned[:, :heads], turned[:, heads:]
        if cache is not None:
            key, value = (held.to(cos.dtype) for held in cache.extend(layer, key, value))
        x = x + self.out(attend(query, key, value).transpose(1, 2).flatten(-2))
        gate, up = self.gate_up(self.mlp_norm(x, cos.dtype)).chunk(2, dim=-1)
        return x + self.down(silu(gate) * up)


class FusedModel(nn.Module):
    """`model(tokens, cache) -> logits`, as `LanguageModel`, in the number format of its kernels."""

    def __init__(self, model: LanguageModel, name: str, head: str) -> None:
        super().__init__()
        model = copied(model)
        self.config = model.config
        self.embedding, self.norm = model.embedding, Norm(model.norm)
        self.blocks = nn.ModuleList(FusedBlock(block, name) for block in model.blocks)
        self.head = kernel(model.head, head)
        down = self.blocks[0].down
        self.dtype = getattr(down, "dtype", torch.float32)  # of vectors, when they are few
        self.many = getattr(down, "many", math.inf)
        below = -model.sin[:, : model.sin.shape[1] // 2]  # the first half of a vector gets -sin
        sin = torch.cat([below, model.sin[:, below.shape[1] :]], dim=1)
        self.register_buffer("cos", model.cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    _check = LanguageModel._check

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedModel:
        like = fn(torch.empty(0))
        same = like.dtype == torch.float32 and like.is_cpu
        where = f"asked for: {like.dtype} on {like.device}"
        require(same, f"a fused model stays in its number formats on the processor; {where}")
        return self

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits (B, T, vocab) for token ids (B, T), which continue what the cache holds.

        Raises ValueError as `LanguageModel` does.
        """
        start = 0 if cache is None else cache.length
        self._check(tokens, start)
        stop = start + tokens.shape[1]
        dtype = self.dtype if tokens.numel() < self.many else torch.float32
        cos, sin = self.cos[start:stop].to(dtype), self.sin[start:stop].to(dtype)
        x = self.embedding(tokens).float()
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, layer, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        few = tokens.numel() < getattr(self.head, "many", math.inf)
        return self.head(self.norm(x, getattr(self.head, "dtype", dtype) if few else dtype))


def fused(
    model: LanguageModel,
    name: str,
    *,
    head: str = "Int8Weights",
    kind: type[FusedModel] = FusedModel,
) -> FusedModel:
    """A quantized model rewritten for decoding, on the kernel named (see `kernels`).

    `kind` is what it becomes: `CompiledModel` if both kernels are compiled.

    The embedding keeps its own codes, so a tied head is stored twice. Raises ValueError for a model
    that is not quantized, for codes that a kernel cannot read (the head's must suit one too), and
    where there is no such kernel.
    """
    ends = isinstance(model.head, QuantizedLinear) and isinstance(
        model.embedding, QuantizedEmbedding
    )
    layers = chosen(model, lambda name, module: isinstance(module, (nn.Linear, QuantizedLinear)))
    inside = all(isinstance(layer, QuantizedLinear) for layer in layers.values())
    require(ends and inside, "the model is not quantized from embedding to head; quantize it first")
    for one in (name, head):
        require(available(one), f"there is no kernel {one} on this processor; use the plain model")
    return kind(model, name, head)

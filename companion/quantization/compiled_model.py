"""A fused model that passes a token through all its blocks in one call of compiled code.

The weights of all blocks lie in one tensor each, of which the blocks' own layers show a part.
Anything but one token of one text (a prompt, a batch, another kind of cache) goes the way of
`FusedModel`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from companion.checks import require
from companion.decoding import Cache, cache_for
from companion.model import KeyValueCache, LanguageModel
from companion.quantization import compiled
from companion.quantization.compiled_kernels import Compiled, threads, unsigned
from companion.quantization.fused import FusedModel

PRODUCTS = ("query_key_value", "out", "gate_up", "down")  # of a block


class CompiledModel(FusedModel):
    """`model(tokens, cache) -> logits`, on compiled kernels."""

    def __init__(self, model: LanguageModel, name: str, head: str) -> None:
        super().__init__(model, name, head)
        self.cache_shape = cache_for(self, capacity=1).shape
        compiled_all = [isinstance(layer, Compiled) for layer in (self.blocks[0].down, self.head)]
        require(all(compiled_all), f"{name} and {head} are not both compiled kernels")
        self.views: tuple | None = None  # its tensors as arrays, made when the first token comes
        for product in PRODUCTS:
            kernels = [getattr(block, product) for block in self.blocks]
            for tensor in kernels[0].names:
                whole = torch.stack([getattr(kernel, tensor) for kernel in kernels])
                self.register_buffer(f"{product}_{tensor}", whole, persistent=False)
                for kernel, part in zip(kernels, whole, strict=True):
                    setattr(kernel, tensor, part)

        pairs = [(block.attention_norm, block.mlp_norm) for block in self.blocks]
        whole = torch.stack([torch.stack([norm.weight for norm in pair]) for pair in pairs])
        self.register_buffer("norms", whole.detach(), persistent=False)  # (L, 2, W)
        for pair, parts in zip(pairs, self.norms, strict=True):
            for norm, part in zip(pair, parts, strict=True):
                norm.weight = nn.Parameter(part, requires_grad=False)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits (B, T, vocab) for token ids (B, T), which continue what the cache holds.

        Raises ValueError as `LanguageModel` does, and for a cache made for another model.
        """
        plain = type(cache) is Cache and cache.keys.dtype == torch.float32 and cache.keys.is_cpu
        if tokens.shape != (1, 1) or not plain:
            return super().forward(tokens, cache)
        shape = (*cache.shape[:3], 1, cache.shape[4])
        expected = f"the cache is for (layers, batch, heads, 1, width) {shape}"
        require(shape == self.cache_shape, f"{expected}; the model and one text {self.cache_shape}")
        self._check(tokens, cache.length)
        limit = cache.capacity
        require(cache.length < limit, f"{limit + 1} positions exceed the cache's {limit}")
        self.views = self.views or self._view()
        x = self.embedding(tokens).float()
        cos, sin, *weights = self.views
        angles = (cos[cache.length], sin[cache.length])
        held = (cache.keys[:, 0].numpy(), cache.values[:, 0].numpy())
        compiled.token(x.view(-1).numpy(), angles, held, cache.length, *weights, threads())
        cache.advance(1)
        return self.head(self.norm(x, torch.float32))

    def _view(self) -> tuple:
        """Angles, norms, epsilon, weights of attention and of MLP, as `compiled` takes them."""
        half = self.cos.shape[1] // 2
        return (
            self.cos[:, half:].contiguous().numpy(),
            self.sin[:, half:].contiguous().numpy(),
            self.norms.numpy(),
            np.float32(self.norm.epsilon.item()),
            (self._arrays("query_key_value"), self._arrays("out")),
            (self._arrays("gate_up"), self._arrays("down")),
        )

    def _arrays(self, product: str) -> tuple[np.ndarray, ...]:
        names = getattr(self.blocks[0], product).names
        return tuple(unsigned(getattr(self, f"{product}_{name}")) for name in names)

    def __getstate__(self) -> dict:
        """What a copy gets: it looks at its own memory."""
        return {**self.__dict__, "views": None}

"""Decoding: write a text token by token, and keep what would be computed again.

The keys and values of positions already read do not change, so they are kept in a cache: a new
token costs one pass over one position instead of one over all.

Axes: B batch, K key-value heads, T new positions, C capacity, D head width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from companion.checks import require, require_number, require_whole
from companion.model import LanguageModel, ModelConfig


class Positions:
    """Which positions a cache holds, and what may be put behind them."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int | None) -> None:
        """Room for `capacity` positions (the model's context if None). ValueError if impossible."""
        capacity = config.context if capacity is None else capacity
        require_whole("batch", batch)
        require_whole("capacity", capacity)
        limit = config.context
        require(capacity <= limit, f"capacity {capacity} exceeds the model's context of {limit}")
        self.shape = (config.layers, batch, config.kv_heads, capacity, config.head_width)
        self.capacity, self.length = capacity, 0

    def stop(self, key: Tensor, value: Tensor) -> int:
        """Where new (B, K, T, D) would end. Raises ValueError if they do not fit."""
        stop, given = self.length + key.shape[2], tuple(key.shape[:2])
        require(stop <= self.capacity, f"{stop} positions exceed the cache's {self.capacity}")
        room = self.shape[1:3]
        require(given == room, f"keys for (batch, heads) {given} do not fit a cache for {room}")
        same = f"keys {tuple(key.shape)} and values {tuple(value.shape)} differ in shape"
        require(key.shape == value.shape, same)
        return stop

    def advance(self, positions: int) -> None:
        """Count positions as held: the model calls this after its last layer."""
        self.length += positions

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on."""
        inside = isinstance(length, int) and 0 <= length <= self.length
        require(inside, f"cannot rewind to {length}; the cache holds {self.length} positions")
        self.length = length


class Cache(Positions):
    """Keys and values of all layers, each in one contiguous tensor (B, K, C, D) made beforehand."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch: int = 1,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Room for `capacity` positions (the model's context if None). ValueError if impossible."""
        super().__init__(config, batch, capacity)
        self.keys = torch.zeros(self.shape, dtype=dtype, device=device)
        self.values = torch.zeros(self.shape, dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put new keys and values (B, K, T, D) behind the old ones; views of all so far."""
        self.stop(key, value)
        return self._put(self.keys[layer], key), self._put(self.values[layer], value)

    def _put(self, held: Tensor, new: Tensor) -> Tensor:
        """New (B, K, T, D) behind what one layer holds, (B, K, C, D); a view of all so far."""
        held.narrow(2, self.length, new.shape[2]).copy_(new)  # fewer calls than slices are
        return held.narrow(2, 0, self.length + new.shape[2])


def cache_for(model: LanguageModel, *, batch: int = 1, capacity: int | None = None) -> Cache:
    """An empty cache of the model's device and type: that of its vectors, or else its norms."""
    like = model.norm.weight
    dtype = getattr(model, "dtype", like.dtype)
    return Cache(model.config, batch=batch, capacity=capacity, dtype=dtype, device=like.device)


def choose(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    random: torch.Generator | None = None,
) -> Tensor:
    """One token id a row, (B,), from logits (B, V): the best, or drawn at a temperature.

    Temperature 0 takes the best (greedy); `top_k` draws among the k best only.
    """
    if temperature == 0:
        return logits.argmax(-1)
    require_number("temperature", temperature, above=0)
    logits = logits.float() / temperature
    if top_k is not None:
        require_whole("top_k", top_k)
        limit = min(top_k, logits.shape[-1])
        logits = logits.masked_fill(logits < logits.topk(limit).values[:, -1:], -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=random).squeeze(-1)


def generate(
    model: LanguageModel,
    tokens: Tensor,
    new: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    cached: bool = True,
) -> Tensor:
    """Continue a prompt (B, T) by `new` tokens: ids (B, T + new), the prompt included.

    Without a cache every step reads the whole text again: the slow obvious version. Raises
    ValueError where prompt and new tokens exceed the context.
    """
    require_whole("new", new)
    require(
        tokens.ndim == 2, f"the prompt has shape {tuple(tokens.shape)}; (batch, time) is expected"
    )
    total, limit = tokens.shape[1] + new, model.config.context
    require(tokens.shape[1] >= 1, "the prompt is empty; begin with the tokenizer's end token")
    require(total <= limit, f"{tokens.shape[1]} + {new} tokens exceed the context of {limit}")
    tokens = tokens.to(model.norm.weight.device)
    random = torch.Generator(tokens.device).manual_seed(seed)
    cache = cache_for(model, batch=len(tokens), capacity=total) if cached else None
    unread = tokens
    with torch.inference_mode():
        for _ in range(new):
            logits = model(unread if cached else tokens, cache)[:, -1]
            unread = choose(logits, temperature=temperature, top_k=top_k, random=random)[:, None]
            tokens = torch.cat([tokens, unread], dim=1)
    return tokens.clone()  # an ordinary tensor, which may be trained on


class TokenByToken(nn.Module):
    """A model that reads a text as it would have written it: through a cache, one token a call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, vocab) of ids (B, T)."""
        cache = cache_for(self.model, batch=len(tokens), capacity=tokens.shape[1])
        return torch.cat([self.model(token, cache) for token in tokens.split(1, dim=1)], dim=1)

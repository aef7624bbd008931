"""A Llama-style decoder: the one model of the course.

Tokens become vectors; each block lets every position read the earlier ones (attention) and then
works on each position alone (MLP); a last matrix turns vectors into scores for the next token.
The same class is trained from scratch (`tiny`) and hosts the weights of SmolLM2-135M.

Axes: B batch, T new positions, S all positions seen so far, H query heads, K key-value heads,
D head width, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from companion.checks import require, require_number, require_whole


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model. Raises ValueError, naming value and limit, if no such model exists."""

    vocab: int  # number of different tokens
    context: int  # most positions the model may look back over, itself included
    layers: int  # blocks
    heads: int  # query heads a block
    kv_heads: int  # key-value heads a block; divides `heads`
    width: int  # numbers in the vector of one position
    hidden: int  # neurons of the MLP
    rotary_base: float = 10_000.0  # the slowest rotary angle turns once in about 2 pi x this
    norm_epsilon: float = 1e-5
    tied: bool = True  # the output head is the embedding matrix

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "heads", "kv_heads", "width", "hidden"):
            require_whole(name, getattr(self, name))
        for name in ("rotary_base", "norm_epsilon"):
            require_number(name, getattr(self, name), above=0)
        require(isinstance(self.tied, bool), f"tied is {self.tied!r}; it must be True or False")
        groups = f"{self.heads} query heads do not divide over {self.kv_heads} key-value heads"
        require(
            self.width % self.heads == 0, f"width {self.width} / heads {self.heads} is no integer"
        )
        require(self.heads % self.kv_heads == 0, groups)
        odd = f"head width {self.head_width} is odd; rotary positions turn pairs of numbers"
        require(self.head_width % 2 == 0, odd)

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class KeyValueCache(Protocol):
    """What `LanguageModel` asks of a cache. `companion.decoding.Cache` is the plain one."""

    length: int  # positions held

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, K, T, D) of one layer; give back all, (B, K, S, D)."""

    def advance(self, positions: int) -> None:
        """Called once a forward pass, after the last layer."""


class RMSNorm(nn.Module):
    """Scale each vector to a root mean square of 1, then by a learned weight. arXiv:1910.07467."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def rotary_angles(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (context, D): position p turns pair i by p / base^(2i/D).

    Computed in FP64 and rounded once. RoFormer, arXiv:2104.09864, with the halves layout of Llama.
    """
    pairs = torch.arange(0, config.head_width, 2, dtype=torch.float64)
    speeds = config.rotary_base ** (-pairs / config.head_width)
    angles = torch.outer(torch.arange(config.context, dtype=torch.float64), speeds)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of a (..., T, D) tensor by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention: H query heads read K key-value heads, H/K queries to each."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        kv_width = config.kv_heads * config.head_width
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, kv_width, bias=False)
        self.value = nn.Linear(config.width, kv_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: KeyValueCache | None
    ) -> Tensor:
        def split(y: Tensor, heads: int) -> Tensor:  # (B, T, heads x D) -> (B, heads, T, D)
            return y.unflatten(-1, (heads, -1)).transpose(1, 2)

        query = rotate(split(self.query(x), self.heads), cos, sin)
        key = rotate(split(self.key(x), self.kv_heads), cos, sin)
        value = split(self.value(x), self.kv_heads)
        if cache is not None:
            key, value = cache.extend(layer, key, value)
        mixed = attend(query, key, value)  # (B, H, T, D)
        return self.out(mixed.transpose(1, 2).flatten(-2))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of the last T of S positions: (B, H, T, D) from keys (B, K, S, D)."""
    new, seen = query.shape[-2], key.shape[-2]
    if new == 1:  # the newest position sees all: the queries of one group can share a matrix
        grouped = query.reshape(*key.shape[:2], -1, key.shape[-1])  # (B, K, H/K, D)
        return scaled_dot_product_attention(grouped, key, value).reshape(query.shape)
    if new == seen:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    # `is_causal` aligns its mask to the top left; new positions on a cache need the bottom right
    mask = torch.ones(new, seen, dtype=torch.bool, device=query.device).tril(seen - new)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


class MLP(nn.Module):
    """SwiGLU: `hidden` neurons, each the product of a gate and a value. arXiv:2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention, then MLP; each reads a normalised copy and adds to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: KeyValueCache | None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, layer, cache)
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """`model(tokens) -> logits`: scores for the next token at every position."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        cos, sin = rotary_angles(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """Normal weights of spread 1 / sqrt(inputs), so that sums neither fade nor grow.

        Matrices that add to the stream start smaller, for there are two a block (GPT-2's rule).
        """
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        if isinstance(module, Block):
            for last in (module.attention.out, module.mlp.down):
                std = (last.in_features * 2 * self.config.layers) ** -0.5
                nn.init.normal_(last.weight, std=std)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits (B, T, vocab) for token ids (B, T); with a cache, tokens continue what it holds.

        Raises ValueError for ids of a wrong shape or type, and beyond the context.
        """
        start = 0 if cache is None else cache.length
        self._check(tokens, start)
        stop = start + tokens.shape[1]
        cos, sin = self.cos[start:stop], self.sin[start:stop]
        x = self.embedding(tokens)  # (B, T, W)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, layer, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.head(self.norm(x))

    def _check(self, tokens: Tensor, start: int) -> None:
        shape, kind = tuple(tokens.shape), tokens.dtype
        require(tokens.ndim == 2, f"tokens have shape {shape}; (batch, time) is expected")
        require(tokens.numel() > 0, f"tokens have shape {shape}; at least one is needed")
        require(kind in (torch.int64, torch.int32), f"tokens are {kind}; int64 ids are expected")
        stop, limit = start + shape[1], self.config.context
        require(stop <= limit, f"{stop} positions exceed the context of {limit}")
        if tokens.is_cpu:  # on an accelerator this look would make it wait
            low, high = tokens.min().item(), tokens.max().item()
            limit = self.config.vocab - 1
            require(low >= 0 and high <= limit, f"ids run from {low} to {high}, not 0 to {limit}")

"""Causal attention in slices of queries: what training on a processor gains by forgetting less.

Flash attention keeps no shares and computes them again on the way back, block by block. That saves
memory, and on a GPU time. A processor with a short context is better off keeping them: the way
back then needs four products in place of five, and no exponentials. Causality halves the work, if
queries are taken in slices: positions `start` to `stop` need no key beyond `stop`.

The price is memory: the shares of a slice are kept, about half of T x T numbers a head.

Axes: B batch, T positions, H query heads, K key-value heads, G = H / K queries to each, D head
width. In a row of G T queries, those of one position lie side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from companion.checks import require, require_whole

ROWS = 64  # positions a slice: long enough for quick products, short enough to skip the future


def sliced_attention(query: Tensor, key: Tensor, value: Tensor, *, rows: int = ROWS) -> Tensor:
    """Mixed values (B, T, H, D) for queries (B, T, H, D), keys and values (B, T, K, D).

    Position t mixes the values of positions 0 to t. `rows` positions are taken at a time. Raises
    ValueError for shapes that do not belong together.
    """
    require_whole("rows", rows)
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    alike = query.ndim == 4 and key.shape == value.shape and key.ndim == 4
    fits = alike and query.shape[:2] == key.shape[:2] and query.shape[3] == key.shape[3]
    require(fits, f"{shapes} do not fit; (B, T, heads, D) are expected, B, T and D alike")
    batch, time, heads, width = query.shape
    kv_heads = key.shape[2]
    require(heads % kv_heads == 0, f"{heads} query heads do not divide over {kv_heads}")
    grouped = query.unflatten(2, (kv_heads, -1)).transpose(1, 2)  # (B, K, T, G, D)
    row = grouped.reshape(batch * kv_heads, -1, width)  # (B K, T G, D)
    flat = (x.transpose(1, 2).reshape(batch * kv_heads, time, width) for x in (key, value))
    mixed = _Sliced.apply(row, *flat, rows).view(batch, kv_heads, time, -1, width)
    return mixed.transpose(1, 2).flatten(2, 3)


class _Sliced(Function):
    """With s = softmax(q k'), o = s v and a gradient g: ds = s (g v' - sum(g o))."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, rows: int) -> Tensor:
        group, scale = query.shape[1] // key.shape[1], 1 / math.sqrt(query.shape[-1])
        mixed, kept = torch.empty_like(query), []
        for start, stop in _slices(key.shape[1], rows):
            own = slice(start * group, stop * group)
            mask = query.new_full((stop - start, stop), -math.inf).triu(start + 1)
            mask = mask.repeat_interleave(group, dim=0)
            scores = torch.baddbmm(mask, query[:, own], key[:, :stop].mT, alpha=scale)
            kept.append(scores.softmax(-1))
            mixed[:, own] = kept[-1] @ value[:, :stop]
        ctx.rows = rows
        ctx.save_for_backward(query, key, value, mixed, *kept)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, mixed, *kept = ctx.saved_tensors
        group, scale = query.shape[1] // key.shape[1], 1 / math.sqrt(query.shape[-1])
        along = (grad * mixed).sum(-1, keepdim=True)
        for_query, for_key, for_value = map(torch.zeros_like, (query, key, value))
        for shares, (start, stop) in zip(kept, _slices(key.shape[1], ctx.rows), strict=True):
            own = slice(start * group, stop * group)
            for_value[:, :stop].baddbmm_(shares.mT, grad[:, own])
            slope = grad[:, own] @ value[:, :stop].mT
            slope.sub_(along[:, own]).mul_(shares)
            for_query[:, own].baddbmm_(slope, key[:, :stop], alpha=scale)
            for_key[:, :stop].baddbmm_(slope.mT, query[:, own], alpha=scale)
        return for_query, for_key, for_value, None


def _slices(time: int, rows: int) -> Iterator[tuple[int, int]]:
    """First and last position, exclusive, of each slice."""
    return ((start, min(start + rows, time)) for start in range(0, time, rows))

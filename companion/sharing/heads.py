"""Grouped-query attention: the query heads of a group share one head of keys and values.

From H key-value heads to K: each new head is the mean of the old ones of its group, which costs
quality until a short further training, *up-training*, mends it. Ainslie et al., arXiv:2305.13245.
Unlike a shared layer, a shared key is computed once for all that read it: fewer products, and a
cache of keys and values that is H / K times smaller.

Axes: K key-value heads, D head width, W width.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from companion.checks import require, require_whole
from companion.model import LanguageModel
from companion.sharing.ties import Take, average, require_groups
from companion.surgery import copied

PARTS = ("key", "value")


def grouped_query(model: LanguageModel, kv_heads: int, *, take: Take = average) -> LanguageModel:
    """A copy with so many key-value heads a block; `take` makes each from those of its group.

    Raises ValueError if the present ones do not divide into so many groups.
    """
    require_whole("kv_heads", kv_heads)
    require_groups(model.config.kv_heads, kv_heads, "key-value heads")
    return _with_heads(
        model, kv_heads, lambda heads: take(heads.unflatten(0, (kv_heads, -1)).unbind(1))
    )


def spread_heads(model: LanguageModel) -> LanguageModel:
    """The twin with a key-value head for every query head: each shared one stands there H/K times.

    It computes the same. The gradient of a shared head is the sum of those of its twins.
    """
    times = model.config.heads // model.config.kv_heads
    return _with_heads(model, model.config.heads, lambda heads: heads.repeat_interleave(times, 0))


def _with_heads(model: LanguageModel, kv_heads: int, change) -> LanguageModel:
    """A copy whose keys' and values' weights, as (K, D, W), went through `change`."""
    new = copied(model)
    new.config = replace(model.config, kv_heads=kv_heads)
    for number, block in enumerate(new.blocks):
        attention = block.attention
        if attention.kv_heads == kv_heads:
            continue  # a shared block, met before
        for part in PARTS:
            name, layer = f"blocks.{number}.attention.{part}", getattr(attention, part)
            plain = isinstance(layer, nn.Linear)
            require(plain, f"{name} is a {type(layer).__name__}; group heads before all else")
            heads: Tensor = layer.weight.detach().unflatten(0, (attention.kv_heads, -1))
            layer.weight = nn.Parameter(change(heads).flatten(0, 1).clone())
            layer.out_features = len(layer.weight)
        attention.kv_heads = kv_heads
    return new

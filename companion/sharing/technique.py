"""The technique: a model in, a new model that holds fewer different parameters out.

The kinds of sharing differ in what they leave to compute. Tied matrices and shared layers are used
as often as before, so FLOPs and saved activations stay; grouped heads and low-rank factors are
smaller matrices, so FLOPs fall with them.
"""

from __future__ import annotations

from companion.checks import require
from companion.model import LanguageModel
from companion.sharing.heads import grouped_query
from companion.sharing.layers import Order, repeat, shared_layers
from companion.sharing.low_rank import factored
from companion.sharing.ties import Take, average, first
from companion.sharing.ties import tied as with_tied_head
from companion.surgery import Where, linears


def share(
    model: LanguageModel,
    *,
    tied: bool = False,
    layers: int | None = None,
    order: Order = repeat,
    kv_heads: int | None = None,
    inner: int | None = None,
    take: Take = first,
    pool: Take = average,
    where: Where = linears,
) -> LanguageModel:
    """A new model that shares what is asked for; several kinds can be combined.

    tied      the head is the embedding
    layers    different blocks that stay, in an `order`: `repeat` (AABB) or `cycle` (ABAB)
    kv_heads  key-value heads that stay in each block, made by `pool` from those of a group
    inner     inner width of the factors that replace each matrix chosen by `where`
    take      which of several becomes the shared one: `first` or `average`

    From an untrained model it gives one to be trained from scratch: then leave `take` as it is and
    set `pool=first`, for averages start too small. Raises ValueError if nothing is asked for, where
    shapes differ, groups do not divide, or the inner width is too large.
    """
    asked = tied or any(option is not None for option in (layers, kv_heads, inner))
    require(asked, "nothing is to be shared; give tied, layers, kv_heads or inner")
    if kv_heads is not None:
        model = grouped_query(model, kv_heads, take=pool)
    if layers is not None:
        model = shared_layers(model, layers, order=order, take=take)
    if inner is not None:
        model = factored(model, inner, where=where)
    return with_tied_head(model, take=take) if tied else model

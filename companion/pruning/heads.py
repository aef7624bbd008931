"""Attention heads: whole key-value groups go, a key-value head with all queries that read it.

Group g holds D rows of key and value and the H / K x D rows of query, and columns of out, that
belong to it. A query head alone could go too, but then groups would differ in size, and the keys
and values in the cache, which a group's head costs, would stay.

Axes: L layers, K key-value heads (groups), H query heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from companion.calibration import Inputs, seen
from companion.model import LanguageModel
from companion.pruning import narrowing
from companion.pruning.activity import first_order
from companion.pruning.config import with_groups
from companion.pruning.narrowing import Piece, count_of, highest, kept_piece, plain_weight
from companion.pruning.refitting import refitted_piece

DIMS = {"query": 0, "key": 0, "value": 0, "out": 1}  # along which a group's part lies


def magnitude(model: LanguageModel) -> Tensor:
    """Length of all weights of each group, (L, K): no text is read."""
    groups, rows = model.config.kv_heads, []
    for layer in range(model.config.layers):
        squares = [
            plain_weight(model, f"blocks.{layer}.attention.{part}").square().sum(1 - dim)
            for part, dim in DIMS.items()
        ]
        rows.append(sum(numbers.view(groups, -1).sum(1) for numbers in squares))
    return torch.stack(rows).sqrt()


def written(model: LanguageModel, inputs: Mapping[str, Inputs]) -> Tensor:
    """Root of the mean square length of what each group adds to the stream, (L, K).

    With W the group's columns of out and H its inputs' products over N positions, as
    `companion.calibration.observe` saw them: the square is the trace of W H W^T / N.
    """
    groups, rows = model.config.kv_heads, []
    for layer in range(model.config.layers):
        name = f"blocks.{layer}.attention.out"
        weight = plain_weight(model, name)
        found = seen(inputs, name, weight)
        columns = torch.arange(weight.shape[1]).view(groups, -1)
        w, h = weight.double(), found.products.double()
        traces = [((w[:, c] @ h[c][:, c]) * w[:, c]).sum() for c in columns]
        rows.append(torch.stack(traces) / found.positions)
    return torch.stack(rows).clamp(min=0).sqrt()


def taylor(model: LanguageModel, batches: Iterable[Tensor]) -> Tensor:
    """Change of the loss to first order if a group goes, (L, K): mean over sequences of its size.

    Needs a backward pass for each batch (B, T). Molchanov et al., arXiv:1611.06440.
    """
    terms = first_order(model, batches, [block.attention.out for block in model.blocks])
    return terms.unflatten(-1, (model.config.kv_heads, -1)).sum(-1).abs().mean(0)


def at_random(model: LanguageModel, seed: int) -> Tensor:
    """Scores that know nothing, (L, K): the control."""
    return narrowing.at_random((model.config.layers, model.config.kv_heads), seed)


def without_heads(
    model: LanguageModel,
    groups: int | float,
    scores: Tensor,
    *,
    refit: Mapping[str, Inputs] | None = None,
) -> LanguageModel:
    """A new, smaller model: in every block, so many groups, the lowest scores, are gone.

    `groups` is a number of key-value heads, or as a float a share of them. `refit` are the inputs
    that `companion.calibration.observe` saw: with them each out projection is fitted anew, by least
    squares, to what the whole one wrote.
    Raises ValueError if no group would stay, for scores of another shape, and weights that are not
    finite.
    """
    new = narrowing.smaller(model, _pieces(model, groups, scores, refit))
    kv_heads = model.config.kv_heads - count_of("heads", groups, model.config.kv_heads)
    new.config = with_groups(model.config, kv_heads)
    for block in new.blocks:
        block.attention.heads, block.attention.kv_heads = new.config.heads, kv_heads
    return new


def masked_heads(
    model: LanguageModel,
    groups: int | float,
    scores: Tensor,
    *,
    refit: Mapping[str, Inputs] | None = None,
) -> LanguageModel:
    """The same choice with zeros in the old shape."""
    return narrowing.silenced(model, _pieces(model, groups, scores, refit))


def _pieces(
    model: LanguageModel,
    groups: int | float,
    scores: Tensor,
    refit: Mapping[str, Inputs] | None,
) -> dict[str, Piece]:
    config, found = model.config, {}
    narrowing.require_scores(scores, (config.layers, config.kv_heads), "heads")
    staying = config.kv_heads - count_of("heads", groups, config.kv_heads)
    for layer, row in enumerate(scores):
        kept = highest(row, staying)
        for part, dim in DIMS.items():
            name = f"blocks.{layer}.attention.{part}"
            size = plain_weight(model, name).shape[dim]
            numbers = torch.arange(size, device=kept.device).view(config.kv_heads, -1)
            found[name] = kept_piece(model, name, dim, numbers[kept].flatten())
        if refit is not None:
            found[name] = refitted_piece(model, name, found[name].kept, refit)
    return found

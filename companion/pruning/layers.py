"""Whole layers: which blocks change the stream least, and a model without them.

A block adds to what it reads. One that adds little in another direction is nearly the identity, and
the blocks after it read nearly the same without it. Its influence is 1 - cos(read, written), mean
over positions: Men et al., "ShortGPT", arXiv:2403.03853. All are measured in the whole model, and
the lowest go at once.

Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from companion.checks import require, require_finite
from companion.model import LanguageModel
from companion.pruning.narrowing import (
    count_of,
    highest,
    plain_weight,
    require_scores,
    with_weights,
)
from companion.surgery import copied

WRITERS = ("attention.out", "mlp.down")  # the layers of a block that add to the stream


@torch.no_grad()
def influence(model: LanguageModel, batches: Iterable[Tensor]) -> Tensor:
    """1 - mean cosine of what each block reads and writes, (L,), over batches of tokens (B, T).

    The model comes out as it went in. Raises ValueError for no batches, and numbers not finite.
    """
    device = next(model.parameters()).device
    sums, positions = torch.zeros(model.config.layers, dtype=torch.float64, device=device), 0

    def see(layer: int, read: Tensor, wrote: Tensor) -> None:
        require_finite(wrote, f"numbers written by block {layer}")
        sums[layer] += (1 - cosine_similarity(read.double(), wrote.double(), dim=-1)).sum()

    hooks = [
        block.register_forward_hook(lambda _, args, out, layer=layer: see(layer, args[0], out))
        for layer, block in enumerate(model.blocks)
    ]
    try:
        for tokens in batches:
            model(tokens.to(device))
            positions += tokens.numel()
    finally:
        for hook in hooks:
            hook.remove()
    require(positions > 0, "there are 0 batches to read; give at least one")
    return sums / positions


def without_layers(
    model: LanguageModel, layers: int | float | Sequence[int], scores: Tensor | None = None
) -> LanguageModel:
    """A new, shallower model without the blocks of these indices, or without the lowest scores.

    An int is a number of layers, a float a share of them; both need scores (L,), such as
    `influence`. Raises ValueError if no layer would stay, for indices that repeat or do not exist,
    and scores of another shape.
    """
    gone = removed_layers(model, layers, scores)
    _require_finite_blocks(model)
    new = copied(model, sharing=[f"blocks.{layer}" for layer in gone])
    new.blocks = nn.ModuleList(block for i, block in enumerate(new.blocks) if i not in gone)
    new.config = replace(model.config, layers=len(new.blocks))
    return new.eval()


def masked_layers(
    model: LanguageModel, layers: int | float | Sequence[int], scores: Tensor | None = None
) -> LanguageModel:
    """The same choice in the old shape: zeros in all that the block would add to the stream."""
    gone = removed_layers(model, layers, scores)
    _require_finite_blocks(model)
    names = [f"blocks.{layer}.{writer}" for layer in gone for writer in WRITERS]
    return with_weights(model, {name: 0 * plain_weight(model, name) for name in names})


def removed_layers(
    model: LanguageModel, layers: int | float | Sequence[int], scores: Tensor | None = None
) -> tuple[int, ...]:
    """The indices of the blocks that would go, in order."""
    total = model.config.layers
    if isinstance(layers, int | float):
        count = count_of("layers", layers, total)
        require(scores is not None, f"which {count} layers? give scores, or a list of indices")
        require_scores(scores, (total,), "layers")
        return tuple(highest(-scores, count).tolist())
    gone = tuple(sorted(layers))
    inside = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < total for i in gone)
    require(inside, f"layers is {layers!r}; indices from 0 to {total - 1} are needed")
    require(len(set(gone)) == len(gone), f"layers is {layers!r}; an index is there twice")
    require(len(gone) < total, f"all {total} layers would go, and one must stay")
    return gone


def _require_finite_blocks(model: LanguageModel) -> None:
    for name, tensor in model.named_parameters():
        require_finite(tensor, f"weights of {name.removesuffix('.weight')}")

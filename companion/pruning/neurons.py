"""Neurons of the MLP: which matter least, and a model, really smaller, without them.

Neuron k is row k of gate and up and column k of down; without it all three matrices shrink. Each
rule below gives scores (L, M), and the lowest go. What the lost neurons wrote to the stream can in
part be told from the ones that stay: a refit puts that into the down projection.

Axes: L layers, M neurons, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from companion.calibration import Inputs
from companion.checks import require
from companion.model import LanguageModel
from companion.pruning import narrowing
from companion.pruning.activity import Activity, first_order
from companion.pruning.narrowing import Piece, highest, kept_piece, plain_weight, share_of
from companion.pruning.refitting import refitted_piece


def variance(activity: Activity) -> Tensor:
    """How much each neuron's output varies, (L, M): the documents' own rule."""
    return activity.variance


def norm(activity: Activity) -> Tensor:
    """Root of the mean square of each neuron's output, (L, M): variance and mean together."""
    return activity.norm


def magnitude(model: LanguageModel) -> Tensor:
    """Length of all 3 W weights of each neuron, (L, M): no text is read."""
    rows = [
        plain_weight(model, f"blocks.{layer}.mlp.gate").square().sum(1)
        + plain_weight(model, f"blocks.{layer}.mlp.up").square().sum(1)
        + plain_weight(model, f"blocks.{layer}.mlp.down").square().sum(0)
        for layer in range(model.config.layers)
    ]
    return torch.stack(rows).sqrt()


def taylor(model: LanguageModel, batches: Iterable[Tensor]) -> Tensor:
    """Change of the loss to first order if a neuron goes, (L, M): mean over sequences of its size.

    Needs a backward pass for each batch (B, T). Molchanov et al., arXiv:1611.06440.
    """
    return first_order(model, batches, [block.mlp.down for block in model.blocks]).abs().mean(0)


def at_random(model: LanguageModel, seed: int) -> Tensor:
    """Scores that know nothing, (L, M): the control."""
    return narrowing.at_random((model.config.layers, model.config.hidden), seed)


def without_neurons(
    model: LanguageModel,
    share: float,
    scores: Tensor,
    *,
    refit: Mapping[str, Inputs] | None = None,
) -> LanguageModel:
    """A new, smaller model: in every block, that share of the neurons, the lowest scores, is gone.

    `refit` are the inputs that `companion.calibration.observe` saw: with them each down projection
    is fitted anew, by least squares, to what the whole one wrote.
    Raises ValueError for a share outside [0, 1), if no neuron would stay, for scores of another
    shape, and weights that are not finite.
    """
    share_of("neurons", share, model.config.hidden)  # a list of shares would not fit a config
    new = narrowing.smaller(model, _pieces(model, share, scores, refit))
    new.config = replace(model.config, hidden=new.blocks[0].mlp.down.in_features)
    return new


def masked_neurons(
    model: LanguageModel,
    share: float | Sequence[float],
    scores: Tensor,
    *,
    refit: Mapping[str, Inputs] | None = None,
) -> LanguageModel:
    """The same choice with zeros in the old shape; here each block may have a share of its own."""
    return narrowing.silenced(model, _pieces(model, share, scores, refit))


def _pieces(
    model: LanguageModel,
    share: float | Sequence[float],
    scores: Tensor,
    refit: Mapping[str, Inputs] | None,
) -> dict[str, Piece]:
    layers, hidden = model.config.layers, model.config.hidden
    narrowing.require_scores(scores, (layers, hidden), "neurons")
    shares = [share] * layers if isinstance(share, (int, float)) else list(share)
    require(len(shares) == layers, f"{len(shares)} shares for {layers} layers; one for each")
    found = {}
    for layer, (own, row) in enumerate(zip(shares, scores, strict=True)):
        kept = highest(row, hidden - share_of("neurons", own, hidden))
        for part, dim in (("gate", 0), ("up", 0), ("down", 1)):
            name = f"blocks.{layer}.mlp.{part}"
            found[name] = kept_piece(model, name, dim, kept)
        if refit is not None:
            found[name] = refitted_piece(model, name, found[name].kept, refit)
    return found

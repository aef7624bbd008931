"""SmoothQuant: take outliers out of the activations by moving size into the weights.

A linear layer computes the same if its inputs are divided by s and its weight's columns multiplied
by s. Weights are even and can bear it; activations have a few inputs a hundred times the others.

Xiao et al., "SmoothQuant", arXiv:2211.10438.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from companion.calibration import Inputs, seen
from companion.checks import require
from companion.model import LanguageModel
from companion.quantization.replacing import require_plain
from companion.surgery import copied

READERS = {  # what divides the inputs, and the layers that read them
    "attention_norm": ("attention.query", "attention.key", "attention.value"),
    "mlp_norm": ("mlp.gate", "mlp.up"),
}


@torch.no_grad()
def smooth(
    model: LanguageModel,
    inputs: Mapping[str, Inputs],
    *,
    strength: float = 0.5,
    down: bool = False,
) -> LanguageModel:
    """A new model that computes the same, with smaller outliers in what its layers read.

    s = largest |x|^strength / largest |w|^(1 - strength), for each input: 1 moves all unevenness of
    the activations into the weights, 0 all of the weights' into the activations. As published, the
    norms before attention and MLP are divided by s; `down` does the same for the down projections,
    by the rows of `up`. Raises ValueError for a strength outside 0..1 and unobserved layers.
    """
    good = isinstance(strength, (int, float)) and 0 <= strength <= 1
    require(good, f"strength is {strength!r}; it must lie between 0 and 1")
    require_plain(model)
    new = copied(model)
    for index, block in enumerate(new.blocks):
        for norm, readers in READERS.items():
            layers = [block.get_submodule(name).weight for name in readers]
            s = _scale(seen(inputs, f"blocks.{index}.{readers[0]}", layers[0]), layers, strength)
            block.get_submodule(norm).weight.div_(s)
            for weight in layers:
                weight.mul_(s)
        if down:
            weight = block.mlp.down.weight
            s = _scale(seen(inputs, f"blocks.{index}.mlp.down", weight), [weight], strength)
            block.mlp.up.weight.div_(s[:, None])
            weight.mul_(s)
    return new


def _scale(found: Inputs, weights: list[Tensor], strength: float) -> Tensor:
    """s for each input, (I,); 1 where nothing was seen or all weights are 0."""
    of_weights = torch.stack([w.abs().amax(0) for w in weights]).amax(0).float()
    s = (found.largest**strength / of_weights ** (1 - strength)).to(weights[0].dtype)
    return torch.where(s.isfinite() & (s > 0) & (found.largest > 0), s, 1.0)

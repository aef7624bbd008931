"""What removing neurons, heads and layers share: choose by score, and copy with other weights.

A score is a number for each thing that may go; the lowest go first. Scores of things that every
layer has (neurons, key-value groups) are compared within their layer alone, since all layers of a
model must keep equally many: its config has one `hidden` and one `kv_heads`.

Axes: L layers, n things of one kind in a layer, O outputs, I inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from companion.checks import require, require_finite
from companion.model import LanguageModel


def share_of(name: str, share: float, whole: int) -> int:
    """How many of `whole` things a share means, rounded.

    Raises ValueError for a share that is not from 0 to less than 1, and if none would stay.
    """
    number = isinstance(share, (int, float)) and not isinstance(share, bool)
    require(number and 0 <= share < 1, f"{name} is {share!r}; a share from 0 to below 1 is needed")
    count = round(share * whole)
    require(count < whole, f"{name} is {share}: all {whole} would go, and one must stay")
    return count


def count_of(name: str, amount: int | float, whole: int) -> int:
    """How many of `whole` things an amount means: an int is a number of them, a float a share.

    Raises ValueError for less than none and for all.
    """
    if isinstance(amount, float):
        return share_of(name, amount, whole)
    number = isinstance(amount, int) and not isinstance(amount, bool)
    good = number and 0 <= amount < whole
    require(good, f"{name} is {amount!r}; of {whole}, 0 to {whole - 1} can go, or a share of them")
    return amount


def require_scores(scores: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Raise ValueError unless there is one finite score for each thing that may go."""
    given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    require(given == shape, f"scores of {what} are {given}; a tensor of {shape} is needed")
    require_finite(scores, f"scores of {what}")


def highest(scores: Tensor, count: int) -> Tensor:
    """Where the `count` highest of a row (n,) are, in order, (count,); of equals, the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def plain_weight(model: nn.Module, name: str) -> Tensor:
    """The weight (O, I) of a linear layer.

    Raises ValueError for other layers (quantized ones: prune first) and numbers not finite.
    """
    layer = model.get_submodule(name)
    plain, kind = isinstance(layer, nn.Linear) and layer.bias is None, type(layer).__name__
    require(plain, f"{name} is a {kind}; a plain linear layer is needed (prune, then quantize)")
    require_finite(layer.weight, f"weights of {name}")
    return layer.weight.detach()


@dataclass(frozen=True, eq=False)
class Piece:
    """What is left of a weight (O, I): some of its rows (`dim` 0) or columns (`dim` 1)."""

    weight: Tensor
    dim: int
    kept: Tensor  # where they stood, in order

    def in_place(self, old: Tensor) -> Tensor:
        """The old shape (O, I), with zeros for all that is gone."""
        return torch.zeros_like(old).index_copy(self.dim, self.kept, self.weight)


def kept_piece(model: nn.Module, name: str, dim: int, kept: Tensor) -> Piece:
    """Some rows or columns of a plain linear layer's weight, as they are."""
    weight = plain_weight(model, name)
    kept = kept.to(weight.device)
    return Piece(weight.index_select(dim, kept), dim, kept)


def smaller(model: LanguageModel, pieces: Mapping[str, Piece]) -> LanguageModel:
    """A copy whose layers hold the pieces and nothing else. The config is still the old one."""
    return with_weights(model, {name: piece.weight for name, piece in pieces.items()})


def silenced(model: LanguageModel, pieces: Mapping[str, Piece]) -> LanguageModel:
    """A copy of the old shape, with zeros for all that the pieces leave out."""
    old = {name: plain_weight(model, name) for name in pieces}
    return with_weights(model, {name: pieces[name].in_place(old[name]) for name in old})


def with_weights(model: LanguageModel, weights: Mapping[str, Tensor]) -> LanguageModel:
    """A copy in which the linear layers named have other weights (O, I), of any size."""
    old = {name: model.get_submodule(name).weight for name in weights}
    new = {
        id(old[name]): nn.Parameter(weight, requires_grad=old[name].requires_grad)
        for name, weight in weights.items()
    }
    model = copy.deepcopy(model, new)  # deepcopy takes these where it meets the old ones
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        layer.out_features, layer.in_features = weight.shape
    return model.eval()


def at_random(shape: tuple[int, ...], seed: int) -> Tensor:
    """Scores drawn evenly from 0 to 1: the control that every other rule must beat."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))

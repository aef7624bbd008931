"""The technique: a model in, a new model with zeros among its weights out.

The layers stay what they were, `nn.Linear`s of the same shape: the zeros are numbers like others,
so the model takes as many bytes as before and runs no faster. By default all matrices inside the
blocks are pruned; embedding, head and norms only if `where` chooses them.

Axes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from companion.checks import require, require_finite, require_number
from companion.model import LanguageModel
from companion.pruning.criteria import Scores, magnitude
from companion.pruning.patterns import Pattern, over_matrix, require_share
from companion.surgery import Where, chosen, copied, linears

Choice = Callable[[Tensor], Tensor]  # scores (O, I) -> which are kept: a pattern and its share
Method = Callable[[str, Tensor, Scores | None, Choice], Tensor]


def zeroed(name: str, weight: Tensor, scores: Scores | None, choice: Choice) -> Tensor:
    """The weight (O, I) with zeros where scores are low; those kept stay as they were."""
    kept = choice((scores or magnitude)(name, weight))
    return weight.masked_fill(~kept, 0)


def prune(
    model: LanguageModel,
    sparsity: float | Mapping[str, float] = 0.5,
    *,
    scores: Scores | None = None,
    pattern: Pattern = over_matrix,
    method: Method = zeroed,
    where: Where = linears,
) -> LanguageModel:
    """A new model in which a share `sparsity` of each chosen weight is exactly zero.

    `sparsity` may also say it layer by layer, by name: {"blocks.0.mlp.up": 0.7, ...}; layers left
    out stay as they are. `scores` ranks weights (None: as the method likes, which for `zeroed` is
    by magnitude), `pattern` says among which they compete, and `method` what becomes of the rest:
    `zeroed` leaves it, `sparsegpt(inputs)` lets it make up for what is gone. Zeros that are there
    already count. Shares are rounded to whole numbers of weights, see `patterns`.
    Raises ValueError for shares outside [0, 1), unknown names, patterns that do not divide a
    matrix, and weights that are not finite; the model given stays as it was.
    """
    shares = _shares(model, sparsity, where)
    new = copied(model)
    for name, share in shares.items():
        weight = _weight(new, name)
        weight.copy_(_pruned(name, weight, scores, partial(pattern, share=share), method))
    return new


def prune_below(model: LanguageModel, threshold: float, *, where: Where = linears) -> LanguageModel:
    """A new model without the weights that are smaller than `threshold`, |w| < threshold.

    How many that are depends on the model and its scale. Raises ValueError as `prune` does.
    """
    require_number("threshold", threshold, above=0)
    return masked(model, {n: w.abs() >= threshold for n, w in _weights(model, where).items()})


def masked(model: LanguageModel, kept: Mapping[str, Tensor]) -> LanguageModel:
    """A new model with zeros wherever `kept`, masks (O, I) by layer name, is False.

    Raises ValueError for unknown names, and masks that are no booleans of the weight's shape.
    """
    new, known = copied(model), chosen(model, weighted)
    for name, mask in kept.items():
        require(name in known, f"{name!r} is no layer with a weight; print the model to see")
        weight = _weight(new, name)
        found = f"{tuple(mask.shape)} of {mask.dtype}"
        good = mask.dtype == torch.bool and mask.shape == weight.shape
        require(good, f"the mask of {name} is {found}; booleans {tuple(weight.shape)} are expected")
        weight.masked_fill_(~mask, 0)
    return new


@torch.no_grad()
def global_shares(
    model: LanguageModel,
    sparsity: float,
    *,
    scores: Scores = magnitude,
    where: Where = linears,
) -> dict[str, float]:
    """The share of each layer if all weights competed with each other, for `prune` to be told.

    `prune(model, global_shares(model, 0.5))` removes the lowest half of all weights. Raises
    ValueError if that leaves a layer none.
    """
    require_share("sparsity", sparsity)
    found = {n: _scored(n, w, scores).flatten() for n, w in _weights(model, where).items()}
    missing = round(sparsity * sum(len(one) for one in found.values()))
    if missing == 0:
        return dict.fromkeys(found, 0.0)
    border = torch.cat(list(found.values())).kthvalue(missing).values
    gone = {name: int((one < border).sum()) for name, one in found.items()}
    missing -= sum(gone.values())  # to be found among equal scores: the first go
    for name, one in found.items():
        gone[name] += (equal := min(missing, int((one == border).sum())))
        missing -= equal
    shares = {name: gone[name] / len(one) for name, one in found.items()}
    empty = [name for name, share in shares.items() if share == 1]
    require(not empty, f"{empty[:1]} would keep no weight; take less, or a share for each layer")
    return shares


def weighted(name: str, module: nn.Module) -> bool:
    """Choose everything that has a weight: norms, embedding and head too, as the documents do."""
    return isinstance(getattr(module, "weight", None), nn.Parameter)


def sparsity_of(model: nn.Module, *, where: Where = linears) -> dict[str, float]:
    """The share of zeros in each chosen weight, by layer name."""
    return {n: (w == 0).float().mean().item() for n, w in _weights(model, where).items()}


def total_sparsity(model: nn.Module, *, where: Where = linears) -> float:
    """The share of zeros in all chosen weights together."""
    weights = _weights(model, where).values()
    return sum((w == 0).sum().item() for w in weights) / sum(w.numel() for w in weights)


def _shares(model: nn.Module, sparsity: float | Mapping[str, float], where: Where) -> dict:
    known = _weights(model, where)
    if not isinstance(sparsity, Mapping):
        require_share("sparsity", sparsity)
    shares = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(known, sparsity)
    for name, share in shares.items():
        require(name in known, f"{name!r} is no layer that `where` chooses; print the model to see")
        require_share(f"sparsity of {name}", share)
    return dict(shares)


def _weights(model: nn.Module, where: Where) -> dict[str, Tensor]:
    """The chosen weights (O, I) by layer name; one that two modules share comes once."""
    names = {}
    for name, module in chosen(model, where).items():
        require(weighted(name, module), f"{name} has no weight of its own; choose what has")
        names.setdefault(id(module.weight), name)
    require(len(names) > 0, "no layer is chosen; a quantized model has none, so prune it before")
    return {name: _weight(model, name) for name in names.values()}


def _weight(model: nn.Module, name: str) -> Tensor:
    """The weight of a layer, its storage shared; a vector, such as a norm's, is one row."""
    weight = model.get_submodule(name).weight.detach()
    require(weight.is_floating_point(), f"{name} has {weight.dtype} weights; floats are expected")
    require_finite(weight, f"weights of {name}")
    return weight.view(-1, weight.shape[-1])


def _pruned(
    name: str, weight: Tensor, scores: Scores | None, choice: Choice, method: Method
) -> Tensor:
    """What `method` makes of one weight, computed in 32 bits or more."""
    try:
        wide = weight.float() if weight.element_size() < 4 else weight
        return method(name, wide, scores and partial(_scored, scores=scores), choice)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _scored(name: str, weight: Tensor, scores: Scores) -> Tensor:
    """Scores of a weight, checked: a number that is none has no place in an order."""
    found = scores(name, weight)
    same = found.shape == weight.shape
    require(same, f"scores {tuple(found.shape)} of {name} do not fit {tuple(weight.shape)} weights")
    require_finite(found, "scores")
    return found

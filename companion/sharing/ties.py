"""One parameter under several names: it is stored once, and every use adds to its gradient.

Two modules share a weight if they hold the same `nn.Parameter` object. Equal numbers are not
enough: a copy is a parameter of its own, and the first update pulls the two apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from companion.checks import require
from companion.model import LanguageModel
from companion.surgery import copied

Take = Callable[[Sequence[Tensor]], Tensor]  # tensors of one shape -> the one that stays


def first(tensors: Sequence[Tensor]) -> Tensor:
    """The first stays: right for untrained weights, whose spread an average would shrink."""
    return tensors[0]


def average(tensors: Sequence[Tensor]) -> Tensor:
    """The mean stays: what a trained model's parts have in common."""
    return torch.stack([*tensors]).mean(0)


def require_groups(total: int, groups: int, what: str) -> None:
    """Raise ValueError if so many things do not divide into so many groups of equal size."""
    fit = [n for n in range(1, total + 1) if total % n == 0]
    require(groups in fit, f"{total} {what} do not divide into {groups} groups; {fit} do")


def ties(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of each parameter that has more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tuple(several) for several in names.values() if len(several) > 1]


def tie(model: nn.Module, names: Sequence[str], *, take: Take = first) -> nn.Module:
    """A copy in which the parameters of these names are one.

    `take` makes its numbers from theirs. Raises ValueError for fewer than two names, names that are
    no parameter, and shapes that differ.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    require(
        len(set(names)) >= 2, f"{list(names)} names fewer than two parameters; give two or more"
    )
    for name in names:
        require(name in known, f"{name!r} is no parameter; print the model to see the names")
    shapes = {name: tuple(known[name].shape) for name in names}
    require(len(set(shapes.values())) == 1, f"only equal shapes can be shared; these are {shapes}")
    model = copied(model)
    one = nn.Parameter(take([known[name].detach() for name in names]).clone())
    for name in names:
        place(model, name, one)
    return model


def tied(model: LanguageModel, *, take: Take = first) -> LanguageModel:
    """A copy whose head is its embedding; `first` keeps the embedding. Press and Wolf, 1608.05859.

    Raises ValueError if their shapes differ.
    """
    model = tie(model, ("embedding.weight", "head.weight"), take=take)
    model.config = replace(model.config, tied=True)
    return model


def unshared(model: LanguageModel) -> LanguageModel:
    """The twin in which every use has a parameter of its own, with the same numbers.

    It computes the same and stores more. The gradient of a shared parameter is the sum of the
    gradients of its twins.
    """
    model = copied(model)
    model.blocks = nn.ModuleList(copy.deepcopy(block) for block in model.blocks)
    for names in ties(model):
        for name in names[1:]:
            old = model.get_parameter(name)
            place(model, name, nn.Parameter(old.detach().clone(), old.requires_grad))
    model.config = replace(model.config, tied=False)
    return model


def place(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter under a dotted name, in place."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def require_untied(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Raise ValueError if a weight of these modules stands in another module too.

    To change it in one of the two would end the tie and store a second copy.
    """
    holders: dict[int, dict[int, str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), {})[id(module)] = name
    for module in modules.values():
        for parameter in module.parameters(recurse=False):
            names = list(holders[id(parameter)].values())
            require(len(names) == 1, f"{' and '.join(names)} share a weight; leave both out")

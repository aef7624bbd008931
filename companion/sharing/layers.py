"""Several layers, one block: the model is as deep as before and holds fewer blocks.

With L layers and n different blocks, `repeat` lets each block work L / n times in a row (AABB),
`cycle` goes through all of them again and again (ABAB). n = 1 is ALBERT's choice, arXiv:1909.11942,
and the core of the Universal Transformer, arXiv:1807.03819. `config.layers` stays L: it counts
blocks that are computed, each use with keys and values of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from companion.checks import require, require_whole
from companion.model import LanguageModel
from companion.sharing.ties import Take, first, require_groups
from companion.surgery import copied

Order = Callable[[int, int], list[int]]  # L layers, n blocks -> the block that each layer uses


def repeat(layers: int, different: int) -> list[int]:
    """AABB: layer l uses block l n / L, rounded down."""
    return [layer * different // layers for layer in range(layers)]


def cycle(layers: int, different: int) -> list[int]:
    """ABAB: layer l uses block l mod n."""
    return [layer % different for layer in range(layers)]


def distinct_layers(model: LanguageModel) -> int:
    """How many different blocks do the work of `config.layers`."""
    return len(set(model.blocks))


def shared_layers(
    model: LanguageModel, different: int, *, order: Order = repeat, take: Take = first
) -> LanguageModel:
    """A copy in which so many different blocks do the work of all layers.

    `take` makes a block from those of its group. Average trained ones if at all: of untrained
    ones it leaves a spread that is smaller by the root of the group.
    Raises ValueError if the layers do not divide into groups of equal size, for blocks of
    different shapes in a group, and for one block in two groups.
    """
    total = model.config.layers
    require_whole("layers", different)
    require_groups(total, different, "layers")
    which = order(total, different)
    groups = [[layer for layer in range(total) if which[layer] == g] for g in range(different)]
    numbers = [_numbers(model, group, take) for group in groups]
    new = copied(model)
    kept = [new.blocks[group[0]] for group in groups]
    heads = [group[0] for group in groups]
    require(len(set(kept)) == different, f"of the layers {heads}, two already are one block")
    for block, tensors in zip(kept, numbers, strict=True):
        _fill(block, tensors)
    new.blocks = nn.ModuleList(kept[block] for block in which)
    return new


def _numbers(model: LanguageModel, group: list[int], take: Take) -> dict[str, Tensor]:
    """What the shared block of a group will hold, by name."""
    states = {layer: model.blocks[layer].state_dict() for layer in group}
    for layer, state in states.items():
        for name in sorted(states[group[0]].keys() | state.keys()):
            one, other = (_shape(states[at], name) for at in (group[0], layer))
            pair = f"blocks.{group[0]}.{name} is {one} and blocks.{layer}.{name} is {other}"
            require(one == other, f"{pair}; only blocks of equal shapes can be shared")
    return {name: take([state[name] for state in states.values()]) for name in states[group[0]]}


def _shape(state: dict[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(state[name].shape) if name in state else "missing"


@torch.no_grad()
def _fill(block: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in block.state_dict().items():
        tensor.copy_(tensors[name])

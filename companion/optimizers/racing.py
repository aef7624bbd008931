"""How long an update takes: optimizers, or variants of one, against each other.

"loop" goes through the tensors one by one, several small operations each; "foreach" does one
operation for all of them; "fused" does all operations in one pass over the numbers. What is
computed is the same. What differs is the number of calls, and how often memory is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from companion.checks import require
from companion.optimizers.making import make_optimizer
from companion.surgery import copied
from companion.timing import Race, race

RATE = 1e-6  # small: a thousand updates leave the weights where they were, more or less


def race_updates(
    model: nn.Module, ways: Mapping[str, tuple[str, str | None]], *, rounds: int | None = None
) -> Race:
    """Time `optimizer.step()` for each way, {label: (optimizer, variant)}.

    Each works on a copy of the model with the same random gradients; forward and backward pass are
    not in it. Raises ValueError for no ways and for unknown names.
    """
    require(len(ways) > 0, "there are 0 ways; give at least one, {label: (optimizer, variant)}")
    calls = {label: update_call(model, name, variant) for label, (name, variant) in ways.items()}
    return race(rounds=rounds, **calls)


def update_call(model: nn.Module, name: str, variant: str | None = None) -> Callable[[], None]:
    """A call that makes one update of a copy of the model and returns when it is done."""
    model = copied(model)
    optimizer = make_optimizer(name, model, RATE, variant=variant)
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random).to(parameter)

    on_cuda = next(model.parameters()).is_cuda

    def update() -> None:
        optimizer.step()
        if on_cuda:
            torch.cuda.synchronize()

    return update

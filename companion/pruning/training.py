"""Training a pruned model: zeros stay zeros.

A zero weight has a gradient like any other, so one ordinary step of training fills it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from companion.surgery import Where, chosen, linears
from companion.training import Step, plain_step

Zeros = Mapping[nn.Parameter, Tensor]  # where a weight is zero, as booleans of its shape


def keeping_zeros(step: Step = plain_step, *, where: Where = linears) -> Step:
    """`step`, but the chosen weights that are zero when it first meets a model stay zero.

    Their gradients are left out, so that they count neither when gradients are shortened nor in
    the optimizer's averages; and they are zero again after the update, whatever else it adds.
    """
    known: WeakKeyDictionary[nn.Module, Zeros] = WeakKeyDictionary()

    def keeping(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> Tensor:
        if model not in known:
            weights = [module.weight for module in chosen(model, where).values()]
            known[model] = {w: w.detach() == 0 for w in weights if w.requires_grad}
        with _kept(known[model]):
            return step(model, optimizer, batch)

    return keeping


@contextmanager
def _kept(zeros: Zeros) -> Iterator[None]:
    hooks = [
        weight.register_hook(lambda gradient, zero=zero: gradient.masked_fill(zero, 0))
        for weight, zero in zeros.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for weight, zero in zeros.items():
            weight.masked_fill_(zero, 0)

"""Ranks that average something now and then: parameters, gradients, or how far they came.

Averaging parameters after every step equals averaging gradients before it wherever the update is
linear in the gradient and its state: SGD, momentum, Nesterov. It is not where gradients are squared
(Adam) or clipped, nor when averaged every k > 1 steps, for then each rank's gradients are taken at
its own weights. What the idea became is sending rarely on purpose: local SGD (arXiv:1805.09767)
averages the parameters every k steps, DiLoCo (arXiv:2311.08105) takes their mean change for a
gradient. Both send 1/k of what data parallelism sends.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from companion.checks import require, require_known, require_number, require_whole
from companion.losses import next_token_loss
from companion.parallel.processes import place
from companion.training import Step, plain_step

WHAT = ("parameters", "gradients", "states")


@torch.no_grad()
def average(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Put the mean over the ranks into each tensor: one all-reduce for each type of number."""
    _, ranks = place(group)
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    for alike in kinds.values():
        flat = torch.cat([tensor.flatten() for tensor in alike]) / ranks
        dist.all_reduce(flat, group=group)
        parts = flat.split([tensor.numel() for tensor in alike])
        for tensor, part in zip(alike, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def averaging(group: dist.ProcessGroup, *, what: str = "parameters", every: int = 1) -> Step:
    """A step on this rank's own batch that averages `what` over the ranks each `every`-th time.

    "gradients" averages before the update, "parameters" after it, "states" the parameters and the
    optimizer's running averages. The model is an ordinary one, alike on all ranks; each rank keeps
    its own optimizer. Gradients averaged every k > 1 steps leave the ranks apart for good.
    Nothing is clipped: a clipped gradient is not linear in the gradient, and the equality of the
    first two would end. The loss given back is this rank's own.

    A step counts its calls: make a new one for each training. Raises ValueError for an unknown
    `what` and an `every` below 1.
    """
    require_known("what", what, WHAT)
    require_whole("every", every)
    calls = 0

    def step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        due = calls % every == 0
        loss = next_token_loss(model(batch), batch)
        loss.backward()
        if due and what == "gradients":
            average(_gradients(model), group)
        optimizer.step()
        optimizer.zero_grad()
        if due and what != "gradients":
            average(model.parameters(), group)
        if due and what == "states":
            average(_states(model, optimizer), group)
        return loss.detach()

    return step


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _states(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Tensors the optimizer keeps, but for the counters of steps, which are alike already."""
    states = [optimizer.state[p] for p in model.parameters() if p in optimizer.state]
    found = [value for state in states for _, value in sorted(state.items())]
    return [value for value in found if isinstance(value, Tensor) and value.ndim > 0]


def diloco(
    group: dist.ProcessGroup,
    *,
    every: int,
    rate: float = 0.7,
    momentum: float = 0.9,
    inner: Step = plain_step,
) -> Step:
    """DiLoCo (arXiv:2311.08105): `every` local steps, then one with Nesterov momentum for all.

    Each rank takes `inner` steps with its own optimizer (the paper's is AdamW), whose state stays
    with it. Then the outer gradient is the mean over the ranks of (weights `every` steps ago -
    weights now), and SGD with Nesterov momentum takes a step of `rate` from the old weights:

        v <- momentum v + gradient,   weights <- old weights - rate (gradient + momentum v).

    With rate 1 and momentum 0 this is averaging parameters. Besides the model a rank holds the old
    weights and v. Make a new step for each training, with a model that is alike on all ranks.
    Raises ValueError for an `every` below 1, a rate that is not positive, a momentum not in [0, 1).
    """
    require_whole("every", every)
    require_number("rate", rate, above=0)
    require(0 <= momentum < 1, f"momentum is {momentum!r}; it must be at least 0 and below 1")
    calls, outer = 0, None

    def step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> Tensor:
        nonlocal calls, outer
        calls += 1
        outer = outer or _Outer(model, rate, momentum)
        loss = inner(model, optimizer, batch)
        if calls % every == 0:
            outer.step(group)
        return loss

    return step


class _Outer:
    """The weights at the last meeting, and the optimizer that moves them."""

    def __init__(self, model: nn.Module, rate: float, momentum: float) -> None:
        self.parameters = list(model.parameters())
        self.old = [p.detach().clone() for p in self.parameters]
        nesterov = momentum > 0
        self.sgd = torch.optim.SGD(self.old, lr=rate, momentum=momentum, nesterov=nesterov)

    @torch.no_grad()
    def step(self, group: dist.ProcessGroup) -> None:
        for old, parameter in zip(self.old, self.parameters, strict=True):
            old.grad = old - parameter
        average([old.grad for old in self.old], group)
        self.sgd.step()
        for old, parameter in zip(self.old, self.parameters, strict=True):
            parameter.copy_(old)
            old.grad = None

"""Memory of a training step, predicted from the shape and counted in the step itself.

A step holds the weights, the optimizer's states, the gradients, and what autograd keeps from the
forward pass until the backward pass has used it. Microbatches divide the last of these, and
recomputation takes most of it away; neither touches the other three.

Scratch space that an operation holds while it runs comes on top, in both.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from companion import cost, recomputation
from companion.accumulation import rows_each
from companion.checks import require, require_whole
from companion.memory import storage_bytes
from companion.model import ModelConfig
from companion.training import Step


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step, by what they are."""

    weights: int
    gradients: int
    states: int  # of the optimizer, with a count of steps for each tensor
    kept: int  # by autograd, at the worst moment

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states + self.kept

    def as_dict(self) -> dict[str, int]:
        return {**vars(self), "total": self.total}


def predicted(
    config: ModelConfig,
    positions: int,
    *,
    batch: int,
    microbatches: int = 1,
    every: int | None = None,
    optimizer: str = "adamw",
) -> StepMemory:
    """Bytes of a step on `batch` texts of `positions` tokens in FP32.

    `every` is that of `recomputed`; None recomputes nothing. Raises ValueError for a batch that
    does not divide, unknown optimizers and impossible shapes.
    """
    require_whole("batch", batch)
    rows = rows_each(batch, microbatches)
    if every is None:
        kept = cost.activation_bytes(config, positions, batch=rows)
    else:
        kept = recomputation.kept_bytes(config, positions, batch=rows, every=every)
    kept += 8 * (batch - rows) * positions  # ids of the other microbatches: one storage
    counters = 4 * (9 * config.layers + 3 - config.tied) if optimizer.startswith("adam") else 0
    return StepMemory(
        weights=cost.weight_bytes(config),
        gradients=cost.gradient_bytes(config),
        states=cost.optimizer_bytes(config, optimizer) + counters,
        kept=kept,
    )


def flops(config: ModelConfig, positions: int, *, batch: int, every: int | None = None) -> int:
    """FLOPs of the same step. Microbatches do not change them."""
    count = cost.training_flops if every is None else recomputation.training_flops
    return count(config, positions, batch=batch)


def counted(model: nn.Module, optimizer: Optimizer, step: Step, batch: Tensor) -> StepMemory:
    """Take one step, `step(model, optimizer, batch)`, and count what it holds.

    Gradients are counted as the optimizer finds them. Raises ValueError if it finds none.
    """
    gradients: list[int] = []
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def look(*_: object) -> None:
        gradients.append(storage_bytes(w.grad for w in weights if w.grad is not None))

    hook = optimizer.register_step_pre_hook(look)
    try:
        with KeptNow(model) as kept:
            step(model, optimizer, batch)
    finally:
        hook.remove()
    found = max(gradients, default=0)
    require(found > 0, "no weight of the optimizer has a gradient; is it this model's?")
    states = storage_bytes(v for s in optimizer.state.values() for v in s.values())
    return StepMemory(storage_bytes(model.parameters()), found, states, kept.peak)


class KeptNow(saved_tensors_hooks):
    """`with KeptNow(model) as kept:` counts what autograd keeps: `kept.now`, `kept.peak`, in bytes.

    Each storage counts once, from the first time it is saved until the last that saved it lets go.
    Parameters and buffers of `model` are left out. `companion.kept.kept_bytes` counts the same at
    the end of a forward pass; this one looks on, so that it sees what is recomputed and freed.
    """

    def __init__(self, model: nn.Module) -> None:
        there = chain(model.parameters(), model.buffers())
        self._there = {tensor.untyped_storage().data_ptr() for tensor in there}
        self._holders: Counter[int] = Counter()
        self.now = self.peak = 0
        super().__init__(self._keep, lambda held: held.tensor)

    def __enter__(self) -> KeptNow:
        super().__enter__()
        return self

    def _keep(self, tensor: Tensor) -> _Held:
        held, storage = _Held(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._there:
            if self._holders[place] == 0:
                self.now += size
                self.peak = max(self.peak, self.now)
            self._holders[place] += 1
            weakref.finalize(held, self._freed, place, size)
        return held

    def _freed(self, place: int, size: int) -> None:
        self._holders[place] -= 1
        if self._holders[place] == 0:
            self.now -= size


class _Held:
    """What autograd keeps in place of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

"""Take one training step in some precision and count the bytes of what it holds.

The counterpart of `companion.precision.footprint`: the same names, the same kinds of bytes, but
found in the storages that autograd, the parameters and the optimizer hold, on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from companion.checks import require, require_known
from companion.kept import kept_bytes
from companion.losses import next_token_loss
from companion.memory import storage_bytes
from companion.precision.eight_bit import eight_bit_adamw
from companion.precision.float8 import float8
from companion.precision.footprint import PRECISIONS
from companion.precision.masters import Masters
from companion.precision.mixed import mixed_precision
from companion.precision.pure import pure, pure_adamw
from companion.step_memory import StepMemory
from companion.surgery import copied
from companion.training import adamw


@dataclass(frozen=True)
class Trainable:
    """A model in some precision, the optimizer of its weights, what comes before an update."""

    model: nn.Module
    optimizer: Optimizer
    before_update: Callable[[], object] = lambda: None


def trainable(model: nn.Module, precision: str = "FP32") -> Trainable:
    """A copy of `model` in a precision of `companion.precision.footprint`, with AdamW.

    Raises ValueError for an unknown precision.
    """
    require_known("precision", precision, PRECISIONS)
    if precision == "masters":
        masters = Masters(model)
        return Trainable(masters.low, adamw(masters.high), masters.take_gradients)
    makers = {"autocast": mixed_precision, "pure BF16": pure, "FP8": float8}
    optimizers = {"pure BF16": pure_adamw, "8-bit states": eight_bit_adamw}
    changed = makers.get(precision, copied)(model)
    return Trainable(changed, optimizers.get(precision, adamw)(changed))


def counted(
    trained: Trainable,
    tokens: Tensor,
    *,
    forward: Callable[[], Tensor] | None = None,
) -> StepMemory:
    """Take one step on tokens (B, T) and count.

    `forward` gives the loss, if `model(tokens)` under the usual loss does not. Copies that stand in
    the model beside the optimizer's weights count as kept. The gradients are left as the step made
    them. Raises ValueError for an optimizer whose weights get none.
    """
    model, optimizer = trained.model, trained.optimizer
    losses: list[Tensor] = []
    give_loss = forward or (lambda: next_token_loss(model(tokens), tokens))
    kept = kept_bytes(model, lambda: losses.append(give_loss()))
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    own = set(model.parameters())
    copies = storage_bytes(own) - storage_bytes(own & set(weights))
    losses[0].backward()
    trained.before_update()
    gradients = storage_bytes(weight.grad for weight in weights if weight.grad is not None)
    require(gradients > 0, "no weight of the optimizer has a gradient; is it this model's?")
    optimizer.step()
    states = storage_bytes(v for state in optimizer.state.values() for v in state.values())
    return StepMemory(storage_bytes(weights), gradients, states, kept + copies)


def autocast_loss(
    model: nn.Module, tokens: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], Tensor]:
    """A call that gives the loss under `torch.autocast`, to be `forward` in `counted`."""

    def forward() -> Tensor:
        with torch.autocast(tokens.device.type, dtype):
            return next_token_loss(model(tokens), tokens)

    return forward

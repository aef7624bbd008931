"""Mixed precision: FP32 master weights, products in 16 bits, and a step that checks itself.

The parameters stay FP32, so that a small update is not lost; each product rounds its operands to
the low format, where hardware with units for it computes faster and keeps half the bytes. Norms,
softmax and loss stay in FP32 (`companion.precision.policy` has the table and the reasons).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from companion.checks import require
from companion.hardware import cpu_features
from companion.losses import next_token_loss
from companion.precision.policy import Policy, within
from companion.precision.scaling import LossScale, all_finite
from companion.stopping import held_by
from companion.training import Step

FP16_UNITS = ("avx512_fp16", "avx10_1", "amx_fp16", "fp16_arith")


def supported(device: torch.device | str) -> tuple[torch.dtype, ...]:
    """The low types that products may have on a device.

    FP16 on a CPU is left out where no unit computes in it: one product would take hundreds of times
    as long as in FP32. BF16 without units takes several times as long, which one can wait for.
    """
    kind, features = torch.device(device).type, cpu_features()
    if kind == "cpu":
        native = any(features.get(unit, False) for unit in FP16_UNITS)
        return (torch.bfloat16, torch.float16) if native else (torch.bfloat16,)
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return (torch.float16,)
    return (torch.bfloat16, torch.float16)


def mixed_precision(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A copy that multiplies matrices in `dtype`; its parameters are the FP32 master weights.

    The same numbers as the model inside `torch.autocast(device, dtype)`. Raises ValueError for
    parameters that are not FP32, and for a `dtype` that the model's device has no arithmetic for.
    """
    for name, parameter in model.named_parameters():
        advice = "master weights are FP32; convert the model with .float() first"
        require(parameter.dtype == torch.float32, f"{name} is {parameter.dtype}; {advice}")
    device = next(model.parameters()).device
    names = ", ".join(str(each).removeprefix("torch.") for each in supported(device))
    require(
        dtype in supported(device),
        f"{dtype} is not supported on {device.type} here; supported: {names}. "
        "emulated(model, format) rounds FP32 numbers instead",
    )
    return within(model, Policy(dtype))


def mixed_step(scale: LossScale | None = None, *, checkpoint: str | Path | None = None) -> Step:
    """A step for `train`: scale the loss, unscale the gradients, check, clip, skip or update.

    Without a scale (BF16 has FP32's range) it is `plain_step` with checks. Raises
    FloatingPointError, before anything is changed, when the loss is not finite, and when gradients
    are not finite and there is no scale to lower; the message names step, scale and last good
    state. `checkpoint` is the file that the caller saves to; it is only read, for that message.
    """
    history = _History(scale, checkpoint)

    def step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> Tensor:
        loss = next_token_loss(model(batch), batch)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} {history}")
        (loss if scale is None else scale.scaled(loss)).backward()
        parameters = [p for p in model.parameters() if p.grad is not None]
        finite = unscaled(scale, parameters)
        if finite:
            nn.utils.clip_grad_norm_(parameters, 1.0)  # after unscaling: 1 is a true length
            optimizer.step()
        optimizer.zero_grad()
        history.note(finite)
        return loss.detach()

    return step


def unscaled(scale: LossScale | None, parameters: list[Tensor]) -> bool:
    """Divide the gradients by the scale, if there is one; whether all are finite."""
    if scale is None:
        return all_finite(p.grad for p in parameters)
    return scale.unscale(parameters)


class _History:
    """Where a training stands, in words for an error."""

    def __init__(self, scale: LossScale | None, checkpoint: str | Path | None) -> None:
        self.scale, self.checkpoint = scale, checkpoint
        self.own, self.last_good = 0, None

    @property
    def steps(self) -> int:
        return self.own if self.scale is None else self.scale.steps

    def note(self, finite: bool) -> None:
        """Count a step, and stop where going on makes no sense."""
        if self.scale is None and not finite:
            raise FloatingPointError(f"the gradients are not finite {self}")
        if finite:
            self.last_good = self.steps
        self.own += 1
        if self.scale is not None:
            self.scale.update(finite)

    def __str__(self) -> str:
        scale = "no loss scale" if self.scale is None else f"loss scale {self.scale.value:g}"
        left = "before the first" if self.last_good is None else f"after step {self.last_good}"
        text = f"at step {self.steps}, {scale}; weights and states are those {left}"
        if self.checkpoint is None or not Path(self.checkpoint).is_file():
            return text
        return f"{text}, and {self.checkpoint} {held_by(self.checkpoint)}"

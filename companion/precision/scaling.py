"""Loss scaling: small gradients are lifted into a format's range, and brought back in FP32.

The loss is multiplied by a scale before the backward pass, so every gradient is multiplied by it
too, and fewer of them round to zero. The gradients of the FP32 master weights are divided by it
again. Where a gradient overflowed the step is skipped. A *static* scale stays; a *dynamic* one is
halved after each overflow and doubled after many good steps in a row, so it lives just below
overflow. Micikevicius et al., arXiv:1710.03740.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from companion.checks import require, require_number, require_whole

FLOOR = 2.0**-14  # gradients that overflow FP16 at this scale are beyond 2^30: no scale helps
PATIENCE = 100  # skipped steps in a row, for a scale that cannot fall or falls too slowly
COUNTS = ("value", "good", "skipped", "since_change", "in_a_row")


class LossScale:
    """A dynamic loss scale, with the rule of `torch.amp.GradScaler`: same scales, same skips.

    After a skipped step the value is multiplied by `backoff`, after `interval` good steps in a row
    by `growth`. Raises ValueError for a value that is not finite and above zero, growth below 1,
    backoff outside (0, 1], and intervals below 1.
    """

    def __init__(
        self,
        value: float = 2.0**16,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
    ) -> None:
        require_number("the loss scale", value, above=0)
        require_number("growth", growth, above=0)
        require_number("backoff", backoff, above=0)
        require(growth >= 1, f"growth is {growth}; a factor of at least 1 is expected")
        require(backoff <= 1, f"backoff is {backoff}; a factor of at most 1 is expected")
        require_whole("interval", interval)
        self.value = as_fp32(value)
        limits = "FP32 holds 1e-38 to 3e38"
        require(0 < self.value < float("inf"), f"the loss scale is {value}; {limits}")
        self.growth, self.backoff, self.interval = growth, backoff, interval
        self.good = self.skipped = 0  # steps
        self.since_change = self.in_a_row = 0  # good steps since a change; skips in a row

    @property
    def steps(self) -> int:
        """Steps seen, skipped ones included."""
        return self.good + self.skipped

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on."""
        return loss * self.value

    @torch.no_grad()
    def unscale(self, parameters: Iterable[Tensor]) -> bool:
        """Divide the gradients by the scale, in place; whether all of them were finite.

        Raises ValueError for FP16 gradients: divided there, they underflow after all.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            advice = "FP32 master weights are expected, whose gradients are FP32"
            require(gradient.dtype != torch.float16, f"a gradient is {gradient.dtype}; {advice}")
        finite = all_finite(gradients)
        torch._foreach_mul_(gradients, as_fp32(1 / self.value))
        return finite

    def update(self, finite: bool) -> None:
        """Count a step as good or skipped, and move the scale.

        Raises FloatingPointError where step after step is skipped and a lower scale cannot help.
        """
        if finite:
            self.good += 1
            self.since_change, self.in_a_row = self.since_change + 1, 0
            if self.since_change == self.interval:
                self.change(self.growth)
        else:
            self.skipped += 1
            self.in_a_row += 1
            self.change(self.backoff)
            self.stop_if_hopeless()

    def change(self, factor: float) -> None:
        """Multiply the value, but never beyond FP32's range."""
        changed = as_fp32(self.value * factor)
        self.value = changed if changed < float("inf") else self.value
        self.since_change = 0

    def stop_if_hopeless(self) -> None:
        """Raise FloatingPointError after a skip that a lower scale will not prevent next time."""
        if self.value < FLOOR or self.in_a_row >= PATIENCE:
            raise FloatingPointError(
                f"the gradients of step {self.steps - 1} overflow like those of "
                f"{self.in_a_row - 1} steps before it, all skipped; the loss scale is now "
                f"{self.value:g}, and a lower one will not help: look at rate, data and model"
            )

    def state_dict(self) -> dict[str, float]:
        """Value and counts, for a checkpoint's `about`."""
        return {name: getattr(self, name) for name in COUNTS}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on where `state_dict` was taken. Raises ValueError where something is missing."""
        missing = sorted(set(COUNTS) - set(state))
        require(not missing, f"the state of the loss scale lacks {missing}; it needs {COUNTS}")
        require_number("the loss scale", state["value"], above=0)
        for name in COUNTS:
            setattr(self, name, state[name])

    def __repr__(self) -> str:
        return f"LossScale({self.value:g}: {self.good} good steps, {self.skipped} skipped)"


def static(value: float) -> LossScale:
    """A loss scale that stays as it is; steps whose gradients overflow are skipped all the same."""
    return LossScale(value, growth=1.0, backoff=1.0)


def as_fp32(number: float) -> float:
    """The FP32 number next to `number`, infinite beyond the range; torch keeps scales in FP32."""
    return torch.tensor(number, dtype=torch.float32).item()


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds an infinity or a NaN; one wait for the device in all."""
    checks = [tensor.isfinite().all() for tensor in tensors]
    return not checks or bool(torch.stack(checks).all())

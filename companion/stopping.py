"""Stop a training before a number that is none reaches the weights.

A loss or gradient that is not finite makes every weight that it touches NaN, and the next
checkpoint overwrites the last good one. So a step asks first, and changes nothing when the answer
is bad.
"""

from __future__ import annotations

import math
from pathlib import Path

from torch.optim import Optimizer

from companion.checks import require_whole
from companion.storage import load_tensors


class Watch:
    """Counts the good steps of a training, and tells where it stands when one is not good.

    `start` is the number of the first step, as `train` counts. `checkpoint` is the file that the
    caller saves to; it is only read, for the message.
    """

    def __init__(self, *, start: int = 0, checkpoint: str | Path | None = None) -> None:
        require_whole("start", start, least=0)
        self.step, self.good, self.checkpoint = start, 0, checkpoint

    def require_finite(self, name: str, value: float, optimizer: Optimizer) -> None:
        """Raise FloatingPointError for NaN or infinity, and drop the gradients, which are spoilt.

        The message names the value, the step, the rate and the last good state. Weights, states
        and checkpoint stay as they are.
        """
        if not math.isfinite(value):
            optimizer.zero_grad()
            rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(_rates(optimizer)))
            text = f"the {name} is {value} at step {self.step}, rate {rates}; {self._left()}"
            raise FloatingPointError(f"{text}. Go on from there with a lower rate")

    def passed(self) -> None:
        """Count a step that changed the weights."""
        self.step += 1
        self.good += 1

    def _left(self) -> str:
        when = f"after step {self.step - 1}" if self.good else f"before step {self.step}"
        text = f"weights and states are those {when}"
        if self.checkpoint is None or not Path(self.checkpoint).is_file():
            return f"{text}, and there is no checkpoint"
        return f"{text}, and {self.checkpoint} {held_by(self.checkpoint)}"


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def held_by(path: str | Path) -> str:
    """Which weights a checkpoint holds; a damaged one must not hide the error that is told."""
    try:
        return f"holds those before step {load_tensors(path)[1]['step']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "is no checkpoint that can be read"

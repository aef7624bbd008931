"""Pure low precision: no FP32 copy of anything, so the update must be rounded with care.

A BF16 number near 0.5 has neighbours 0.004 away. An update of 0.001 does not reach half of that, so
nearest rounding gives the old weight back, at every step: the update is *lost*. Stochastic rounding
goes up or down with chances such that the mean is right, so many small updates add up.

    nearest      0.5 - 0.001 = 0.5 for ever
    stochastic   0.498 about every other step, else 0.5; the mean falls by 0.001 a step

One update is computed in FP32; only what is stored is rounded: weights and both running averages.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from companion.checks import require
from companion.losses import next_token_loss
from companion.optimizers.options import matrices_and_vectors, settings
from companion.precision.formats import FORMATS
from companion.precision.rounding import stochastically_rounded
from companion.surgery import copied

STORED = {torch.bfloat16: "BF16", torch.float16: "FP16"}  # types that round an FP32 result


def pure(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A copy whose parameters and buffers are all in `dtype`, and so its gradients too.

    Raises ValueError for another type than BF16 or FP16.
    """
    known = ", ".join(map(str, STORED))
    require(dtype in STORED, f"dtype is {dtype}; pure low precision knows {known}")
    return copied(model).to(dtype)


def pure_step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> Tensor:
    """`plain_step` that computes on FP32 copies of the weights; the loss in nats.

    Weights, gradients and states are in the model's type; what lies between is not rounded. It is
    for processors without BF16 units, where `plain_step` on a BF16 model takes many times as long.
    """
    tensors = dict(model.named_buffers()) | dict(model.named_parameters())
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    loss = next_token_loss(functional_call(model, wide, (batch,)), batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def adamw_update(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: int, group: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """New weight and running averages, from the old ones and a gradient, all of one shape.

    mean   m <- b1 m + (1 - b1) g,    square v <- b2 v + (1 - b2) g^2,
    weight w <- (1 - rate decay) w - rate m' / (sqrt(v') + epsilon),
    where m' = m / (1 - b1^step) and v' likewise. AdamW, arXiv:1711.05101.
    """
    first, second = group["betas"]
    mean = mean.lerp(gradient, 1 - first)
    square = square.lerp(gradient.square(), 1 - second)
    size = (square / (1 - second**step)).sqrt() + group["epsilon"]
    kept = weight * (1 - group["lr"] * group["decay"])
    return kept - group["lr"] / (1 - first**step) * mean / size, mean, square


class PureAdamW(Optimizer):
    """AdamW that keeps its states in the type of the parameters; the arithmetic is FP32.

    `stochastic=True` rounds what is stored in BF16 or FP16 up or down by chance, else to the
    nearest; FP32 and FP64 parameters are not rounded and give what torch.optim.AdamW gives.
    A `generator` must be on the device of the parameters. Takes parameters or groups.
    """

    def __init__(
        self,
        params,
        rate: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        epsilon: float = 1e-8,
        decay: float = 0.1,
        stochastic: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(params, settings(rate, betas, decay, epsilon=epsilon))
        self.stochastic, self.generator = stochastic, generator
        self._lost: Tensor | int = 0
        self._asked: Tensor | int = 0

    @property
    def lost_share(self) -> float:
        """Share of the updates so far that changed nothing, of those that FP32 would not lose."""
        return int(self._lost) / max(1, int(self._asked))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict) -> None:
        state, wide = self.state[parameter], _wide(parameter)
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, so that reading it waits for nothing
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
        state["step"] += 1
        old = (_wide(parameter.grad), _wide(state["mean"]), _wide(state["square"]))
        new, mean, square = adamw_update(wide, *old, int(state["step"]), group)
        self._store(state["mean"], mean)
        self._store(state["square"], square)
        self._store(parameter, new)
        asked = new != wide
        self._asked = self._asked + asked.sum()
        self._lost = self._lost + (asked & (parameter == wide)).sum()

    def _store(self, place: Tensor, numbers: Tensor) -> None:
        """Round numbers to the type of `place` and put them there."""
        if self.stochastic and place.dtype in STORED:
            numbers = stochastically_rounded(numbers, STORED[place.dtype], self.generator)
        place.copy_(numbers)


def pure_adamw(
    model: nn.Module,
    rate: float = 1e-3,
    *,
    decay: float = 0.1,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
) -> PureAdamW:
    """`PureAdamW` with the settings of `companion.training.adamw`: only matrices decay."""
    groups = matrices_and_vectors(model, decay)
    return PureAdamW(groups, rate, stochastic=stochastic, generator=generator)


def would_be_lost(weights: Tensor, updates: Tensor, format: str = "BF16") -> Tensor:
    """Where an update is not 0 and under half a spacing of the weight it is added to: a mask.

    Predicts what nearest rounding loses, from sizes alone.
    """
    half = FORMATS[format].spacing(weights) / 2
    return (updates != 0) & (updates.abs() < half)


def _wide(numbers: Tensor) -> Tensor:
    """16-bit numbers in FP32, others as they are."""
    return numbers.float() if numbers.dtype in STORED else numbers

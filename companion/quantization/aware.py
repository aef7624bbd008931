"""Quantization-aware training: let the model feel its rounded weights while it learns.

Forward, every weight is rounded as `quantize` would round it. Backward, rounding is taken for the
identity, for its true derivative is 0 almost everywhere: the straight-through estimator. The
weights that learn stay in FP32; `quantize` with the same options then gives the model that was
trained for, to the bit.

Bengio et al., arXiv:1308.3432; Jacob et al., arXiv:1712.05877.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from companion.model import LanguageModel
from companion.quantization.replacing import Coding, codings, nearest, require_plain
from companion.training import Step, plain_step


def straight_through(weight: Tensor, coding: Coding) -> Tensor:
    """The weight (O, I) as `coding` rounds it; its gradient passes as if nothing had happened."""
    with torch.no_grad():
        rounded = nearest("", weight.float(), coding).numbers(weight.shape[1]).to(weight.dtype)
    return rounded + (weight - weight.detach())  # adds 0, and the gradient


class Aware(nn.Module):
    """A model seen through its rounded weights: same parameters, which this rounds on each call."""

    def __init__(self, model: LanguageModel, plan: Mapping[str, Coding]) -> None:
        super().__init__()
        self.model, self.plan = model, plan

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, vocab) with every weight of the plan rounded."""
        tied = self.model.head.weight is self.model.embedding.weight
        names = [name for name in self.plan if not (tied and name == "head")]  # rounded once
        weights = {
            f"{name}.weight": straight_through(
                self.model.get_submodule(name).weight, self.plan[name]
            )
            for name in names
        }
        return functional_call(self.model, weights, (tokens,))


def aware_step(bits: int | str | Mapping[str, int | str] = 4, **options) -> Step:
    """A training step through weights rounded as `quantize(model, bits, **options)` rounds them.

    Raises ValueError, at its first step, for options that `quantize` would refuse.
    """

    def step(model: LanguageModel, optimizer: Optimizer, batch: Tensor) -> Tensor:
        require_plain(model)
        return plain_step(Aware(model, codings(model, bits, **options)), optimizer, batch)

    return step

"""LAMB: Adam says where to, the length of the weights says how far.

With a large batch one wants few, large steps, and one rate does not suit all tensors: a step that
is a hundredth of one matrix may be half of another. LAMB gives every matrix a step that is the same
share of its own length. You et al., arXiv:1904.00962.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from companion.optimizers.options import settings


class Lamb(Optimizer):
    """x <- x - rate |x| / |u| u, with u = mean / (sqrt(square) + epsilon) + decay x.

    Mean and square are Adam's averages, freed of their start at 0; |.| is the length of a whole
    tensor, and |x| / |u| its *trust ratio*: 1 where x or u is 0, and for vectors. Takes parameters
    or groups. Raises ValueError for settings without a meaning.
    """

    def __init__(
        self,
        params,
        rate: float = 1e-2,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-6,
        decay: float = 0.01,
    ) -> None:
        super().__init__(params, settings(rate, betas, decay, epsilon=epsilon))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._adam(parameter, group).add(parameter, alpha=group["decay"])
                    parameter.sub_(update * (group["lr"] * trust_ratio(parameter, update)))

    def _adam(self, parameter: Tensor, group: dict) -> Tensor:
        state, (slow, slower) = self.state[parameter], group["betas"]
        step = state.setdefault("step", torch.zeros(()))
        mean = state.setdefault("mean", torch.zeros_like(parameter))
        square = state.setdefault("square", torch.zeros_like(parameter))
        step += 1
        mean.lerp_(parameter.grad, 1 - slow)
        square.mul_(slower).addcmul_(parameter.grad, parameter.grad, value=1 - slower)
        unbiased = square / (1 - slower ** step.item())
        return (mean / (1 - slow ** step.item())) / unbiased.sqrt_().add_(group["epsilon"])


def trust_ratio(weight: Tensor, update: Tensor) -> Tensor:
    """|weight| / |update|, a scalar: what makes the update as long as the weight.

    1 where either has no length, or the ratio no use: a vector of norms has no scale of its own.
    """
    lengths = weight.norm(), update.norm()
    if weight.ndim < 2:
        return torch.ones_like(lengths[0])
    return torch.where((lengths[0] > 0) & (lengths[1] > 0), lengths[0] / lengths[1], 1.0)

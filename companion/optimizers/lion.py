"""Lion: every weight moves by the same amount; only the direction is asked of the gradient.

Found by a search over programs. It keeps one average where Adam keeps two, and looks at more of
the newest gradient when it moves than when it remembers. Chen et al., arXiv:2302.06675.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from companion.optimizers.options import settings


class Lion(Optimizer):
    """x <- x - rate (sign(b1 average + (1 - b1) gradient) + decay x), then average by b2.

    A sign is larger than what Adam divides out, so its authors take a rate 3 to 10 times smaller
    than AdamW's, and a decay as much larger. Takes parameters or groups. Raises ValueError for
    settings without a meaning.
    """

    def __init__(
        self,
        params,
        rate: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        decay: float = 0.1,
    ) -> None:
        super().__init__(params, settings(rate, betas, decay))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            rate, (looking, remembering) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state, gradient = self.state[parameter], parameter.grad
                    average = state.setdefault("average", torch.zeros_like(parameter))
                    direction = gradient.lerp(average, looking).sign_()
                    parameter.mul_(1 - rate * group["decay"]).sub_(direction, alpha=rate)
                    average.lerp_(gradient, 1 - remembering)

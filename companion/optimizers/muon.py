"""Muon: a matrix moves by its averaged gradient made into a matrix that only rotates.

So weak directions move as far as strong ones. `torch.optim.Muon` does that in BF16, which takes
many times as long as FP32 on a processor without BF16 units; this one works in the type of the
weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from companion.checks import require_number

STEPS = 5  # of the Newton-Schulz iteration
QUINTIC = (3.4445, -4.7750, 2.0315)  # its coefficients, chosen by Muon's author for fast growth


def orthogonalized(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition U S V^T, roughly: singular values near 1.

    Newton-Schulz iteration with a quintic that pushes every singular value into about 0.7 to 1.2.
    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    a, b, c = QUINTIC
    for _ in range(STEPS):
        gram = x @ x.T
        quartic = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.addmm(x, quartic, x, beta=a)
    return x.T if tall else x


class Muon(Optimizer):
    """Muon for the matrices inside the blocks, AdamW for embedding, head and norms.

    A matrix moves by the rate times an update whose root mean square is 0.2, about that of AdamW
    (Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982), so one rate serves both.
    """

    def __init__(
        self, model: nn.Module, rate: float = 1e-2, *, momentum: float = 0.95, decay: float = 0.1
    ) -> None:
        require_number("rate", rate, above=0)
        named = list(model.named_parameters())
        inside = [p for name, p in named if p.ndim == 2 and name.startswith("blocks.")]
        others = [p for name, p in named if p.ndim != 2 or not name.startswith("blocks.")]
        groups = [{"params": inside, "matrices": True}, {"params": others, "matrices": False}]
        super().__init__(groups, {"lr": rate, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            update = self._rotated if group["matrices"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    change = update(parameter, group)
                    if group["matrices"]:
                        parameter.mul_(1 - group["lr"] * group["decay"])
                    parameter.add_(change, alpha=-group["lr"])

    def _rotated(self, parameter: Tensor, group: dict) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        average = state.setdefault("average", torch.zeros_like(parameter))
        average.lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(average, group["momentum"])  # Nesterov's look ahead
        return orthogonalized(ahead) * (0.2 * max(parameter.shape) ** 0.5)

    def _adam(self, parameter: Tensor, group: dict) -> Tensor:
        """Adam's update with averages over about 10 and 20 steps, arXiv:1412.6980."""
        state, gradient = self.state[parameter], parameter.grad
        step = state.setdefault("step", torch.zeros(()))
        mean = state.setdefault("mean", torch.zeros_like(parameter))
        square = state.setdefault("square", torch.zeros_like(parameter))
        step += 1
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient.square(), 0.05)
        unbiased = square / (1 - 0.95**step)
        return (mean / (1 - 0.9**step)) / (unbiased.sqrt() + 1e-8)

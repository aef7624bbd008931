"""The same model with another activation in its MLPs, and as many parameters.

An activation bends: without one, two matrices in a row are one matrix. ReLU, Leaky ReLU, GELU and
SiLU stand between two matrices. SwiGLU, the one of `companion.model`, has a third matrix, whose
outputs gate the others. So that neither has more to learn with, an MLP of two matrices gets half as
many neurons again: 3 W M numbers are 2 W x 1.5 M.

The FLOPs of the products are then equal too. What differs is the activation: how many numbers pass
through it, and what one of them costs.

Symbols: B batch, T positions, L layers, W width, M hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, leaky_relu, relu, silu

from companion.checks import require, require_known, require_whole
from companion.model import MLP, LanguageModel, ModelConfig
from companion.surgery import copied, swapped

GATED = "SwiGLU"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": relu,
    "Leaky ReLU": partial(leaky_relu, negative_slope=0.01),
    "GELU": gelu,  # x times the chance that a normal number is below x
    "SiLU": silu,  # x times its sigmoid
}
NAMES = (*ACTIVATIONS, GATED)


class PlainMLP(nn.Module):
    """Two matrices and an activation between them: (..., W) -> (..., W)."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


def plain_hidden(hidden: int) -> int:
    """Neurons of an MLP of two matrices that has as many parameters as SwiGLU of `hidden`: 1.5 M.

    For an odd number the parameters differ by one part in 3 M.
    """
    require_whole("hidden", hidden)
    return 3 * hidden // 2


def with_activation(
    model: LanguageModel, activation: str, *, generator: torch.Generator | None = None
) -> LanguageModel:
    """A copy whose MLPs have this activation and, but for "SwiGLU", new untrained weights.

    Everything else keeps its weights. Two calls with generators of the same seed give the same
    matrices for every activation of two. Raises ValueError for an unknown activation and for a
    model without its plain MLPs.
    """
    require_known("activation", activation, NAMES)
    plain = all(isinstance(block.mlp, MLP) for block in model.blocks)
    require(plain, "the model's MLPs are not the plain ones; start from a LanguageModel as made")
    if activation == GATED:
        return copied(model)
    config = model.config

    def make(name: str, mlp: nn.Module) -> nn.Module:
        width, hidden = mlp.up.in_features, plain_hidden(mlp.up.out_features)
        with torch.random.fork_rng(devices=[]):  # the first weights do not last
            new = PlainMLP(width, hidden, activation)
        last = (hidden * 2 * config.layers) ** -0.5  # what the model's own matrices start with
        nn.init.normal_(new.up.weight, std=width**-0.5, generator=generator)
        nn.init.normal_(new.down.weight, std=last, generator=generator)
        return new.to(mlp.up.weight)

    return swapped(model, lambda name, module: isinstance(module, MLP), make)


def mlp_parameters(config: ModelConfig, activation: str) -> int:
    """Numbers the MLPs learn: L x 3 W M for SwiGLU, L x 2 W (1.5 M) for the others."""
    require_known("activation", activation, NAMES)
    each = 3 * config.hidden if activation == GATED else 2 * plain_hidden(config.hidden)
    return config.layers * config.width * each


def mlp_flops(config: ModelConfig, activation: str, positions: int, *, batch: int = 1) -> int:
    """FLOPs of the MLPs' products in one forward pass: 2 B T x `mlp_parameters`.

    The activation itself is left out, as in `companion.cost` and in torch's counter.
    """
    require_whole("positions", positions)
    require_whole("batch", batch)
    return 2 * batch * positions * mlp_parameters(config, activation)


def activated_numbers(config: ModelConfig, activation: str, positions: int, batch: int = 1) -> int:
    """Numbers that pass through the activation in one forward pass: L B T x M, or x 1.5 M."""
    require_known("activation", activation, NAMES)
    require_whole("positions", positions)
    require_whole("batch", batch)
    hidden = config.hidden if activation == GATED else plain_hidden(config.hidden)
    return config.layers * batch * positions * hidden


def activation_passes(
    config: ModelConfig, activation: str, positions: int, batch: int = 1
) -> Callable[[], None]:
    """A call that does forward and backward what all activations of one training step do.

    Race it against the step: the ratio is the activation's share of the step's time. SwiGLU's
    product with the other half counts, for it is part of what gating costs.
    """
    count = activated_numbers(config, activation, positions, batch) // config.layers
    x, up, grad = torch.randn(3, batch * positions, count // (batch * positions))
    x.requires_grad_()
    up.requires_grad_()

    def passes() -> None:
        for _ in range(config.layers):
            if activation == GATED:
                torch.autograd.grad(silu(x) * up, (x, up), grad)
            else:
                torch.autograd.grad(ACTIVATIONS[activation](x), x, grad)

    return passes

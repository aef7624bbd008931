"""LoRA: a frozen model, and beside each matrix a product of two thin ones that learns.

y = W x + s U (D x), with W (O, I) frozen, D (R, I) random and U (O, R) zero at first: the model
starts as the base, and training moves R (O + I) numbers a matrix. Only they get gradients and
optimizer states. Afterwards W + s U D is one matrix again, so that reading costs nothing more. Many
such additions can share one base. Hu et al., arXiv:2106.09685, whose alpha / r is s here.

Axes: O outputs, I inputs, R inner width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from companion.checks import require, require_number, require_whole
from companion.sharing.low_rank import linear_of, require_inner, require_plain
from companion.sharing.ties import require_untied
from companion.surgery import Where, chosen, linears, swapped


class LoRA(nn.Module):
    """A frozen linear layer with a low-rank addition of its own."""

    def __init__(self, base: nn.Linear, down: Tensor, scale: float) -> None:
        """An addition of s U D with `down` (R, I) as D and zeros as U."""
        super().__init__()
        self.base, self.scale = base, scale
        self.down = linear_of(down)
        self.up = linear_of(down.new_zeros(base.out_features, len(down)))

    @property
    def inner(self) -> int:
        return self.down.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))

    @torch.no_grad()
    def weight(self) -> Tensor:
        """The one matrix (O, I) that does the same."""
        return self.base.weight + self.scale * self.up.weight @ self.down.weight


def lora(
    model: nn.Module,
    inner: int = 8,
    *,
    scale: float = 1.0,
    where: Where = linears,
    seed: int = 0,
) -> nn.Module:
    """A copy, frozen but for a `LoRA` addition to each chosen linear layer.

    D is normal with spread 1 / sqrt(I). Raises ValueError for an inner width too large for one of
    the layers, a scale that is not above 0, layers with a bias, and a layer whose weight another
    layer holds too.
    """
    require_number("scale", scale, above=0)
    require_whole("seed", seed, least=0)
    require_untied(model, chosen(model, where))
    random = torch.Generator().manual_seed(seed)

    def make(name: str, layer: nn.Module) -> LoRA:
        require_plain(name, layer)
        require_inner(inner, *layer.weight.shape)
        down = torch.randn(inner, layer.in_features, generator=random) * layer.in_features**-0.5
        return LoRA(layer, down.to(layer.weight), scale)

    new = swapped(model, where, make)
    own = {id(parameter) for parameter in learned(new)}
    for parameter in new.parameters():
        parameter.requires_grad_(id(parameter) in own)
    return new


def learned(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a LoRA model adds to its base."""
    added = [module for module in model.modules() if isinstance(module, LoRA)]
    return [layer.weight for module in added for layer in (module.down, module.up)]


def merged(model: nn.Module) -> nn.Module:
    """A copy with each addition added in: plain layers, all of them free to learn again.

    Raises ValueError if there is none.
    """

    def make(name: str, module: LoRA) -> nn.Linear:
        return linear_of(module.weight())

    require(bool(learned(model)), "the model has no LoRA layer to merge; lora(model) adds some")
    return swapped(model, lambda _, module: isinstance(module, LoRA), make).requires_grad_(True)

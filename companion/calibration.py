"""Calibration: what goes into each linear layer while a model reads some text.

Layers that read the same vectors (query, key and value; gate and up) share what was seen.

Axes: N positions seen, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from companion.checks import require, require_finite
from companion.surgery import Where, chosen, linears


class Inputs:
    """Sums and extremes over the vectors (N, I) that one layer read."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.positions = 0
        self.products = torch.zeros(width, width, device=device)  # X^T X
        self.magnitudes = torch.zeros(width, device=device)  # sum of |x| by input
        self.largest = torch.zeros(width, device=device)  # largest |x| by input
        self.low, self.high = 0.0, 0.0  # of all inputs; 0 is always inside

    def add(self, x: Tensor) -> None:
        """Count vectors (..., I). Raises ValueError if one is not finite."""
        x = x.detach().flatten(0, -2).float()
        require_finite(x, "calibration inputs")
        self.positions += len(x)
        self.products.addmm_(x.T, x)
        self.magnitudes += x.abs().sum(0)
        self.largest = torch.maximum(self.largest, x.abs().amax(0))
        self.low, self.high = min(self.low, x.min().item()), max(self.high, x.max().item())


@torch.no_grad()
def observe(
    model: nn.Module, batches: Iterable[Tensor], *, where: Where = linears
) -> dict[str, Inputs]:
    """Let a model read batches of tokens (B, T); the `Inputs` of each chosen layer, by name.

    The model comes out as it went in, whatever happens. Raises ValueError for no batches, and for
    activations that are not finite.
    """
    watch = _Watch()
    layers = chosen(model, where)
    require(len(layers) > 0, "no layer is chosen; print the model to see the names there are")
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: watch.see(name, args[0]))
        for name, layer in layers.items()
    ]
    device = next(model.parameters()).device
    try:
        for tokens in batches:
            model(tokens.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    require(len(watch.found) > 0, "there are 0 calibration batches; give at least one")
    return watch.found


def seen(inputs: Mapping[str, Inputs], name: str, weight: Tensor) -> Inputs:
    """The inputs of one layer. ValueError if they were not observed, or are of another width."""
    require(name in inputs, f"no inputs of {name} were observed; calibrate on the same model")
    found, wanted = len(inputs[name].magnitudes), weight.shape[1]
    require(found == wanted, f"inputs of {found} numbers were observed for {name}, not of {wanted}")
    return inputs[name]


class _Watch:
    """Adds each tensor once, however many layers read it in a row."""

    def __init__(self) -> None:
        self.found: dict[str, Inputs] = {}
        self.last: Tensor | None = None
        self.reader = ""

    def see(self, name: str, x: Tensor) -> None:
        same = x is self.last
        if name not in self.found:
            new = self.found[self.reader] if same else Inputs(x.shape[-1], x.device)
            self.found[name] = new
        if not same:
            self.found[name].add(x)
            self.last, self.reader = x, name

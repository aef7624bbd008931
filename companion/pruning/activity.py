"""What neurons do while a model reads: the mean and the variance of what each puts out.

A neuron's output, silu(gate) x up, is what the down projection reads. One whose output never varies
adds the same vector at every position. A layer with a bias could hold that vector when the neuron
goes; this model has no biases, so what goes with a neuron is its mean too, and the variance alone
does not see it.

Axes: L layers, M neurons, N positions seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from companion.checks import require, require_finite
from companion.losses import next_token_loss
from companion.model import LanguageModel


@dataclass(frozen=True, eq=False)
class Activity:
    """Moments over `positions` positions of each neuron's output, (L, M) in FP64."""

    positions: int
    mean: Tensor
    variance: Tensor  # of the outputs seen: divided by N

    @property
    def norm(self) -> Tensor:
        """Root of the mean square: what the mean and the variance amount to together."""
        return (self.mean.square() + self.variance).sqrt()


@torch.no_grad()
def neuron_activity(model: LanguageModel, batches: Iterable[Tensor]) -> Activity:
    """Let a model read batches of tokens (B, T) and see what its neurons put out.

    The model comes out as it went in. Raises ValueError for no batches, and outputs not finite.
    """
    shape = (model.config.layers, model.config.hidden)
    device = next(model.parameters()).device
    sums, squares = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
    positions = 0

    def see(layer: int, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).double()
        require_finite(x, f"outputs of the neurons of block {layer}")
        sums[layer] += x.sum(0)
        squares[layer] += x.square().sum(0)

    with reading([block.mlp.down for block in model.blocks], see):
        for tokens in batches:
            model(tokens.to(device))
            positions += tokens.numel()
    require(positions > 0, "there are 0 batches to read; give at least one")
    mean = sums / positions
    return Activity(positions, mean, (squares / positions - mean.square()).clamp(min=0))


def first_order(model: LanguageModel, batches: Iterable[Tensor], layers: list[nn.Module]) -> Tensor:
    """First-order change of the loss were an input of a layer 0 at all positions: (S, L, I).

    That is the sum over a sequence's positions of input x gradient, for each of S sequences; its
    sign says whether the loss falls or rises. `layers` have I inputs each. Molchanov et al.,
    arXiv:1611.06440. Raises ValueError for no batches. No gradient is left in the model.
    """
    device, found = next(model.parameters()).device, []
    for tokens in batches:
        inputs: dict[int, Tensor] = {}

        def see(layer: int, x: Tensor, inputs: dict[int, Tensor] = inputs) -> Tensor:
            inputs[layer] = x if x.requires_grad else x.detach().requires_grad_()
            return inputs[layer]

        with torch.enable_grad(), reading(layers, see):
            tokens = tokens.to(device)
            loss = next_token_loss(model(tokens), tokens) * len(tokens)  # a mean for each sequence
        gradients = torch.autograd.grad(loss, list(inputs.values()))
        products = zip(inputs.values(), gradients, strict=True)
        found.append(torch.stack([(x.detach() * g).sum(1) for x, g in products], dim=1))
    require(len(found) > 0, "there are 0 batches to read; give at least one")
    return torch.cat(found)


@contextmanager
def reading(layers: Iterable[nn.Module], see):
    """Within it, `see(index, x)` gets what each layer reads, and may give another x instead."""
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, index=index: see(index, args[0]))
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

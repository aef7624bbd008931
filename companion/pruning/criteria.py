"""Criteria: how much each weight matters, guessed without trying what happens when it is gone.

A criterion is a function of a layer's name and its weight (O, I) that gives scores of the same
shape. Only their order counts: the weights with the lowest scores go first, and a weight that is
zero already scores lowest, so that pruning further keeps the zeros there are.

Axes: O outputs, I inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from companion.calibration import Inputs, seen
from companion.checks import require, require_whole
from companion.losses import next_token_loss
from companion.surgery import Where, chosen, linears

Scores = Callable[[str, Tensor], Tensor]


def magnitude(name: str, weight: Tensor) -> Tensor:
    """|w|: what is small is taken to matter little, whatever it is multiplied by."""
    return weight.abs()


def at_random(seed: int = 0) -> Scores:
    """Scores by chance: the control. A layer's depend on the seed and its name alone.

    With one seed, what goes at a low sparsity goes at every higher one too.
    """
    require_whole("seed", seed, least=0)

    def scores(name: str, weight: Tensor) -> Tensor:
        mix = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        random = torch.Generator().manual_seed(int.from_bytes(mix[:8], "big", signed=True))
        chances = 1 - torch.rand(weight.shape, generator=random)  # above 0, which is for zeros
        return chances.to(weight.device).masked_fill(weight == 0, 0)

    return scores


def wanda(inputs: Mapping[str, Inputs]) -> Scores:
    """|w| times the length of the input's column of calibration data, ||X_j||: arXiv:2306.11695.

    Made for comparing within rows: `prune(model, scores=wanda(inputs), pattern=over_rows)`.
    """

    def scores(name: str, weight: Tensor) -> Tensor:
        squares = seen(inputs, name, weight).products.diagonal()
        return weight.abs() * squares.sqrt().to(weight.dtype)

    return scores


def taylor(model: nn.Module, batches: Iterable[Tensor], *, where: Where = linears) -> Scores:
    """|w times dL/dw|: how much the loss L would change, to first order, if w became zero.

    L is the mean next-token loss over the batches of tokens (B, T). The model is left as it is.
    Molchanov et al., arXiv:1611.06440 and arXiv:1906.10771, who score neurons by it.
    Raises ValueError for no batches.
    """
    gradients = mean_gradients(model, batches, where=where)

    def scores(name: str, weight: Tensor) -> Tensor:
        require(name in gradients, f"no gradient of {name} was taken; choose it with `where`")
        found, wanted = tuple(gradients[name].shape), tuple(weight.shape)
        require(found == wanted, f"{name} has weights {wanted}, its gradient is {found}")
        return (weight * gradients[name].to(weight.dtype)).abs()

    return scores


def mean_gradients(
    model: nn.Module, batches: Iterable[Tensor], *, where: Where = linears
) -> dict[str, Tensor]:
    """Gradient of the mean next-token loss by each chosen weight, (O, I), by layer name."""
    layers = chosen(model, where)
    require(len(layers) > 0, "no layer is chosen; print the model to see the names there are")
    with torch.enable_grad():
        weights = {n: layer.weight.detach().requires_grad_() for n, layer in layers.items()}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    device = next(model.parameters()).device
    count = 0
    for tokens in batches:
        for total, gradient in zip(
            sums.values(), _gradients(model, weights, tokens.to(device)), strict=True
        ):
            total += gradient
        count += 1
    require(count > 0, "there are 0 batches of tokens; give at least one")
    return {name: total / count for name, total in sums.items()}


@torch.enable_grad()
def _gradients(model: nn.Module, weights: Mapping[str, Tensor], tokens: Tensor) -> tuple:
    named = {f"{name}.weight": weight for name, weight in weights.items()}
    loss = next_token_loss(functional_call(model, named, (tokens,)), tokens)
    return torch.autograd.grad(loss, list(weights.values()))

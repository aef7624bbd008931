"""How large are the numbers of a training, and which of them does a format lose?

Numbers are counted in bins between powers of two. A format turns to zero what is at most half its
smallest denormal, itself a power of two: so what underflows can be read off the bins, exactly, and
a loss scale of a power of two only shifts them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from companion.checks import require, require_number
from companion.losses import next_token_loss
from companion.precision.emulation import to_format
from companion.precision.formats import Format, format_of

Histogram = Mapping[int, int]
FP32_LOWEST = 149  # its smallest denormal is 2^-149


def powers(values: Tensor) -> dict[int, int]:
    """How many values lie in each bin: `k` stands for 2^(k-1) < |x| <= 2^k. Zeros are left out.

    Raises ValueError for values that are not finite.
    """
    sizes = values.detach().flatten().abs()
    require(bool(sizes.isfinite().all()), "some values are not finite; they lie in no bin")
    fraction, exponent = torch.frexp(sizes[sizes > 0])  # fraction in [0.5, 1)
    bins = exponent - (fraction == 0.5).int()  # a power of two is the upper end of its bin
    counts = torch.bincount(bins + FP32_LOWEST).tolist()
    return {k - FP32_LOWEST: count for k, count in enumerate(counts) if count > 0}


def predicted_underflow(
    histogram: Histogram, format: Format | str = "FP16", scale: float = 1.0
) -> float:
    """Share of the values in the bins that become zero in a format, after scaling.

    A tie between zero and the smallest denormal rounds to zero, the even one. Raises ValueError
    for a scale that is no power of two (its bins would not shift whole), without values, and for an
    unknown format.
    """
    require_number("scale", scale, above=0)
    fraction, exponent = math.frexp(scale)
    require(fraction == 0.5, f"scale is {scale}; a power of two is expected")
    total = sum(histogram.values())
    require(total > 0, "the histogram holds no values; its share of underflow is not defined")
    last = math.log2(format_of(format).smallest_denormal / 2)  # the bin that ends at half of it
    return sum(count for k, count in histogram.items() if k + exponent - 1 <= last) / total


def counted_underflow(values: Tensor, format: str = "FP16", scale: float = 1.0) -> float:
    """Share of the values other than zero that are zero once scaled and rounded to a format."""
    there = values[values != 0]
    require(there.numel() > 0, "there are no values other than zero")
    return int((to_format(format)(there * scale) == 0).sum()) / there.numel()


def numbers_of_a_step(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """All numbers of one step on tokens (B, T), by kind: each a line of FP32 numbers on the CPU.

    Weights; activations (what linear layers give); gradients of the loss for both. The model's own
    gradients are left as they are.
    """
    found: dict[str, list[Tensor]] = {"activations": [], "gradients of activations": []}

    def look(module: nn.Module, inputs: object, output: Tensor) -> None:
        found["activations"].append(output.detach())
        output.register_hook(found["gradients of activations"].append)

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        loss = next_token_loss(model(batch), batch)
        slopes = torch.autograd.grad(loss, list(model.parameters()))
    finally:
        for hook in hooks:
            hook.remove()
    found = {"weights": list(model.parameters()), **found, "gradients of weights": slopes}
    return {kind: line(tensors).cpu() for kind, tensors in found.items()}


def line(tensors: list[Tensor]) -> Tensor:
    """Tensors as one line of FP32 numbers."""
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors])

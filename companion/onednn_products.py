"""Matrix products through oneDNN: the same numbers from another library, on a processor.

Torch gives products in FP32 to MKL and keeps oneDNN for 16 bits. Both libraries choose their
instructions by the processor. On some, oneDNN chooses better: on an AMD EPYC with AVX-512 it comes
near the peak for every layer of `tiny`, where MKL loses a tenth or more. `libraries_raced` says how
it is here.

A layer needs three products, y = x W' and, for a gradient g, g W and g' x. oneDNN reads the second
factor in any layout, and copies the first where rows do not lie one after another. So the last
product is turned such that the narrower of x and g is copied.

Axes: N positions, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from companion.surgery import swapped
from companion.timing import Race, race


def why_not_onednn() -> str:
    """Why products cannot go through oneDNN here; empty if they can."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch has no operation that gives a product in FP32 to oneDNN"
    return ""


def times(x: Tensor, weight: Tensor) -> Tensor:
    """x W', (..., O), for x (..., I) and W (O, I): by oneDNN in FP32 on a CPU, else by torch."""
    if x.is_cpu and x.dtype == weight.dtype == torch.float32 and not why_not_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.mT


def outer(grad: Tensor, x: Tensor) -> Tensor:
    """g' x, (O, I), for g (N, O) and x (N, I): the gradient of a weight."""
    if grad.shape[1] < x.shape[1]:
        return times(grad.mT.contiguous(), x.mT)
    return times(x.mT.contiguous(), grad.mT).mT


class Product(Function):
    """`Product.apply(x, weight)` is x W'; the gradients are products by oneDNN too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return times(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x = times(grad, weight.mT) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return for_x, None
        return for_x, outer(grad.flatten(0, -2), x.flatten(0, -2))


class OneDnnLinear(nn.Module):
    """`nn.Linear` without a bias, by `Product`. It holds the weight of the layer it replaces."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight)


def on_onednn(model: nn.Module) -> nn.Module:
    """A copy of a model whose linear layers without bias compute by oneDNN. Names stay.

    Raises ValueError for a model that has none.
    """

    def where(name: str, module: nn.Module) -> bool:
        return type(module) is nn.Linear and module.bias is None

    return swapped(model, where, lambda name, module: OneDnnLinear(module))


def libraries_raced(positions: int, inputs: int, outputs: int, *, rounds: int = 6) -> Race:
    """The three products of one layer, by torch's usual library ("torch") and by "oneDNN"."""
    random = torch.Generator().manual_seed(0)
    shapes = ((positions, inputs), (outputs, inputs), (positions, outputs))
    x, weight, grad = (torch.randn(shape, generator=random) for shape in shapes)

    def usual() -> None:
        _ = x @ weight.mT, grad @ weight, grad.mT @ x

    def other() -> None:
        _ = times(x, weight), times(grad, weight.mT), outer(grad, x)

    return race(rounds=rounds, torch=usual, oneDNN=other)

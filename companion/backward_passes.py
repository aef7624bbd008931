"""Backward passes written by hand: fewer passes over the vectors than autograd takes.

`Normalise.apply(x, weight, epsilon)` is what `companion.model.RMSNorm` computes, and
`SwiGLU.apply(gate_up)` what stands between the matrices of `companion.model.MLP`. Gradients can be
taken once, not of gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Normalise(Function):
    """x / rms(x) x weight. With p = grad x: the weight's gradient is sum(p / rms)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = (size.square_() / x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        product = grad * x
        along = (product @ weight).unsqueeze(-1)  # how far the gradient points along x
        back = (grad * weight).mul_(inverse)
        back.addcmul_(x, inverse.pow(3).mul_(along), value=-1 / x.shape[-1])
        return back, inverse.flatten() @ product.flatten(0, -2), None


class SwiGLU(Function):
    """silu(gate) x up from both side by side, (..., 2 M). silu' = silu + sigmoid (1 - silu)."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        ctx.save_for_backward(up, sigmoid, silu)
        return silu * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        up, sigmoid, silu = ctx.saved_tensors
        back = grad.new_empty(*grad.shape[:-1], 2 * grad.shape[-1])
        for_gate, for_up = back.chunk(2, dim=-1)
        torch.mul(grad, silu, out=for_up)
        slope = torch.lerp(silu, silu.new_ones(()), sigmoid)
        torch.mul(slope.mul_(up), grad, out=for_gate)
        return back

"""FP8 training: the products of linear layers take 8-bit operands; all else stays as it was.

FP8 has few powers of two, so each tensor is first multiplied by a *scale* that brings its largest
number to the top of the format, and the product is divided by both scales.

    forward    y  = x W^T       both E4M3: 3 bits of fraction, up to 448
    backward   dx = dy W        dy in E5M2: 2 bits of fraction, up to 57,344, for gradients
               dW = dy^T x      spread over more powers of two than activations do

Sums are in FP32, weights and their gradients in the type they had (FP32 master weights).
Devices with FP8 units multiply the codes (`torch._scaled_mm`); elsewhere the codes are expanded to
FP32 first, which gives the same but for the order of the sums. Micikevicius et al.,
arXiv:2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from companion.checks import next_multiple, require_known, require_whole
from companion.surgery import linears, swapped

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
SCALINGS = ("current", "delayed", "none")
TINY = 1e-12  # a tensor of zeros is scaled as if its largest number were this


@dataclass(frozen=True, eq=False)
class Scaled:
    """Numbers in FP8: `codes` / `scale`. The scale is one FP32 number, a tensor without axes."""

    codes: Tensor
    scale: Tensor

    def numbers(self) -> Tensor:
        """What the codes stand for, in FP32."""
        return self.codes.float() / self.scale

    def turned(self) -> Scaled:
        """The transpose of a matrix."""
        return Scaled(self.codes.t(), self.scale)


def scale_for(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor that brings the size `largest` to the top of an FP8 type: FP32, shape ()."""
    top = torch.finfo(dtype).max
    return (top / largest.double().clamp(min=TINY)).float()  # divided in FP64, rounded once


def scaled(numbers: Tensor, dtype: torch.dtype = FORWARD, scale: Tensor | None = None) -> Scaled:
    """Numbers times a scale (by default their own), clipped to the range of `dtype` and rounded."""
    if scale is None:
        scale = scale_for(numbers.abs().amax(), dtype)
    top = torch.finfo(dtype).max  # before 2.12 torch turned what lies beyond it into nan
    return Scaled((numbers.float() * scale).clamp(-top, top).to(dtype), scale)


def product(a: Scaled, b: Scaled, dtype: torch.dtype = torch.float32) -> Tensor:
    """a (M, K) times b (K, N): sums in FP32, the result (M, N) in `dtype`. Not both in E5M2."""
    return (native_product if has_float8(a.codes.device) else emulated_product)(a, b, dtype)


def has_float8(device: torch.device) -> bool:
    """Whether a device multiplies FP8: CUDA from compute capability 8.9 (Ada, Hopper) on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def emulated_product(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    """`product` in FP32: a product of two FP8 numbers is exact there, only sums are rounded."""
    with torch.autocast(a.codes.device.type, enabled=False):  # which would round the sums
        return (a.codes.float() @ b.codes.float() / (a.scale * b.scale)).to(dtype)


def native_product(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    """`product` by the FP8 units: axes filled with zeros to multiples of 16, b column by column."""
    rows, columns = a.codes.shape[0], b.codes.shape[1]
    left, right = _filled(a.codes), _filled(b.codes.t()).t()
    inverses = a.scale.reciprocal(), b.scale.reciprocal()
    filled = torch._scaled_mm(left, right, *inverses, out_dtype=dtype, use_fast_accum=False)
    return filled[:rows, :columns]


def _filled(codes: Tensor) -> Tensor:
    """Codes (R, C) in rows one after the other, with zeros up to multiples of 16 in both axes."""
    extra = [next_multiple(size, 16) - size for size in codes.shape]
    if any(extra):  # as bytes: not every torch can pad FP8, and zero is the same byte
        filled = pad(codes.view(torch.uint8), (0, extra[1], 0, extra[0]))
        codes = filled.view(codes.dtype)
    return codes.contiguous()


class CurrentScale(nn.Module):
    """Scale by the largest number of the tensor at hand: one more pass over it."""

    def forward(self, numbers: Tensor, dtype: torch.dtype, record: bool) -> Scaled:
        return scaled(numbers, dtype)


class NoScale(nn.Module):
    """A scale of 1: what lies beyond the range is clipped, what lies below it becomes 0."""

    def forward(self, numbers: Tensor, dtype: torch.dtype, record: bool) -> Scaled:
        return scaled(numbers, dtype, numbers.new_ones((), dtype=torch.float32))


class DelayedScale(nn.Module):
    """Scale by the largest number of the last `calls` tensors, the one at hand not among them.

    So no number has to be read before it is rounded; one that has outgrown the past is clipped.
    The first tensor of all is scaled by its own.
    """

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.register_buffer("history", torch.zeros(calls))  # the newest first

    def forward(self, numbers: Tensor, dtype: torch.dtype, record: bool) -> Scaled:
        largest, past = numbers.abs().amax().float(), self.history.max()
        found = scaled(numbers, dtype, scale_for(torch.where(past > 0, past, largest), dtype))
        if record:
            self.history.copy_(torch.cat([largest[None], self.history[:-1]]))
        return found


class _Product(torch.autograd.Function):
    """x W^T with FP8 operands, and both products of its backward pass.

    What is kept for that pass are the codes: one byte a number instead of four or two.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, layer: Float8Linear) -> Tensor:
        inputs = layer.input_scale(x.flatten(0, -2), FORWARD, layer.training)
        weights = layer.weight_scale(weight, FORWARD, layer.training)
        ctx.save_for_backward(inputs.codes, inputs.scale, weights.codes, weights.scale)
        ctx.layer, ctx.shape, ctx.types = layer, x.shape, (x.dtype, weight.dtype)
        return product(inputs, weights.turned(), x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        saved = ctx.saved_tensors
        inputs, weights = Scaled(*saved[:2]), Scaled(*saved[2:])
        slopes = ctx.layer.slope_scale(slope.flatten(0, -2), BACKWARD, ctx.layer.training)
        to_input = product(slopes, weights, ctx.types[0]).view(ctx.shape)
        return to_input, product(slopes.turned(), inputs, ctx.types[1]), None


class Float8Linear(nn.Module):
    """A linear layer with the weight of another, whose three products take FP8 operands."""

    def __init__(self, linear: nn.Linear, scaling: str, calls: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        make = {"current": CurrentScale, "none": NoScale, "delayed": lambda: DelayedScale(calls)}
        self.input_scale, self.weight_scale, self.slope_scale = (make[scaling]() for _ in range(3))
        self.to(linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the type of x; under `torch.autocast` in its type."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y = _Product.apply(x, self.weight, self)
        return y if self.bias is None else y + self.bias


def float8(model: nn.Module, scaling: str = "current", *, calls: int = 16) -> nn.Module:
    """A copy whose linear layers inside the blocks multiply in FP8; the weights are as before.

    `scaling` is "current", "delayed" (by the largest of the last `calls` tensors) or "none".
    A history is written in training mode only. Raises ValueError for another scaling.
    """
    require_known("scaling", scaling, SCALINGS)
    require_whole("calls", calls)
    return swapped(model, linears, lambda _, linear: Float8Linear(linear, scaling, calls))

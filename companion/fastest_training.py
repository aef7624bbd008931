"""Three rungs on top of `companion.faster_training`, for a processor: still the same numbers.

    oneDNN    matrix products by the library that is quicker here (`companion.onednn_products`)
    rows      SwiGLU a few positions at a time: what one operation writes, the next finds in the
              cache; and gate and up alone are kept for the way back, half of what was
    halves    a batch in microbatches (`companion.accumulation`): tensors half as large

Halves are no sure gain. A large tensor that is freed goes back to the operating system, and the
next one comes as new pages: each is cleared, and costs a *page fault* at the first touch. Smaller
tensors stay with the program and are used again; but smaller products are slower. `page_faults`
counts. On Linux a step on `tiny` with six windows of 512 tokens had 76,000 faults whole in one
process, none in another, and 500 at most in halves. So `fastest_step` takes a batch whole unless
told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, silu

from companion.accumulation import accumulating_step
from companion.faster_training import FasterBlock, faster
from companion.model import LanguageModel
from companion.onednn_products import on_onednn
from companion.surgery import swapped
from companion.training import Step

try:
    import resource
except ImportError:  # Windows
    resource = None

ROWS = 128  # positions at a time: 128 x 2 x 704 numbers of `tiny` are 0.7 MB, which a cache holds


class SwiGLUByRows(Function):
    """`companion.backward_passes.SwiGLU`, a few positions at a time; only its input is kept."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        for both, own in zip(_rows(gate_up), _rows(out), strict=True):
            gate, up = both.chunk(2, dim=-1)
            torch.mul(silu(gate), up, out=own)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        back, one = gate_up.new_empty(gate_up.shape), gate_up.new_ones(())
        for both, own, slope in zip(_rows(gate_up), _rows(back), _rows(grad), strict=True):
            (gate, up), (for_gate, for_up) = both.chunk(2, dim=-1), own.chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            bent = gate * sigmoid
            torch.mul(slope, bent, out=for_up)
            torch.mul(torch.lerp(bent, one, sigmoid).mul_(up), slope, out=for_gate)
        return back


def _rows(x: Tensor) -> tuple[Tensor, ...]:
    """Parts of `ROWS` positions each: views of a contiguous x, else of a copy."""
    return x.flatten(0, -2).split(ROWS)


class BlockByRows(FasterBlock):
    """A `FasterBlock`, with its very matrices and norms, whose SwiGLU goes by rows."""

    def __init__(self, block: FasterBlock) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(block.__dict__)

    def _activated(self, gate_up: Tensor) -> Tensor:
        return SwiGLUByRows.apply(gate_up)


def by_rows(model: LanguageModel) -> LanguageModel:
    """A copy of a `faster` model whose SwiGLUs go by rows. Raises ValueError for any other."""

    def where(name: str, module: nn.Module) -> bool:
        return isinstance(module, FasterBlock)

    return swapped(model, where, lambda name, module: BlockByRows(module))


def fastest(model: LanguageModel) -> LanguageModel:
    """`faster` with products by oneDNN and SwiGLU by rows; `separated` turns it back."""
    return on_onednn(by_rows(faster(model)))


def losses_ahead(model: nn.Module, tokens: Tensor) -> Tensor:
    """Surprise at each next token, (B, T - 1) nats; the last position is not read."""
    logits = model(tokens[:, :-1])
    losses = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1)


def fastest_step(microbatches: int = 1) -> Step:
    """`companion.faster_training.faster_step` on a batch in equal parts, one after another."""
    return accumulating_step(microbatches, losses=losses_ahead)


def page_faults(call: Callable[[], object]) -> int | None:
    """How many new pages of memory this process asked for during a call; None on Windows."""
    if resource is None:
        call()
        return None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

"""Activation checkpointing: keep the input of every k-th block, recompute the rest when needed.

The backward pass of a block needs what its forward pass worked out on the way. Kept for all blocks,
that grows with depth. So keep only the input of each *segment* of k blocks; when the backward pass
comes to a segment, run its forward pass again, use what it keeps, and throw it away. Chen et al.,
"Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.

With L blocks, c bytes for the input of one, a for all that one keeps, and s for what the loss
keeps, which is gone before a segment runs again, at the worst moment

    kept(k) = c L / k + max(a k, s)        for a small s least at   k = sqrt(L c / a)

For layers that keep no more than their input that is sqrt(L). A block of a Transformer keeps many
times its input, and k = 1 is best up to about 2 a / c blocks, unless s exceeds a (a large
vocabulary): then segments of up to s / a blocks cost nothing. The price is one more forward pass
through the blocks: about a third more time, whatever k is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from companion import cost
from companion.checks import require, require_whole
from companion.model import KeyValueCache, LanguageModel, ModelConfig
from companion.surgery import copied


class Recompute(torch.autograd.Function):
    """`run(x)` that keeps only x, and runs again in the backward pass."""

    @staticmethod
    def forward(ctx, run: Callable[[Tensor], Tensor], x: Tensor, *weights: Tensor) -> Tensor:
        """Autograd records nothing in here; `weights` are those that `run` uses."""
        ctx.run, ctx.again = run, _Circumstances(x.device)
        ctx.save_for_backward(x, *weights)
        return run(x)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and the weights, from the forward pass run once more."""
        x, *weights = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[1])
        with torch.enable_grad(), ctx.again.restored():
            y = ctx.run(x.view_as(x))  # no leaf: torch's FLOP counter cannot watch one in here
        wanted = [tensor for tensor in (x, *weights) if tensor.requires_grad]
        slopes = iter(torch.autograd.grad(y, wanted, slope, allow_unused=True))
        return None, *(next(slopes) if t.requires_grad else None for t in (x, *weights))


class Recomputed(LanguageModel):
    """A `LanguageModel` that keeps the input of every `every`-th block only."""

    every: int

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits (B, T, vocab), bit for bit those of the plain model."""
        if cache is not None or not torch.is_grad_enabled():  # nothing will run again
            return super().forward(tokens, cache)
        self._check(tokens, 0)
        x = self.embedding(tokens)  # (B, T, W)
        for first in range(0, len(self.blocks), self.every):
            segment = self.blocks[first : first + self.every]
            run = partial(self._run, segment, first, tokens.shape[1])
            x = Recompute.apply(run, x, *segment.parameters())
        return self.head(self.norm(x))

    def _run(self, segment: nn.ModuleList, first: int, positions: int, x: Tensor) -> Tensor:
        for layer, block in enumerate(segment, start=first):
            x = block(x, self.cos[:positions], self.sin[:positions], layer, None)
        return x


def recomputed(model: LanguageModel, *, every: int = 1) -> Recomputed:
    """A copy of `model` that recomputes segments of `every` blocks; same numbers, less memory.

    Names and weights stay, so checkpoints of one fit the other. Raises ValueError for `every` below
    1 or above the number of blocks, and for a model with another forward pass than LanguageModel's.
    """
    forwards = (LanguageModel.forward, Recomputed.forward)
    plain = isinstance(model, LanguageModel) and type(model).forward in forwards
    require(plain, f"{type(model).__name__} has a forward pass of its own; give a LanguageModel")
    _check(len(model.blocks), every)
    twin = copied(model)
    twin.__class__, twin.every = Recomputed, every  # same modules and names; only `forward` differs
    return twin


def kept_bytes(
    config: ModelConfig,
    positions: int,
    *,
    every: int,
    batch: int = 1,
    bytes_per_number: int = 4,
    attention: str = "flash",
) -> int:
    """Most bytes that autograd keeps at a time in a step of `recomputed(model, every=every)`.

    Either when the forward pass is over: the input of each of n = ceil(L / k) segments, and what
    the last norm and the loss keep. Or when the backward pass has run a segment again: the inputs
    of the segments up to it, and all that its blocks keep. Symbols and limits are those of
    `cost.activation_bytes`.
    """
    _check(config.layers, every)
    sizes = {"batch": batch, "bytes_per_number": bytes_per_number, "attention": attention}
    one, two = (
        cost.activation_bytes(replace(config, layers=layers), positions, **sizes)
        for layers in (1, 2)
    )
    rows = batch * positions
    block, border = two - one, rows * config.width * bytes_per_number
    n = -(-config.layers // every)
    last = config.layers - (n - 1) * every  # blocks of the last segment
    shared = border if bytes_per_number == 4 else 0  # the norm keeps it too, or an FP32 copy of it
    moments = [n * border + one - block, n * border + last * block - shared + 8 * rows]
    if n > 1:
        moments.append((n - 1) * border + every * block - shared + 8 * rows)
    return max(moments)


def training_flops(config: ModelConfig, positions: int, *, batch: int = 1) -> int:
    """FLOPs of a step: `cost.training_flops`, and the blocks' forward pass once more.

    The head, 2 B T W V, is not run again.
    """
    head = 2 * batch * positions * config.width * config.vocab
    again = cost.forward_flops(config, positions, batch=batch) - head
    return cost.training_flops(config, positions, batch=batch) + again


def _check(layers: int, every: int) -> None:
    require_whole("every", every)
    require(every <= layers, f"every is {every}; the model has {layers} blocks")


class _Circumstances:
    """What a forward pass depends on beside its input: random numbers (dropout), and autocast."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.random = device, torch.get_rng_state()
        self.on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.dtype = torch.get_autocast_dtype(device.type)
        self.enabled = torch.is_autocast_enabled(device.type)

    def restored(self) -> ExitStack:
        """Within it, everything is as it was; afterwards the random numbers go on as before."""
        within, devices = ExitStack(), [self.device] if self.on_device is not None else []
        within.enter_context(torch.random.fork_rng(devices))
        within.enter_context(torch.autocast(self.device.type, self.dtype, enabled=self.enabled))
        torch.set_rng_state(self.random)
        if self.on_device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)
        return within

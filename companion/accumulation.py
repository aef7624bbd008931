"""Gradient accumulation: the step of a large batch, in the memory of a small one.

A gradient is a sum over tokens, and a sum can be taken in parts. The batch is cut into microbatches
that go through the model one after the other; autograd adds their gradients up, and one update
follows. Each microbatch keeps its activations only until its own backward pass is over.

The mean loss of a batch is the sum over its counted tokens, divided by their number N:

    loss = (1 / N) sum over microbatches m of (sum of the losses of m)

The usual bug divides each microbatch by its own number of tokens and then by the number of
microbatches: a mean of means, which is the mean only where all parts count as many tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from companion.checks import require, require_whole
from companion.losses import token_losses
from companion.stopping import Watch
from companion.training import Step

Losses = Callable[[nn.Module, Tensor], Tensor]  # model, tokens (B, T) -> losses (B, T - 1)


def plain_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Surprise at each next token, (B, T - 1) nats: `token_losses` of the model's own logits."""
    return token_losses(model(tokens), tokens)


def counts(tokens: Tensor, ignored: int | None = None) -> Tensor:
    """Which predictions of tokens (B, T) count, (B, T - 1): all but those of the id `ignored`."""
    targets = tokens[:, 1:]
    return torch.ones_like(targets, dtype=torch.bool) if ignored is None else targets != ignored


def microbatches_of(batch: Tensor, microbatches: int) -> list[Tensor]:
    """The rows of a batch in equal parts, in order. Raises ValueError if they do not divide."""
    return list(batch.split(rows_each(len(batch), microbatches)))


def rows_each(rows: int, microbatches: int) -> int:
    """Rows of one microbatch. Raises ValueError if the rows of the batch do not divide."""
    require_whole("microbatches", microbatches)
    text = f"{rows} rows do not divide into {microbatches} equal microbatches"
    require(rows % microbatches == 0 and rows > 0, f"{text}; drop rows, or give a divisor")
    return rows // microbatches


def accumulate(
    model: nn.Module,
    batch: Tensor,
    microbatches: int,
    *,
    losses: Losses = plain_losses,
    ignored: int | None = None,
) -> Tensor:
    """Add the gradient of the mean loss over a batch (B, T) to the model's, part by part.

    The mean is over all counted tokens of the batch, wherever they stand. Returns that loss in nats
    per token. Raises ValueError for rows that do not divide, and if no token counts.
    """
    parts = microbatches_of(batch, microbatches)
    tokens = int(counts(batch, ignored).sum())
    require(tokens > 0, f"0 of {batch[:, 1:].numel()} tokens count; the mean needs at least 1")
    total = torch.zeros((), device=batch.device)
    for part in parts:
        each = losses(model, part)
        if ignored is not None:
            each = each[counts(part, ignored)]  # a product would make 0 x infinity NaN
        loss = each.sum() / tokens
        loss.backward()
        total = total + loss.detach()
    return total


def accumulating_step(
    microbatches: int,
    *,
    losses: Losses = plain_losses,
    ignored: int | None = None,
    start: int = 0,
    checkpoint: str | Path | None = None,
) -> Step:
    """A step for `train`: one update on a batch that goes through the model in `microbatches`.

    The same numbers as `plain_step`, but for rounding; gradients are shortened to length 1 once,
    when all are added up. `losses` gives the loss of each prediction, (B, T - 1); predictions of
    the id `ignored`, such as padding, do not count. `start` and `checkpoint` are for the message
    when a loss or gradient is not finite: FloatingPointError, before anything is changed.

    Raises ValueError for rows that do not divide, and for a model that still holds gradients.
    """
    require_whole("microbatches", microbatches)
    watch = Watch(start=start, checkpoint=checkpoint)

    def step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> Tensor:
        require_no_gradients(model)
        loss = accumulate(model, batch, microbatches, losses=losses, ignored=ignored)
        watch.require_finite("loss", loss.item(), optimizer)
        length = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        watch.require_finite("gradient's length", length.item(), optimizer)
        optimizer.step()
        optimizer.zero_grad()
        watch.passed()
        return loss

    return step


def require_no_gradients(model: nn.Module) -> None:
    """Raise ValueError if gradients of an earlier batch are still there: they would be added."""
    held = [p.grad for p in model.parameters() if p.grad is not None]
    left = sum(bool(gradient.any()) for gradient in held)
    text = f"{left} parameters still hold gradients of an earlier batch"
    require(left == 0, f"{text}; call optimizer.zero_grad() after each update")

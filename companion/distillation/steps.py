"""Learning from a teacher: the student is shown what the teacher thinks of every next token.

A label names one token; the teacher's distribution also says which others would have done, and how
well (*soft labels*). The loss is a mean over positions of

    (1 - hard) x T^2 x divergence(student, teacher at temperature T) + hard x next-token loss

At a temperature T the divergence's gradient shrinks as 1 / T^2; the factor T^2 takes that back, so
that `hard` means the same at every temperature. The last position of a window has no label: the
divergence is taken at all positions, the next-token loss at those that have one.

Hinton et al., arXiv:1503.02531.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from companion.checks import require, require_number, require_whole
from companion.distillation.checking import (
    require_finite_weights,
    require_same_vocab,
    require_share,
)
from companion.distillation.divergences import Divergence, forward_kl
from companion.losses import next_token_loss
from companion.model import LanguageModel
from companion.surgery import copied
from companion.training import Batched, Schedule, Step, adamw, cosine, train

CLIP = 1.0  # longest gradient, as in `companion.training.plain_step`


def imitation_step(
    teacher: nn.Module,
    *,
    temperature: float = 1.0,
    hard: float = 0.0,
    divergence: Divergence = forward_kl,
) -> Step:
    """A training step towards the teacher's distribution; `hard` is the share of the labels.

    The teacher reads in evaluation mode, without gradients, and is left as it was. Raises
    ValueError for a temperature of 0 or less, `hard` outside 0 to 1, a teacher whose weights are
    not finite and, at its first step, a student with another vocabulary.
    """
    require_number("temperature", temperature, above=0)
    require_share("hard", hard)
    require_finite_weights("teacher", teacher)

    def step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> Tensor:
        soft = scores(teacher, batch) if hard < 1 else None
        logits = model(batch)
        far = None if soft is None else divergence(logits, soft, temperature)
        return descend(model, optimizer, blended(far, logits, batch, temperature, hard))

    return step


def blended(
    divergences: Tensor | None, logits: Tensor, batch: Tensor, temperature: float, hard: float
) -> Tensor:
    """(1 - hard) T^2 x mean divergence + hard x next-token loss; a part of weight 0 is left out."""
    loss = 0.0
    if hard < 1:
        loss = (1 - hard) * temperature**2 * divergences.mean()
    return loss + hard * next_token_loss(logits, batch) if hard > 0 else loss


def scores(teacher: nn.Module, batch: Tensor) -> Tensor:
    """The teacher's logits (B, T, V), read in evaluation mode and without gradients."""
    with evaluating(teacher), torch.no_grad():
        return teacher(batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode for a while; each of its modules then gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def descend(model: nn.Module, optimizer: Optimizer, loss: Tensor) -> Tensor:
    """One update against a loss's gradient, as `plain_step` makes it; the loss, detached."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def in_turn(first: Step, count: int, second: Step) -> Step:
    """A step that is `first` for `count` updates and `second` from then on. For one training."""
    require_whole("count", count)
    left = count

    def step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        return (first if left >= 0 else second)(model, optimizer, batch)

    return step


def distill(
    teacher: nn.Module,
    student: LanguageModel,
    batches: Batched | Sequence[Tensor],
    *,
    steps: int,
    rate: float = 1e-3,
    schedule: Schedule | None = None,
    method: Callable[..., Step] = imitation_step,
    progress: bool = True,
    **options,
) -> LanguageModel:
    """A new model: the student after `steps` batches of imitation. Both models given stay as is.

    `options` go to `method`: temperature, hard and divergence for `imitation_step`. `rate` is the
    highest learning rate of AdamW; without a `schedule` it rises over a tenth of the steps and then
    falls along a cosine. The same input gives the same model. Raises ValueError for vocabularies
    that differ, no or too few batches, weights that are not finite, and what `method` refuses.
    """
    require_whole("steps", steps)
    require_same_vocab(teacher, student)
    require_finite_weights("student", student)
    count = len(batches) if isinstance(batches, Sized) else steps
    require(count >= steps, f"there are {count} batches for {steps} steps; give one for each")
    step = method(teacher, **options)
    model = copied(student).requires_grad_(True)
    schedule = schedule or cosine(steps, warmup=steps // 10, floor=0.05)
    optimizer = adamw(model, rate)
    kept = dict(optimizer=optimizer, schedule=schedule, step=step, progress=progress)
    train(model, batches, steps=steps, **kept)
    return model

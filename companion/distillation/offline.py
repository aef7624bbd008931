"""Offline distillation: learn from a teacher's stored best guesses, in place of the teacher.

What to do about the tokens that were not stored?

    renormalised  take the k stored chances for the whole distribution. Biased: the loss is least
                  for a student that gives nothing to the tokens left out, which the teacher did not
    with rest     let all tokens left out be one: teacher and student each give it what they give
                  them together. Merging outcomes never raises a KL divergence (the data-processing
                  inequality): this is a lower bound of the full one, least for the teacher itself

Axes: B batch, T positions, k stored, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.optim import Optimizer

from companion.checks import require
from companion.distillation.checking import require_share
from companion.distillation.divergences import log_shares
from companion.distillation.steps import blended, descend
from companion.distillation.stored import TopLogits
from companion.training import Step

TopDivergence = Callable[[Tensor, TopLogits], Tensor]  # (student (B, T, V), top) -> (B, T)


def renormalised(student: Tensor, top: TopLogits) -> Tensor:
    """KL(stored chances, made to sum to 1 || student) at each position, (B, T) nats."""
    ours, ids, values = _aligned(student, top)
    theirs = log_softmax(values, dim=-1)
    return (theirs.exp() * (theirs - ours.gather(-1, ids))).sum(-1)


def with_rest(student: Tensor, top: TopLogits) -> Tensor:
    """KL(teacher || student) with all tokens left out taken for one, (B, T) nats."""
    ours, ids, theirs = _aligned(student, top)
    kept = (theirs.exp() * (theirs - ours.gather(-1, ids))).sum(-1)
    if top.k == top.vocab:
        return kept
    others = ours.scatter(-1, ids, -torch.inf).logsumexp(-1)
    rest = top.rest.to(ours.dtype)
    return kept + rest.exp() * (rest - others)


def offline_step(stored: TopLogits, *, hard: float = 0.0, loss: TopDivergence = with_rest) -> Step:
    """A training step from stored logits: an `imitation_step` at their temperature, no teacher.

    Batches are made of windows that were stored, in any order. Raises ValueError for `hard` outside
    0 to 1 and, at a step, for another vocabulary and for a window that was not stored.
    """
    require_share("hard", hard)

    def step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> Tensor:
        top, logits = stored.of(batch), model(batch)
        far = loss(logits, top)
        return descend(model, optimizer, blended(far, logits, batch, stored.temperature, hard))

    return step


def _aligned(student: Tensor, top: TopLogits) -> tuple[Tensor, Tensor, Tensor]:
    """The student's log chances (B, T, V), and ids and log chances (B, T, k) of what is stored."""
    shapes = f"student {tuple(student.shape)} and stored {tuple(top.tokens.shape)}"
    wanted = (*top.tokens.shape, top.vocab)
    require(student.shape == wanted, f"{shapes} with a vocab of {top.vocab} do not match")
    ours = log_shares(student, top.temperature)
    return ours, top.ids.long(), top.values.to(ours.dtype)

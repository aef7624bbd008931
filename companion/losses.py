"""Losses: how surprised a model is, and how far one model's surprise is from another's.

Axes: B batch, T positions, V vocabulary. All losses are means in nats per predicted token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from companion.checks import require, require_number


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Surprise at each next token, (B, T - 1) nats, from logits (B, T, V) and tokens (B, T).

    Position t predicts token t + 1; the last logits predict nothing. Raises ValueError if the
    shapes do not belong together or fewer than two positions are given.
    """
    matching = logits.ndim == 3 and tokens.ndim == 2 and logits.shape[:2] == tokens.shape
    shapes = f"logits {tuple(logits.shape)} and tokens {tuple(tokens.shape)}"
    require(matching, f"{shapes} do not match; (B, T, V) and (B, T) are expected")
    require(tokens.shape[1] >= 2, f"{tokens.shape[1]} position(s) predict nothing; give 2 or more")
    predictions = _wide(logits[:, :-1].flatten(0, 1))
    losses = cross_entropy(predictions, tokens[:, 1:].flatten(), reduction="none")
    return losses.view(tokens.shape[0], -1)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean of `token_losses`: the cross-entropy a language model is trained on."""
    return token_losses(logits, tokens).mean()


def token_divergences(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) at each position, (B, T) nats, from two logits (B, T, V).

    Both are divided by the temperature first. Computed from `log_softmax`, which stays finite
    where `softmax(...).log()` does not. Hinton et al., arXiv:1503.02531.
    """
    shapes = f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
    require(
        student.shape == teacher.shape and student.ndim == 3, f"{shapes} must both be (B, T, V)"
    )
    require_number("temperature", temperature, above=0)
    ours = log_softmax(_wide(student) / temperature, dim=-1)
    theirs = log_softmax(_wide(teacher) / temperature, dim=-1)
    return (theirs.exp() * (theirs - ours)).sum(-1)


def imitation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(teacher || student) per position, times temperature squared.

    The factor keeps the gradient's size when the temperature changes. The teacher's logits are
    taken as given: no gradient flows into them.
    """
    with torch.no_grad():
        teacher = teacher.detach()
    return token_divergences(student, teacher, temperature).mean() * temperature**2


def _wide(logits: Tensor) -> Tensor:
    """16-bit logits in FP32; the sums of a softmax need more digits than they have."""
    return logits.float() if logits.element_size() < 4 else logits

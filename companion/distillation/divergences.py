"""How far a student's distribution over the next token is from its teacher's, three ways.

    forward KL      KL(teacher || student): large where the teacher sees a chance, the student none
    reverse KL      KL(student || teacher): large where the student sees a chance, the teacher none
    Jensen-Shannon  mean distance of both to their average: symmetric, and at most log 2

All start from `log_softmax`, which stays finite where `softmax(...).log()` does not. Both logits
are divided by the temperature first: above 1 it brings the small chances closer to the large ones.
Hinton et al., arXiv:1503.02531 (forward KL, temperature); Agarwal et al., arXiv:2306.13649 (all).

Axes: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from companion.checks import require, require_number
from companion.losses import token_divergences

Divergence = Callable[..., Tensor]  # (student (B, T, V), teacher (B, T, V), temperature) -> (B, T)


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) at each position, (B, T) nats, from two logits (B, T, V).

    Raises ValueError for shapes that differ and for a temperature of 0 or less; so do the others.
    """
    return token_divergences(student, teacher, temperature)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) at each position, (B, T) nats, from two logits (B, T, V)."""
    ours, theirs = _log_shares(student, teacher, temperature)
    return _kl(ours, theirs)


def jensen_shannon(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """(KL(teacher || m) + KL(student || m)) / 2 with m the mean of both; (B, T) nats."""
    ours, theirs = _log_shares(student, teacher, temperature)
    middle = torch.logaddexp(ours, theirs) - math.log(2)
    return (_kl(theirs, middle) + _kl(ours, middle)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) over the last axis, from the logarithms of both."""
    return (p.exp() * (p - q)).sum(-1)


def _log_shares(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logarithms of both distributions at a temperature."""
    shapes = f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
    same = student.shape == teacher.shape and student.ndim == 3
    require(same, f"{shapes} must both be (B, T, V)")
    require_number("temperature", temperature, above=0)
    return log_shares(student, temperature), log_shares(teacher, temperature)


def log_shares(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last axis; 16-bit logits are widened to FP32."""
    wide = logits.float() if logits.element_size() < 4 else logits
    return log_softmax(wide / temperature, dim=-1)

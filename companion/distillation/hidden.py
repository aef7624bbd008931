"""Matching hidden states: let the student also think like the teacher, layer by layer.

Logits tell what the teacher concludes; the vectors between its blocks tell more. The student's are
of another width, so a learned matrix (a *projection*) stands between the two and is thrown away
after training:

    loss = imitation + weight x mean over pairs of |P h_student - h_teacher|^2 / |h_teacher|^2

TinyBERT, arXiv:1909.10351, which leaves out the division; it makes `weight` mean the same in every
layer, since vectors grow with depth.

Axes: B batch, T positions, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from companion.checks import require, require_number
from companion.distillation.checking import require_finite_weights, require_share
from companion.distillation.divergences import Divergence, forward_kl
from companion.distillation.steps import CLIP, blended, descend, scores
from companion.model import LanguageModel
from companion.training import adamw

Pairs = Sequence[tuple[int, int]]  # (block of the student, block of the teacher), from 0


def spread(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """A teacher's block for each of the student's, evenly spaced; the last goes to the last."""
    share = teacher_layers / student_layers
    return [(layer, max(0, round((layer + 1) * share) - 1)) for layer in range(student_layers)]


@contextmanager
def watching(model: LanguageModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While it lasts, what the chosen blocks give, (B, T, W), is put into the dictionary."""
    states: dict[int, Tensor] = {}

    def watch(layer: int):
        return lambda _, __, out: states.__setitem__(layer, out)

    hooks = [model.blocks[layer].register_forward_hook(watch(layer)) for layer in set(layers)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def state_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two states of one shape, as a share of the teacher's square."""
    return (student - teacher).square().mean() / teacher.square().mean()


@dataclass(kw_only=True, eq=False)
class HiddenStep:
    """A training step that also matches hidden states; it owns the projections and trains them.

    They are made at the first step, when the student's width is known. Their learning rate is the
    student's.
    """

    teacher: LanguageModel
    pairs: Pairs | None
    weight: float
    temperature: float
    hard: float
    divergence: Divergence
    seed: int
    projections: nn.ModuleList | None = field(default=None, init=False)

    def __call__(self, model: LanguageModel, optimizer: Optimizer, batch: Tensor) -> Tensor:
        if self.projections is None:
            self.prepare(model)
        with watching(self.teacher, [aim for _, aim in self.pairs]) as aims:
            soft = scores(self.teacher, batch)
        with watching(model, [own for own, _ in self.pairs]) as states:
            logits = model(batch)
        far = self.divergence(logits, soft, self.temperature)
        imitation = blended(far, logits, batch, self.temperature, self.hard)
        loss = imitation + self.weight * self.distance(states, aims)
        found = descend(model, optimizer, loss)
        self._update(optimizer.param_groups[0]["lr"])
        return found

    def prepare(self, model: LanguageModel) -> None:
        """Make the projections for a student. ValueError for blocks that one model lacks."""
        ours, theirs = model.config, self.teacher.config
        pairs = spread(ours.layers, theirs.layers) if self.pairs is None else list(self.pairs)
        for own, aim in pairs:
            inside = 0 <= own < ours.layers and 0 <= aim < theirs.layers
            blocks = f"{ours.layers} blocks (student) and {theirs.layers} (teacher)"
            require(inside, f"the pair {(own, aim)} does not lie within {blocks}")
        like = model.norm.weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            made = [nn.Linear(ours.width, theirs.width, bias=False) for _ in pairs]
        self.pairs = pairs
        self.projections = nn.ModuleList(made).to(device=like.device, dtype=like.dtype)
        self._optimizer = adamw(self.projections)

    def distance(self, states: dict[int, Tensor], aims: dict[int, Tensor]) -> Tensor:
        """Mean over the pairs of the distance that is left after the projection."""
        paired = zip(self.projections, self.pairs, strict=True)
        found = [state_distance(project(states[own]), aims[aim]) for project, (own, aim) in paired]
        return torch.stack(found).mean()

    def _update(self, rate: float) -> None:
        """One update of the projections, whose gradients the student's update left in place."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_(self.projections.parameters(), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()


def hidden_step(
    teacher: LanguageModel,
    *,
    pairs: Pairs | None = None,
    weight: float = 1.0,
    temperature: float = 1.0,
    hard: float = 0.0,
    divergence: Divergence = forward_kl,
    seed: int = 0,
) -> HiddenStep:
    """An `imitation_step` that also matches hidden states, `weight` times as much.

    `pairs` says which block of the student goes with which of the teacher, evenly spread if None;
    the projections start from `seed`. Use a new one for each training. Raises ValueError for
    options that cannot be and, at the first step, for blocks that do not exist.
    """
    require_number("weight", weight, above=0)
    require_number("temperature", temperature, above=0)
    require_share("hard", hard)
    require_finite_weights("teacher", teacher)
    require(pairs is None or len(pairs) > 0, "there are 0 pairs of blocks; give one or None")
    return HiddenStep(
        teacher=teacher,
        pairs=pairs,
        weight=weight,
        temperature=temperature,
        hard=hard,
        divergence=divergence,
        seed=seed,
    )

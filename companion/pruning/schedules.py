"""When to prune: all at once, in rounds, or little by little while training goes on.

A plan is a list of rounds, each a sparsity to prune to and a number of steps to train after it, so
one loop serves them all. Compare plans of equal steps: what more training gives is not what a
schedule gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass

from torch import Tensor
from tqdm.auto import tqdm

from companion.checks import require, require_whole
from companion.model import LanguageModel
from companion.pruning.patterns import require_share
from companion.pruning.replacing import prune
from companion.pruning.training import keeping_zeros
from companion.surgery import Where, copied, linears
from companion.training import Batched, Schedule, Step, adamw, constant, plain_step, train

Pruner = Callable[[LanguageModel, float], LanguageModel]


@dataclass(frozen=True)
class Round:
    """Prune to a sparsity, then train."""

    sparsity: float
    steps: int

    def __post_init__(self) -> None:
        require_share("sparsity", self.sparsity)
        require_whole("steps", self.steps)


def one_shot(sparsity: float, steps: int) -> list[Round]:
    """Prune all at once, then train."""
    return [Round(sparsity, steps)]


def iterative(sparsity: float, steps: int, *, rounds: int = 4) -> list[Round]:
    """Rounds of equal length; each removes the same share of what the one before it left.

    Han et al., arXiv:1506.02626, who prune and retrain in turn.
    """
    require_whole("steps", steps)
    require_whole("rounds", rounds)
    require_share("sparsity", sparsity)
    require(rounds <= steps, f"{steps} steps do not make {rounds} rounds; give more steps")
    rising = [1 - (1 - sparsity) ** (k / rounds) for k in range(1, rounds)]
    return [*map(Round, [*rising, sparsity], _split(steps, rounds))]


def gradual(sparsity: float, steps: int, *, every: int = 10, until: float = 0.75) -> list[Round]:
    """Prune a little every few steps, fast at first and slowly at last, then train on.

    Step t of the first n, a share `until` of all, has sparsity s (1 - (1 - t / n)^3).
    Zhu and Gupta, arXiv:1710.01878.
    """
    require_whole("steps", steps)
    require_whole("every", every)
    require(0 < until <= 1, f"until is {until}; it must lie above 0 and at most at 1")
    times = max(1, int(until * steps) // every)
    rising = [sparsity * (1 - (1 - k / times) ** 3) for k in range(1, times + 1)]
    lengths = [every] * (times - 1)
    return [*map(Round, rising[:-1], lengths), Round(sparsity, steps - sum(lengths))]


def prune_and_train(
    model: LanguageModel,
    batches: Batched | Sequence[Tensor],
    plan: Sequence[Round],
    *,
    pruner: Pruner = prune,
    rate: float = 1e-3,
    schedule: Schedule = constant,
    step: Step = plain_step,
    where: Where = linears,
    progress: bool = True,
) -> LanguageModel:
    """A new model that has gone through the plan's rounds; zeros stay zeros between them.

    `pruner(model, sparsity)` gives a pruned model, and is asked anew each round. One AdamW serves
    all rounds; `rate` and `schedule` count the steps of the whole plan. `step` may be any step of
    `train`, one that imitates the dense model for instance. Raises ValueError for an empty plan,
    fewer batches than steps, and what `pruner` refuses; the model given stays as it was.
    """
    total = sum(part.steps for part in plan)
    require(total > 0, "the plan has 0 rounds; give at least one")
    found = len(batches) if isinstance(batches, Sized) else total
    require(found >= total, f"{found} batches are too few for the {total} steps of the plan")
    new, done = copied(model), 0
    optimizer = adamw(new, rate)
    with tqdm(total=total, disable=not progress, unit="step", leave=False) as bar:
        for part in plan:
            new.load_state_dict(pruner(new, part.sparsity).state_dict())
            train(
                new,
                batches,
                start=done,
                steps=done + part.steps,
                optimizer=optimizer,
                schedule=schedule,
                step=keeping_zeros(step, where=where),
                after=lambda *_: bar.update(),
                progress=False,
            )
            done += part.steps
    return new


def _split(steps: int, parts: int) -> list[int]:
    """Steps in parts as equal as can be, the longer ones last."""
    return [steps // parts + (k >= parts - steps % parts) for k in range(parts)]

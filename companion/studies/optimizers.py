"""Nine optimizers on one task: the same small model, text and number of tokens, each at its rate.

A comparison of optimizers at one rate is a comparison of rates. So each climbs a ladder of rates
with seed 0, at the whole budget, until the best has worse ones on both sides. With that rate it
then trains with three further seeds, which is what counts. All else is alike: weights and windows
of a seed, gradients shortened to length 1, a warm-up of a tenth and a cosine down to a hundredth.

Each is run with a small batch, and with one eight times as large on the same tokens: an eighth of
the updates. LAMB was made for the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from companion.checks import require_known
from companion.model import LanguageModel
from companion.optimizers import Tuned, make_optimizer, tuned_rate
from companion.pretrained import FOLDER, tiny_tokenizer
from companion.studies.convergence import nats, new_model
from companion.studies.size import BATCH, TextWindows, training_text
from companion.studies.study import Study
from companion.training import Schedule, cosine, train

WINDOWS = 1024  # of 256 tokens, that every training reads
BATCHES = {"small": 4, "large": 32}  # windows a step
LOOKS, GLANCE, JUDGED = 8, 8_000, 60_000  # looks at held-out text on the way, characters of it
STARTS = {  # rungs to begin from with the small batch; with the large one, twice that
    "SGD": 0.8,
    "momentum": 0.2,
    "Adagrad": 0.02,
    "RMSProp": 0.004,
    "Adam": 0.01,
    "AdamW": 0.01,
    "LAMB": 0.03,
    "Lion": 0.002,
    "Muon": 0.02,
}


@dataclass(frozen=True)
class Plan:
    """A training, but for its seed and its rate."""

    optimizer: str
    schedule: Schedule
    size: int  # windows a step
    start: float  # the rung to begin from


def run(*, seed: int, optimizer: str, batch: str) -> dict[str, float | list[float]]:
    """What `measured` gives for an optimizer and a batch, at the rate that `tuned` finds."""
    return measured(plan_of(optimizer, batch), tuned(optimizer, batch), seed)


@lru_cache
def tuned(optimizer: str, batch: str) -> Tuned:
    """The ladder of rates, climbed once a process for all seeds."""
    return climbed(plan_of(optimizer, batch))


def plan_of(optimizer: str, batch: str) -> Plan:
    """How an optimizer is trained here. Raises ValueError for unknown names."""
    require_known("optimizer", optimizer, STARTS)
    require_known("batch", batch, BATCHES)
    size, higher = BATCHES[batch], 2 if batch == "large" else 1
    steps = WINDOWS // size
    schedule = cosine(steps, warmup=steps // 10, floor=0.01)
    return Plan(optimizer, schedule, size, STARTS[optimizer] * higher)


def climbed(plan: Plan) -> Tuned:
    """The ladder of rates with seed 0, by held-out nats per token at the end."""
    return tuned_rate(lambda rate: nats(trained(plan, 0, rate), JUDGED), plan.start)


def measured(plan: Plan, found: Tuned, seed: int) -> dict[str, float | list[float]]:
    """Train at the tuned rate: held-out nats per token at the end, and after every eighth of it.

    "early" is the first of the "curve", whose text is shorter than that of "nats". "rates" and
    "scores" are the ladder, "rate" the best of it.
    """
    curve: list[float] = []
    model = trained(plan, seed, found.rate, looks=curve)
    ladder = {"rates": list(found.rates), "scores": list(found.scores), "rate": found.rate}
    return {"nats": nats(model, JUDGED), "early": curve[0], "curve": curve, **ladder}


def early(plan: Plan, *, seed: int, rate: float) -> float:
    """What `measured` calls "early", from the first eighth of the training alone."""
    curve: list[float] = []
    trained(plan, seed, rate, looks=curve, share=1 / LOOKS)
    return curve[0]


def trained(
    plan: Plan, seed: int, rate: float, *, looks: list[float] | None = None, share: float = 1.0
) -> LanguageModel:
    """A model after a share of the training; `looks` takes held-out nats per token on the way.

    One whose loss is no longer finite is given back as it is.
    """
    model, steps = new_model(seed), WINDOWS // plan.size

    def look(step: int, loss: float) -> None:
        if looks is not None and (step + 1) % (steps // LOOKS) == 0:
            looks.append(nats(model, GLANCE))

    how = {"optimizer": make_optimizer(plan.optimizer, model, rate), "schedule": plan.schedule}
    try:
        train(model, Steps(seed, plan.size), steps=round(share * steps), after=look, **how)
    except FloatingPointError:  # a result too: `nats` makes of it what guessing takes
        model.eval()
    return model


@dataclass(frozen=True)
class Steps:
    """The windows of a seed in one order, `size` of them a step: (size, 256) ids."""

    seed: int
    size: int

    def __getitem__(self, step: int) -> Tensor:
        count = self.size // BATCH
        return torch.cat([pair(self.seed, step * count + index) for index in range(count)])


@lru_cache(maxsize=4 * WINDOWS)
def pair(seed: int, index: int) -> Tensor:
    """Two windows of training text, (2, 256)."""
    return TextWindows(training_text(), tiny_tokenizer(), seed)[index]


STUDY = Study(
    title="Held-out nats per token after the same tokens, nine optimizers at their own rates",
    point=run,
    settings={
        f"{optimizer}, {batch}": {"optimizer": optimizer, "batch": batch}
        for batch in BATCHES
        for optimizer in STARTS
    },
    seeds=(1, 2, 3),  # not 0, which chose the rates
    files=(FOLDER / "tiny_tokenizer.json",),
)

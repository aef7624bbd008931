"""Schedules on one task: the same small model, text and number of tokens, with AdamW.

A schedule that stays high wants a lower rate than one that comes down, so each climbs a ladder of
rates with seed 0 until the best has worse ones on both sides, and then trains at that rate with
three further seeds: as in the `optimizers` study, with its small batch. All but "constant" rise
over the first tenth of the steps; those that fall end at a hundredth.
"""

from __future__ import annotations

from functools import lru_cache

from companion.checks import require_known
from companion.optimizers import Tuned
from companion.pretrained import FOLDER
from companion.schedules import make_schedule
from companion.studies.optimizers import BATCHES, WINDOWS, Plan, climbed, measured
from companion.studies.study import Study

SIZE = BATCHES["small"]
STEPS = WINDOWS // SIZE
STARTS = {  # rungs to begin from
    "constant": 0.005,
    "warm-up": 0.005,
    "step": 0.01,
    "linear": 0.01,
    "cosine": 0.01,
    "warmup-stable-decay": 0.01,
}


def run(*, seed: int, schedule: str) -> dict[str, float | list[float]]:
    """What `measured` gives for a schedule, at the rate that `tuned` finds."""
    return measured(plan_of(schedule), tuned(schedule), seed)


@lru_cache
def tuned(schedule: str) -> Tuned:
    """The ladder of rates, climbed once a process for all seeds."""
    return climbed(plan_of(schedule))


def plan_of(schedule: str) -> Plan:
    """How a schedule is tried here. Raises ValueError for an unknown one."""
    require_known("schedule", schedule, STARTS)
    warmup = 0 if schedule == "constant" else STEPS // 10
    made = make_schedule(schedule, STEPS, warmup=warmup, floor=0.01)
    return Plan("AdamW", made, SIZE, STARTS[schedule])


STUDY = Study(
    title="Held-out nats per token after the same tokens, six schedules at their own rates",
    point=run,
    settings={schedule: {"schedule": schedule} for schedule in STARTS},
    seeds=(1, 2, 3),  # not 0, which chose the rates
    files=(FOLDER / "tiny_tokenizer.json",),
)

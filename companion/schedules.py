"""Schedules: by what factor the rate is multiplied at each step.

A large rate moves fast and settles nowhere: the noise of the batches shakes the weights about. A
small one settles. So a schedule starts large and ends small; what differs is when. Before that
comes a *warm-up*, in which the rate rises from almost 0: the first gradients are the largest, and
the optimizer's averages know little yet.

    constant               as it is
    warm-up                rises, then as it is
    step                   falls by the same factor a few times
    linear                 falls in a straight line
    cosine                 falls along half a cosine
    warmup-stable-decay    rises, as it is, falls in a straight line at the end

Each is a function of the step, from 0. The factor `floor` is reached by step `steps`, the first
after the last, and kept from there on.
"""

from __future__ import annotations

from collections.abc import Callable

from companion.checks import require, require_known, require_number, require_whole
from companion.training import Schedule, constant, cosine


def warmed(schedule: Schedule, warmup: int) -> Schedule:
    """A rise to the schedule's start over `warmup` steps, then the schedule from its step 0."""
    require_whole("warmup", warmup, least=0)

    def factor(step: int) -> float:
        return (step + 1) / warmup * schedule(0) if step < warmup else schedule(step - warmup)

    return factor


def stepped(steps: int, *, floor: float = 0.1, falls: int = 2) -> Schedule:
    """`falls` + 1 stages of equal length, each lower by the same factor; the last is `floor`.

    What `StepLR(step_size, gamma)` does, with gamma = floor^(1 / falls) and the step size in steps.
    """
    require_whole("steps", steps)
    require_whole("falls", falls)
    require(falls < steps, f"{falls} falls do not fit into {steps} steps")
    require_number("floor", floor, above=0)
    require(floor <= 1, f"floor is {floor}; it must be at most 1")
    return lambda step: floor ** (min(falls, step * (falls + 1) // steps) / falls)


def linear(steps: int, *, floor: float = 0.1) -> Schedule:
    """A straight line from 1 at step 0 to `floor` at step `steps`."""
    require_whole("steps", steps)
    require(0 <= floor <= 1, f"floor is {floor}; it must lie between 0 and 1")
    return lambda step: 1 - (1 - floor) * min(1.0, step / steps)


def stable_decay(steps: int, *, floor: float = 0.1, share: float = 0.2) -> Schedule:
    """1, and over the last `share` of the steps a straight line down to `floor`.

    The middle has no end of its own: a training can go on from there, and decay later. Hu et al.,
    "MiniCPM", arXiv:2404.06395, where the decay is exponential.
    """
    require_whole("steps", steps)
    require(0 < share <= 1, f"share is {share}; it must lie above 0 and be at most 1")
    decay = max(1, round(share * steps))
    fall = linear(decay, floor=floor)
    return lambda step: fall(max(0, step - (steps - decay)))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": lambda steps, floor: constant,
    "warm-up": lambda steps, floor: constant,
    "step": stepped,
    "linear": linear,
    "cosine": cosine,
    "warmup-stable-decay": stable_decay,
}
OPTIONS = {"step": ("falls",), "warmup-stable-decay": ("share",)}  # beyond those that all take


def make_schedule(
    name: str, steps: int, *, warmup: int = 0, floor: float = 0.1, **options: float
) -> Schedule:
    """The schedule of this name over `steps` steps, the warm-up among them.

    `floor` is the factor at the end, where the schedule falls. Options: `falls` of "step", `share`
    of "warmup-stable-decay". Raises ValueError for unknown names, a warm-up that leaves no step,
    and one of 0 where the name asks for a warm-up.
    """
    require_known("schedule", name, SCHEDULES)
    require_whole("steps", steps)
    require_whole("warmup", warmup, least=1 if name.startswith("warm") else 0)
    require(warmup < steps, f"warmup {warmup} must be shorter than the {steps} steps")
    require(0 <= floor <= 1, f"floor is {floor}; it must lie between 0 and 1")
    for option in options:
        require_known(f"option of {name}", option, OPTIONS.get(name, ()))
    return warmed(SCHEDULES[name](steps - warmup, floor=floor, **options), warmup)

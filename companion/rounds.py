"""How one round of a race is timed, and how a noisy round is told from a quiet one.

A *round* visits every candidate there and back, A B C C B A, in an order drawn anew each time, so
that a steady drift cancels between the two ways. A fixed matrix product is timed at its start,
middle and end. Two signs give a busy machine away: that product runs slower than it usually does
in this race, or the system says (on Linux) that this thread stood ready while its core ran others.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from companion.checks import require_whole
from companion.hardware import synchronize

SAMPLE = 0.002  # seconds: shorter calls are repeated until a sample lasts this long
SETTLE = 0.05  # calls shorter than this are preceded by an untimed one, which fills the caches
WAITED = 0.05  # a round is noisy if some sample waited for a core for more than this share
DRIFTED = 0.25  # or if the reference product took this much longer than it does in quiet rounds

Call = Callable[[], object]


class Clock:
    """Where times come from; tests put a fake one in its place."""

    def now(self) -> float:
        """Seconds, read when every queued piece of work is done."""
        synchronize()
        return time.perf_counter()

    def waited(self) -> float:
        """Seconds that this thread stood ready while its core ran others; 0 where nobody counts."""
        try:
            with open("/proc/thread-self/schedstat") as counters:
                return int(counters.read().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0


class Plan(NamedTuple):
    """How one sample of a callable is taken."""

    repeats: int  # timed calls
    settle: bool  # whether an untimed call precedes them


class Round(NamedTuple):
    """One visit there and back."""

    seconds: dict[str, float]  # a call of each candidate, the mean of both ways
    reference: float  # seconds of the reference product, the slowest of three
    waited: float  # the largest share of a sample that was spent waiting for a core


@contextmanager
def steady(threads: int) -> Iterator[None]:
    """Run at this many torch threads and without garbage collection; put both back at the end."""
    require_whole("threads", threads)
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def reference_product() -> Call:
    """A fixed FP32 matrix product: 14 MFLOP, and small enough for the second cache."""
    matrix = torch.ones(192, 192)
    return lambda: matrix @ matrix


class Track:
    """Warms the candidates up, plans their samples, and then times one round after another."""

    def __init__(self, candidates: Mapping[str, Call], warmup: int, seed: int) -> None:
        self.clock, self.random = Clock(), random.Random(seed)
        self.candidates = dict(candidates)
        for call in self.candidates.values():
            for _ in range(warmup):
                call()
        self.plans = plans({name: self._pilot(call) for name, call in self.candidates.items()})
        self.product = reference_product()
        self.product()
        self.product_plan = plans({"": 2 * self._pilot(self.product)})[""]  # half a sample will do

    def _pilot(self, call: Call) -> float:
        """A first idea of the seconds a call takes: the fastest of up to three."""
        times: list[float] = []
        while len(times) < 3 and sum(times) < SAMPLE:
            start = self.clock.now()
            call()
            times.append(self.clock.now() - start)
        return min(times)

    def _sample(self, call: Call, plan: Plan) -> tuple[float, float]:
        """Seconds a call, and the share of them spent waiting for a core."""
        if plan.settle:
            call()
        waited, start = self.clock.waited(), self.clock.now()
        for _ in range(plan.repeats):
            call()
        seconds = self.clock.now() - start
        return seconds / plan.repeats, (self.clock.waited() - waited) / max(seconds, 1e-9)

    def round(self) -> Round:
        """Product, candidates there, product, candidates back, product."""
        there = self.random.sample(list(self.candidates), len(self.candidates))
        found: dict[str | None, list[tuple[float, float]]] = {}
        for name in (None, *there, None, *reversed(there), None):  # None stands for the product
            call = self.product if name is None else self.candidates[name]
            plan = self.product_plan if name is None else self.plans[name]
            found.setdefault(name, []).append(self._sample(call, plan))
        waited = max(share for samples in found.values() for _, share in samples)
        seconds = {n: statistics.fmean(s for s, _ in samples) for n, samples in found.items()}
        reference = max(s for s, _ in found[None])
        return Round({name: seconds[name] for name in self.candidates}, reference, waited)


def plans(seconds: Mapping[str, float]) -> dict[str, Plan]:
    """How to sample calls that take about so many seconds each.

    Calls within a factor of two of the next faster one share its plan: two copies of one model must
    not be sampled in two ways because a pilot was a little off.
    """
    made: dict[str, Plan] = {}
    before = 0.0
    for name in sorted(seconds, key=seconds.__getitem__):
        own = max(seconds[name], 1e-9)
        if own >= 2 * before:
            plan = Plan(math.ceil(SAMPLE / own), own < SETTLE)
        made[name], before = plan, own
    return made


def quiet_rounds(rounds: Sequence[Round]) -> list[bool]:
    """Which rounds count. They are judged whole and by the same signs for every candidate.

    The usual time of the reference is its lower quartile over the race.
    """
    usual = sorted(r.reference for r in rounds)[len(rounds) // 4]
    return [r.waited <= WAITED and r.reference <= (1 + DRIFTED) * usual for r in rounds]

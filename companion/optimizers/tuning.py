"""A rate for each optimizer: try a ladder of rates, and climb on while the best is the last rung.

A comparison at one rate for all, or at the rates that papers like, compares rates. Rates are tried
at equal ratios, for it is the ratio to the best that hurts. The best never lies at the edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from companion.checks import require, require_number, require_whole


@dataclass(frozen=True)
class Tuned:
    """The rates that were tried, rising, and the score of each; less is better."""

    rates: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def rate(self) -> float:
        """The rate with the least score."""
        return self.rates[self.scores.index(min(self.scores))]

    @property
    def inside(self) -> bool:
        """Whether there are worse rates on both sides of the best."""
        return self.rate not in (self.rates[0], self.rates[-1])


def tuned_rate(
    score: Callable[[float], float], start: float, *, ratio: float = 2.0, most: int = 12
) -> Tuned:
    """Score `start` and its neighbours at a ratio, then further ones until the best is inside.

    Raises ValueError for numbers out of range and a score that is not finite, RuntimeError where
    `most` rates do not suffice.
    """
    require_number("start", start, above=0)
    require_number("ratio", ratio, above=1)
    require_whole("most", most, least=3)
    found: dict[int, float] = {}
    rung = 0
    while not {rung - 1, rung, rung + 1} <= found.keys():
        for each in {rung - 1, rung, rung + 1} - found.keys():
            if len(found) == most:
                raise RuntimeError(f"{most} rates tried, the last {start * ratio**rung:g}; no best")
            found[each] = _scored(score, start * ratio**each)
        rung = min(found, key=found.get)
    rungs = sorted(found)
    return Tuned(tuple(start * ratio**n for n in rungs), tuple(found[n] for n in rungs))


def _scored(score: Callable[[float], float], rate: float) -> float:
    value = score(rate)
    require(math.isfinite(value), f"the score at a rate of {rate:g} is {value}; give a finite one")
    return value

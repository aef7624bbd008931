"""One quantity measured in one or several cases, and the limit that a claim about it must reach.

A *case* is a length, a batch, a kind of storage. In each, the measured value lies on the right
side of the limit, on the wrong side, or its interval straddles the limit and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from companion.checks import require
from companion.intervals import Interval

SHOWN, REFUTED, OPEN, MISSING = "shown", "refuted", "not decided", "not measured"

Measured = float | Interval | None  # a number is exact; None: not measured


@dataclass(frozen=True)
class Case:
    """One measurement: an estimate with its interval."""

    name: str  # "" where a claim has only one case
    predicted: float | None
    estimate: float | None  # None: nothing was measured
    low: float | None  # None: no bound on this side
    high: float | None


@dataclass(frozen=True)
class Part:
    """One quantity that a claim is about, the limits it must keep, and its cases."""

    quantity: str
    unit: str
    at_least: float | None
    at_most: float | None
    cases: tuple[Case, ...]

    def result(self, case: Case) -> str:
        """SHOWN, REFUTED, OPEN where the interval straddles a limit, or MISSING."""
        if case.estimate is None:
            return MISSING
        least, low = (-math.inf if x is None else x for x in (self.at_least, case.low))
        most, high = (math.inf if x is None else x for x in (self.at_most, case.high))
        if least <= low and high <= most:
            return SHOWN
        return REFUTED if high < least or low > most else OPEN

    def results(self, name: str) -> set[str]:
        """What became of the case with this name; a part with one nameless case has it always."""
        return {self.result(case) for case in self.cases if case.name in ("", name)}


def part(
    quantity: str,
    measured: Measured | Mapping[str, Measured],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    predicted: float | Mapping[str, float] | None = None,
    unit: str = "",
) -> Part:
    """A quantity, measured once or in named cases, and the limit at which a claim about it holds.

    A limit is best the smallest effect worth having (1.05 rather than 1 times as fast): where two
    things are equal, an interval around "no effect" straddles no effect and decides nothing.
    Raises ValueError without a limit, without a case, and for values that are not finite.
    """
    cases = dict(measured) if isinstance(measured, Mapping) else {"": measured}
    expected = (
        dict(predicted) if isinstance(predicted, Mapping) else dict.fromkeys(cases, predicted)
    )
    named = not isinstance(measured, Mapping) or all(cases)
    require(bool(cases) and named, f"{quantity!r} has cases {list(cases)}; each needs a name")
    require(at_least is not None or at_most is not None, f"{quantity!r} needs at_least or at_most")
    require(expected.keys() <= cases.keys(), f"predicted {set(expected) - set(cases)} is no case")
    for name, limit in (("at_least", at_least), ("at_most", at_most)):
        require(limit is None or _finite(limit), f"{name} is {limit!r}; it must be a finite number")
    band = at_least is None or at_most is None or at_least <= at_most
    require(band, f"at_least {at_least} is above at_most {at_most}")
    made = tuple(_case(name, expected.get(name), value) for name, value in cases.items())
    return Part(quantity, unit, at_least, at_most, made)


def _case(name: str, predicted: float | None, measured: Measured) -> Case:
    good = predicted is None or _finite(predicted)
    require(good, f"predicted is {predicted!r}; it must be a finite number or None")
    if measured is None or (isinstance(measured, Interval) and not measured.known):
        return Case(name, predicted, None, None, None)
    low, estimate, high = (getattr(measured, end, measured) for end in ("low", "estimate", "high"))
    wanted = "it must be a finite number, an interval around its estimate, or None"
    good = _finite(estimate) and low <= estimate <= high
    require(good, f"measured is {measured!r}; {wanted}")
    bounds = [float(bound) if math.isfinite(bound) else None for bound in (low, high)]
    return Case(name, predicted, float(estimate), *bounds)


def _finite(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)

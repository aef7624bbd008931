"""From numbers to a verdict, so that the text is true on whatever machine measured them.

A claim is put to the test in one or several cases (see `companion.cases`). What became of the
cases together gives the verdict: holds, holds only if, does not hold, or not decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from companion import verdict_tables
from companion.cases import MISSING, OPEN, REFUTED, SHOWN, Case, Measured, Part, part
from companion.checks import require
from companion.claims import Claim, claim

HOLDS, ONLY_IF, FAILS = "holds", "holds only if", "does not hold"
UNDECIDED, UNMEASURED = "not decided on this machine", "not measured on this machine"


@dataclass(frozen=True)
class Verdict:
    """What became of a claim. Renders as a short paragraph, and as a row of a chapter's table."""

    claim: Claim
    parts: tuple[Part, ...]
    because: str = ""  # a reason that is true whatever the outcome

    def names(self, result: str) -> list[str]:
        """The cases that came out as `result`. A case must be shown in every part to be shown."""
        every = dict.fromkeys(case.name for part in self.parts for case in part.cases)
        named = [name for name in every if name] or [""]
        return [name for name in named if self._case(name) == result]

    def _case(self, name: str) -> str:
        results = set().union(*(part.results(name) for part in self.parts))
        return next(each for each in (REFUTED, MISSING, OPEN, SHOWN) if each in results)

    @property
    def outcome(self) -> str:
        """HOLDS, ONLY_IF, FAILS, UNDECIDED or UNMEASURED. A case not measured is not counted."""
        shown, refuted, open_ = (bool(self.names(each)) for each in (SHOWN, REFUTED, OPEN))
        if shown:
            return ONLY_IF if refuted or open_ else HOLDS
        if open_:
            return UNDECIDED
        return FAILS if refuted else UNMEASURED

    @property
    def sentence(self) -> str:
        """The outcome, the cases on which it depends, and those that say nothing."""
        found = {each: self.names(each) for each in (SHOWN, REFUTED, OPEN, MISSING)}
        text = self.outcome
        if text == ONLY_IF:
            text = f"{text}: {'; '.join(found[SHOWN])}"
        if sum(map(bool, found.values())) == 1:
            return text
        worth_saying = (REFUTED, OPEN, MISSING) if self.outcome == UNDECIDED else (OPEN, MISSING)
        remarks = [f"{each}: {'; '.join(found[each])}" for each in worth_saying if found[each]]
        return f"{text} ({', '.join(remarks)})" if remarks else text

    def as_dict(self) -> dict:
        """Plain values for JSON."""
        return {
            "claim": self.claim.id,
            "parts": [asdict(part) for part in self.parts],
            "because": self.because,
        }

    @classmethod
    def from_dict(cls, plain: Mapping) -> Verdict:
        """The inverse of `as_dict`. Raises ValueError, KeyError or TypeError for anything else."""
        parts = tuple(
            Part(**{**part, "cases": tuple(Case(**case) for case in part["cases"])})
            for part in plain["parts"]
        )
        return cls(claim(plain["claim"]), parts, plain["because"])

    def __str__(self) -> str:
        return verdict_tables.paragraph_text(self)

    def _repr_html_(self) -> str:
        return verdict_tables.paragraph_html(self)


def verdict_on(claim_id: str, *parts: Part, because: str = "") -> Verdict:
    """The verdict on a claim with several parts, such as "faster" and "at a slight loss".

    A case counts as shown where it is shown in every part that has it. Raises ValueError for an
    unknown claim and without parts.
    """
    require(bool(parts), f"the verdict on {claim_id} has 0 parts; at least one is needed")
    return Verdict(claim(claim_id), parts, because)


def verdict(
    claim_id: str,
    *,
    measured: Measured | Mapping[str, Measured],
    quantity: str,
    at_least: float | None = None,
    at_most: float | None = None,
    predicted: float | Mapping[str, float] | None = None,
    unit: str = "",
    because: str = "",
) -> Verdict:
    """The verdict on a claim about one quantity: `verdict_on` with one `part`.

    Example: verdict("C22", quantity="speed-up", unit="x", at_least=1.05, measured={"length 16":
    Interval(0.8, 0.7, 0.9, 0.95), "length 512": None}). Raises ValueError as `part` does.
    """
    limits = {"at_least": at_least, "at_most": at_most}
    only = part(quantity, measured, predicted=predicted, unit=unit, **limits)
    return verdict_on(claim_id, only, because=because)

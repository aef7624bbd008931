"""How verdicts look: a paragraph for one, a table for a chapter, each as HTML and as plain text.

Words carry the meaning, never colour alone; no colour is fixed, so pages read in light and dark.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Protocol

from companion.cases import MISSING, Case, Part
from companion.claims import Claim
from companion.hardware import MachineCard
from companion.intervals import Interval

HEAD = ("claim", "quantity", "predicted", "measured", "it takes", "verdict")


class Judged(Protocol):
    """What a table shows: a claim and its verdict, `companion.judging.Verdict`."""

    claim: Claim
    parts: tuple[Part, ...]
    because: str

    @property
    def sentence(self) -> str: ...


def number(value: float | None, unit: str = "") -> str:
    """Three digits and the unit; a dash for None."""
    if value is None:
        return "-"
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def measured_text(case: Case, unit: str) -> str:
    """An estimate with its interval, an exact number alone, or that nothing was measured."""
    if case.estimate is None:
        return "not measured"
    if case.low is None or case.high is None:
        return f"{number(case.estimate, unit)} (no interval)"
    if case.low == case.high:
        return number(case.estimate, unit)
    estimate, _, bounds = str(Interval(case.estimate, case.low, case.high)).partition(" (")
    return f"{f'{estimate} {unit}'.strip()} ({bounds}"


def limit_text(part: Part) -> str:
    """What the claim takes: "at least 1.05 x", "at most ...", or both."""
    limits = (("at least", part.at_least), ("at most", part.at_most))
    return ", ".join(f"{word} {number(v, part.unit)}" for word, v in limits if v is not None)


def lines(verdict: Judged) -> Iterator[tuple[str, str, str, str, str]]:
    """For each case: quantity, predicted, measured, what it takes, and how the case came out."""
    for part in verdict.parts:
        for case in part.cases:
            name = f"{part.quantity}, {case.name}" if case.name else part.quantity
            predicted = number(case.predicted, part.unit)
            measured = measured_text(case, part.unit)
            yield name, predicted, measured, limit_text(part), part.result(case)


def details(verdict: Judged) -> Iterator[str]:
    """One sentence for each case."""
    for name, predicted, measured, limit, result in lines(verdict):
        before = "" if predicted == number(None) else f"predicted {predicted}, "
        found = f"measured {measured}; it takes {limit}: {result}"
        yield f"{name}: {before}{result if result == MISSING else found}"


def paragraph_text(verdict: Judged) -> str:
    """One verdict in plain text."""
    claim = verdict.claim
    told = [f"{claim.id} ({claim.where}): {claim.says}.", f"Verdict: {verdict.sentence}."]
    told += [f"  {detail}" for detail in details(verdict)]
    return "\n".join([*told, verdict.because]) if verdict.because else "\n".join(told)


def paragraph_html(verdict: Judged) -> str:
    """One verdict as HTML."""
    claim = verdict.claim
    items = "".join(f"<li>{escape(detail)}</li>" for detail in details(verdict))
    because = f"<p>{escape(verdict.because)}</p>" if verdict.because else ""
    return (
        f"<p>{escape(claim.id)} ({escape(claim.where)}): {escape(claim.says)}.<br>"
        f"<strong>Verdict: {escape(verdict.sentence)}.</strong></p><ul>{items}</ul>{because}"
    )


def card_text(card: Mapping[str, object]) -> str:
    """A saved machine card in words, even if an older or a newer version saved other fields."""
    try:
        return str(MachineCard(**{**card, "features": tuple(card["features"])}))
    except (KeyError, TypeError):
        return ", ".join(f"{name} {value}" for name, value in card.items())


@dataclass(frozen=True)
class VerdictTable:
    """Several verdicts with the machine they were measured on."""

    verdicts: tuple[Judged, ...]
    caption: str = "Verdicts"
    card: Mapping[str, object] | None = None  # of the machine

    @property
    def measured_on(self) -> str:
        return f"Measured on {card_text(self.card)}" if self.card else ""

    def __str__(self) -> str:
        told = [self.caption, *map(paragraph_text, self.verdicts), self.measured_on]
        return "\n\n".join(each for each in told if each)

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{name}</th>' for name in HEAD)
        body = "".join(row for verdict in self.verdicts for row in _rows(verdict))
        return (
            f'<div style="overflow-x: auto"><table><caption>{escape(self.caption)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
            f"<p class='machine-card'><small>{escape(self.measured_on)}</small></p>"
        )


def _rows(verdict: Judged) -> Iterator[str]:
    """Rows of a table: one for each case, the claim and its verdict spanning them all."""
    cases = list(lines(verdict))
    claim, span = verdict.claim, f'rowspan="{len(cases)}"'
    told = f"<strong>{escape(claim.id)}</strong> {escape(claim.says)} ({escape(claim.where)})"
    because = f"<br>{escape(verdict.because)}" if verdict.because else ""
    first = f'<th scope="rowgroup" {span} style="text-align: left; font-weight: normal">{told}</th>'
    last = f"<td {span}><strong>{escape(verdict.sentence)}</strong>{because}</td>"
    for index, (name, predicted, measured, limit, result) in enumerate(cases):
        outcome = result if result == MISSING else f"{measured}: {result}"
        cells = (name, predicted, outcome, limit)
        middle = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        yield f"<tr>{first}{middle}{last}</tr>" if index == 0 else f"<tr>{middle}</tr>"

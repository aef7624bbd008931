"""What measuring gives back: a frozen `Report` a model, and a `Comparison` that renders as a table.

A value that was not asked for, or could not be measured, is None or "not measured", never 0.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, fields

from companion.checks import require, require_known
from companion.hardware import MachineCard
from companion.intervals import Interval
from companion.timing import Race

QUALITY = {
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "excess": "bits per byte more than the first",
    "divergence": "KL to the first (nats/token)",
    "agreement": "top-1 agreement with the first",
}
SPEED = {
    "first_token": "time to first token (ms)",
    "prefill": "prefill (tokens/s)",
    "decode": "decode (tokens/s)",
    "flops_share": "prefill, share of peak FLOP/s (%)",
    "bandwidth_share": "decode, share of peak bandwidth (%)",
}
SIZE = {
    "parameters": "parameters",
    "stored_bytes": "stored (MB)",
    "peak_bytes": "peak live (MB)",
    "products": "products run by",
}
COLUMNS = {**SIZE, **QUALITY, **SPEED}
SCALES = {
    "stored_bytes": 1e-6,
    "peak_bytes": 1e-6,
    "first_token": 1e3,
    "flops_share": 100,
    "bandwidth_share": 100,
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found out about one model. Bytes, seconds and shares are plain, not scaled."""

    parameters: int  # different numbers; shared ones count once
    stored_bytes: int  # of distinct storages
    peak_bytes: int | None = None  # stored, and alive at the worst moment of reading the prompt
    products: str | None = None  # what multiplies by the weights, such as "Int8Weights x 121"
    bits_per_byte: Interval | None = None
    perplexity: Interval | None = None
    excess: Interval | None = None  # bits per byte more than the first model, on the same windows
    divergence: Interval | None = None  # KL(first || this), nats per token
    agreement: Interval | None = None  # share of tokens whose best guess is the first model's
    first_token: Interval | None = None  # seconds
    prefill: Interval | None = None  # tokens a second
    decode: Interval | None = None  # tokens a second
    flops_share: Interval | None = None  # of the machine's peak, at prefill
    bandwidth_share: Interval | None = None  # of the machine's peak, at decode

    def as_dict(self) -> dict:
        """Plain numbers; an interval becomes [estimate, low, high]."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def cell(self, column: str) -> str:
        """The value of a column as text, in the column's unit."""
        value, scale = getattr(self, column), SCALES.get(column, 1)
        if value is None:
            return "–"
        if isinstance(value, Interval):
            return str(value.map(lambda x: x * scale))
        if isinstance(value, str):
            return value
        return f"{value * scale:,.1f}" if scale != 1 else f"{value:,}"


def _plain(value: object) -> object:
    if isinstance(value, Interval):
        return [value.estimate, value.low, value.high] if value.known else None
    return value


def _html_row(name: str, *cells: str) -> str:
    return f"<th scope='row'>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells)


@dataclass(frozen=True, repr=False)
class Comparison:
    """Reports side by side, with the machine they were made on."""

    reports: Mapping[str, Report]
    columns: tuple[str, ...]
    races: Mapping[str, Race]  # "prefill" and "decode", where speed was asked for
    machine: MachineCard
    tokens: int
    bytes: int

    def __getitem__(self, name: str) -> Report:
        require_known("model", name, tuple(self.reports))
        return self.reports[name]

    def ratio(self, column: str, name: str, other: str) -> Interval:
        """How many times as fast `name` is as `other` ("prefill", "decode"), paired by round."""
        require(column in self.races, f"column is {column!r}; timed are: {', '.join(self.races)}")
        return self.races[column].ratio(other, name)  # speeds are as the times the other way

    def as_dict(self) -> dict:
        """Plain values for JSON."""
        reports = {name: report.as_dict() for name, report in self.reports.items()}
        sizes = {"tokens": self.tokens, "bytes": self.bytes}
        return {"reports": reports, "machine": self.machine.as_dict(), **sizes}

    def _rows(self) -> list[list[str]]:
        head = ["", *(COLUMNS[column] for column in self.columns)]
        rows = self.reports.items()
        return [head, *([name, *map(report.cell, self.columns)] for name, report in rows)]

    def _notes(self) -> list[str]:
        notes = []
        if set(self.columns) & QUALITY.keys():
            notes.append(f"judged on {self.tokens:,} tokens, {self.bytes:,} bytes; 95% intervals")
        notes += [f"{name}: {race.busy}" for name, race in self.races.items() if race.busy]
        return [*notes, str(self.machine)]

    def __repr__(self) -> str:  # what a cell shows where there is no HTML
        return str(self)

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*(line.rstrip() for line in lines), *self._notes()])

    def _repr_html_(self) -> str:
        head, *rows = [[html.escape(cell) for cell in row] for row in self._rows()]
        top = "".join(f"<th scope='col'>{cell}</th>" for cell in head)
        body = "".join(f"<tr>{_html_row(*row)}</tr>" for row in rows)
        notes = "<br>".join(map(html.escape, self._notes()))
        return f"<table><tr>{top}</tr>{body}</table><p><small>{notes}</small></p>"

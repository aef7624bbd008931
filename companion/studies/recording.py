"""What a study recorded: results with their seeds, machine and date, and whether they still count.

A record is *stale* when the code, settings or data it came from have changed since.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from itertools import chain
from pathlib import Path
from statistics import mean, stdev

from companion.checks import require, require_known
from companion.intervals import Interval, mean_interval
from companion.storage import load_json
from companion.studies.study import FOLDER, Results, Study, find_study


@dataclass(frozen=True)
class Point:
    """One setting run with one seed."""

    setting: str
    seed: int
    seconds: float
    results: Results


def processor(card: Mapping[str, object]) -> object:
    """What computed: the accelerator that a machine card names, or else the processor."""
    device = card.get("device", "cpu")
    return card.get("cpu") if device == "cpu" else device


@dataclass(frozen=True)
class Agreement:
    """Whether a value measured live lies where the recorded seeds say a further seed would."""

    live: float
    expected: Interval
    label: str

    @property
    def holds(self) -> bool:
        return self.expected.contains(self.live)

    def __bool__(self) -> bool:
        return self.holds

    def __str__(self) -> str:
        place = "inside" if self.holds else "OUTSIDE"
        low, high = self.expected.low, self.expected.high
        return f"live {self.live:.4g} lies {place} {low:.4g} to {high:.4g} ({self.label})"

    def _repr_html_(self) -> str:
        return f"<p>{escape(str(self))}</p>"


@dataclass(frozen=True)
class Recorded:
    """The record of one study."""

    name: str
    title: str
    settings: Mapping[str, Mapping[str, object]]  # those that have points
    points: tuple[Point, ...]
    card: Mapping[str, object]  # of the machine, with the date
    hash: str
    stale: bool

    @property
    def label(self) -> str:
        """Where and when: "recorded on <device>, <date>"."""
        machine, date = processor(self.card), self.card["date"]
        changed = "; out of date: its code or settings have changed since" if self.stale else ""
        return f"recorded on {machine}, {date}{changed}"

    @property
    def seconds(self) -> float:
        """Time all points took together."""
        return sum(point.seconds for point in self.points)

    def values(self, setting: str, measure: str) -> list[float | list[float]]:
        """What was measured with each seed. Raises ValueError for unknown names."""
        require_known("setting", setting, self.settings)
        found = [point.results for point in self.points if point.setting == setting]
        require_known("measure", measure, found[0])
        return [results[measure] for results in found]

    def interval(self, setting: str, measure: str, level: float = 0.95) -> Interval:
        """Mean over seeds (at least 2) with Student's interval for it."""
        values = self.values(setting, measure)
        single = not any(isinstance(one, list) for one in values)
        require(single, f"{measure} of {setting} is a list a seed; ask for it pooled")
        return mean_interval(values, level)

    def pooled(self, setting: str, measure: str, level: float = 0.95) -> Interval:
        """Mean over the entries, of all seeds, of a measure that is a list: such as windows."""
        lists = self.values(setting, measure)
        good = all(isinstance(one, list) for one in lists)
        require(good, f"{measure} of {setting} is one number a seed; ask for its interval")
        return mean_interval([*chain(*lists)], level)

    def check(
        self,
        setting: str,
        measure: str,
        live: float,
        *,
        entry: int | None = None,
        slack: float = 0.0,
        level: float = 0.95,
    ) -> Agreement:
        """Compare a value measured live with the recorded ones; of a list, with this `entry`.

        It agrees if it lies in Student's interval for one further seed, widened by `slack` on both
        sides for what the seeds do not vary: other hardware, another Python's texts. Raises
        ValueError for unknown names and with fewer than two seeds, which have no spread.
        """
        require(math.isfinite(live), f"the live value is {live}; it must be finite")
        require(slack >= 0, f"slack is {slack}; it must be at least 0")
        values = self.values(setting, measure)
        if entry is None:
            mean = self.interval(setting, measure, level)
        else:
            mean = mean_interval([one[entry] for one in values], level)
        further = math.sqrt(len(values) + 1)  # one further seed varies more than their mean
        reach = (mean.high - mean.estimate) * further + slack
        expected = Interval(mean.estimate, mean.estimate - reach, mean.estimate + reach, level)
        return Agreement(live, expected, f"{measure}, {setting}, {self.label}")

    def __str__(self) -> str:
        rows = [f"{setting}: {self._told(setting)}" for setting in self.settings]
        return "\n".join([self.title, *rows, self.label])

    def _told(self, setting: str) -> str:
        first = next(point.results for point in self.points if point.setting == setting)
        single = [name for name, value in first.items() if not isinstance(value, list)]
        return ", ".join(f"{name} {_mean_text(self.values(setting, name))}" for name in single)

    def _repr_html_(self) -> str:
        items = [f"<li>{escape(name)}: {escape(self._told(name))}</li>" for name in self.settings]
        label = f"<p><small>{escape(self.label)}</small></p>"
        return f"<p>{escape(self.title)}</p><ul>{''.join(items)}</ul>{label}"


def load(study: str | Study, folder: str | Path = FOLDER) -> Recorded:
    """The record of a study, by its name.

    Raises ValueError for an unknown name and for a damaged or unfinished record, and
    FileNotFoundError if it has not been run; the message says how to run it.
    """
    study = find_study(study) if isinstance(study, str) else study
    path = Path(folder) / f"{study.name}.json"
    command = f"python -m companion.studies {study.name}"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run `{command}`")
    recorded = read_record(path, study)
    held = {(point.setting, point.seed) for point in recorded.points}
    missing = [point for point in study.points if point not in held]
    finished = not missing or recorded.stale
    require(finished, f"{path} lacks {len(missing)} points, {missing[:1]} first; run `{command}`")
    return recorded


def read_record(path: Path, study: Study) -> Recorded:
    """A record as `run_study` wrote it. Raises ValueError, naming the file, for anything else."""
    plain = load_json(path)
    try:
        points = tuple(Point(**point) for point in plain["points"])
        settings = {point.setting: plain["settings"][point.setting] for point in points}
        title, hash, card = str(plain["title"]), str(plain["hash"]), plain["card"]
        whole = plain["study"] == study.name and {"cpu", "date"} <= card.keys()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); restore it or run the study") from error
    require(whole, f"{path} is damaged or of another study; restore it or run the study")
    return Recorded(study.name, title, settings, points, card, hash, hash != study.hash())


def _mean_text(values: list[float]) -> str:
    spread = f" (spread {stdev(values):.2g})" if len(values) > 1 else ""
    return f"{mean(values):.4g}{spread}"

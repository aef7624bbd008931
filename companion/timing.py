"""The stopwatch: which of these callables is faster, by how much, and is that more than noise?

Speeds drift by the second (clock rates, neighbours, heat), so candidates are never timed one after
the other. They run in alternation, and only ratios within a round are compared: what slows a whole
round cancels. The order is drawn anew for each round, which makes the interval hold for a callable
against its own copy whatever the noise is like. Noisy rounds are thrown away and run again; a race
that cannot find its quiet rounds says "machine busy" and gives no number.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

from tqdm.auto import tqdm

from companion.checks import require, require_known, require_whole
from companion.intervals import Interval, median_interval, median_ratio
from companion.rounds import Call, Clock, Round, Track, quiet_rounds, steady

FEWEST, MOST, LONG = 25, 90, 6.0  # rounds, if none are asked for, and the seconds to fit them in
LAYOUT = 0.03  # two copies of one model differ by about this much, however long one measures


@dataclass(frozen=True, repr=False)
class Race:
    """The quiet rounds of a race; without enough of them no number comes out of it."""

    seconds: Mapping[str, tuple[float, ...]]  # a call of each candidate, one entry a quiet round
    threads: int
    tried: int  # rounds run, noisy ones included
    busy: str = ""  # why there is no result; empty if there is one

    def interval(self, name: str) -> Interval:
        """Median seconds a call with a 95 % interval; unknown if the machine was busy."""
        require_known("candidate", name, tuple(self.seconds))
        return Interval.unknown() if self.busy else median_interval(self.seconds[name])

    def median(self, name: str) -> float:
        """Median seconds a call; nan if the machine was busy."""
        return self.interval(name).estimate

    def ratio(self, slow: str, fast: str) -> Interval:
        """How many times as long `slow` takes as `fast`: the median of the ratios within a round.

        Its 95 % interval is stretched by 3 % either way: where a copy of the same weights happens
        to lie in memory makes it about that much faster or slower, and no number of rounds shows
        it. Mytkowicz et al., "Producing wrong data without doing anything obviously wrong!",
        doi:10.1145/1508244.1508275.
        """
        for name in (slow, fast):
            require_known("candidate", name, tuple(self.seconds))
        if self.busy:
            return Interval.unknown()
        plain = median_ratio(self.seconds[slow], self.seconds[fast])
        return Interval(plain.estimate, plain.low / (1 + LAYOUT), plain.high * (1 + LAYOUT))

    def differs(self, a: str, b: str) -> bool | None:
        """Whether the interval of their ratio leaves out 1; None if the machine was busy."""
        ratio = self.ratio(a, b)
        return ratio.excludes(1) if ratio.known else None

    def as_dict(self) -> dict:
        seconds = {name: list(times) for name, times in self.seconds.items()}
        return {"seconds": seconds, "threads": self.threads, "tried": self.tried, "busy": self.busy}

    def _rows(self) -> list[tuple[str, str, str]]:
        first = next(iter(self.seconds))
        scale, unit = _unit(min(self.median(name) for name in self.seconds))
        rows = [("", f"{unit} a call", f"times {first}")]
        for name in self.seconds:
            seconds = self.interval(name).map(lambda s: s * scale)
            rows.append(
                (name, str(seconds), str(self.ratio(name, first)) if name != first else "1")
            )
        return rows

    def _note(self) -> str:
        if self.busy:
            return f"machine busy: not measured, run again ({self.busy})"
        quiet = len(next(iter(self.seconds.values())))
        noisy = f", {self.tried - quiet} noisy ones left out" if self.tried > quiet else ""
        return f"medians of {quiet} rounds{noisy}, 95% intervals; threads: {self.threads}"

    def __repr__(self) -> str:  # what a cell shows where there is no HTML
        return str(self)

    def __str__(self) -> str:
        if self.busy:
            return self._note()
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*(line.rstrip() for line in lines), self._note()])

    def _repr_html_(self) -> str:
        note = f"<small>{html.escape(self._note())}</small>"
        if self.busy:
            return f"<p>{note}</p>"
        head, *rows = [[html.escape(cell) for cell in row] for row in self._rows()]
        top = "".join(f"<th>{cell}</th>" for cell in head)
        body = "".join(f"<tr><th>{a}</th><td>{b}</td><td>{c}</td></tr>" for a, b, c in rows)
        return f"<table><tr>{top}</tr>{body}</table>{note}"


def _unit(seconds: float) -> tuple[float, str]:
    """The factor and name of the unit in which so many seconds read well."""
    known = [(1.0, "s"), (1e3, "ms"), (1e6, "us")]
    return next((unit for unit in known if seconds * unit[0] >= 1), (1e9, "ns"))


def race(
    *,
    rounds: int | None = None,
    warmup: int = 1,
    threads: int = 1,
    patience: float = 2.0,
    seed: int = 0,
    **candidates: Call,
) -> Race:
    """Time zero-argument callables against each other, by name, at `threads` torch threads.

    `rounds` quiet rounds are kept: at least 6, the fewest that give a 95 % interval; if not said,
    as many as fit into six seconds, but 25 to 90. Each samples every candidate twice. Noisy rounds
    are run again while at least half were quiet or `patience` seconds last; after that the machine
    is called busy. The candidates are called `warmup` times before anything is timed.
    Raises ValueError for no candidates, one that cannot be called, and numbers out of range. What a
    candidate raises comes through, with the thread count put back.
    """
    if rounds is not None:
        require_whole("rounds", rounds, least=6)
    require_whole("warmup", warmup, least=0)
    require(patience >= 0, f"patience is {patience!r}; it must be at least 0 seconds")
    require(bool(candidates), "no candidates: name some callables, as in race(plain=f, quick=g)")
    for name, call in candidates.items():
        require(callable(call), f"candidate {name!r} is {call!r}, which cannot be called")
    with steady(threads):
        tries, rounds = _run(Track(candidates, warmup, seed), rounds, patience)
    kept = [r.seconds for r, quiet in zip(tries, quiet_rounds(tries), strict=True) if quiet]
    seconds = {name: tuple(times[name] for times in kept) for name in candidates}
    return Race(seconds, threads, len(tries), "" if len(kept) >= rounds else _reason(tries, kept))


def _run(track: Track, rounds: int | None, patience: float) -> tuple[list[Round], int]:
    """Rounds until enough of them are quiet or the patience is at its end; how many are enough."""
    start = track.clock.now()
    tries = [track.round()]
    if rounds is None:
        rounds = min(MOST, max(FEWEST, int(LONG / max(track.clock.now() - start, 1e-9))))
    quiet = sum(quiet_rounds(tries))
    with tqdm(total=rounds, desc="race", delay=3, leave=False) as bar:
        while quiet < rounds and (
            len(tries) < rounds or 2 * quiet >= len(tries) or track.clock.now() - start < patience
        ):
            tries.append(track.round())
            quiet = sum(quiet_rounds(tries))
            if quiet > bar.n:
                bar.update(quiet - bar.n)
    return tries, rounds


def _reason(tries: list[Round], kept: list) -> str:
    waited = max(r.waited for r in tries)
    return (
        f"{len(kept)} of {len(tries)} rounds quiet; waits for a core up to {waited:.0%} of a sample"
    )


def once(call: Call, threads: int = 1) -> float:
    """Seconds of a single call, for what is too slow or too rare to race: no guard, no interval."""
    require(callable(call), f"{call!r} cannot be called")
    with steady(threads):
        clock = Clock()
        start = clock.now()
        call()
        return clock.now() - start

"""Run rank programs over a virtual clock: any number of ranks, exact seconds, bytes and memory.

Each rank's program runs until it has to wait; the clock then jumps to what happens next. No process
is started and nothing is random: the same programs give the same timeline. Tensors really travel,
so an algorithm's result can be checked (where only the time matters, send tensors of the device
"meta", which have a size and no numbers).

A rank has two lanes. Its program runs on "compute"; what it begins runs beside it on "link", one
program after the other. Messages and meetings are shown on "link", whichever lane asked for them.
`companion.parallel.network` says how long messages take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from companion.checks import require, require_whole
from companion.parallel.lanes import Lanes, Task
from companion.parallel.network import H100, Network
from companion.parallel.requests import Meet, Rank, Receive

Slow = Callable[[int, int], float] | Sequence[float]
SHOWN = 8  # waiting ranks that an error names


class Span(NamedTuple):
    """What a lane of a rank did from `start` to `end` (seconds)."""

    rank: int
    lane: str
    label: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What happened. `seconds` is when the last rank was done; the lists have one entry a rank."""

    seconds: float
    spans: list[Span]
    sent: list[float]  # bytes
    memory: list[tuple[list[float], list[float]]]  # times, and the bytes held from each time on
    results: list[Any]

    @property
    def peak(self) -> list[float]:
        """The most bytes that each rank held at once."""
        return [max(held) for _, held in self.memory]

    def busy(self, rank: int, lane: str = "compute") -> float:
        """Seconds for which a lane of a rank was in use."""
        return sum(s.end - s.start for s in self.spans if (s.rank, s.lane) == (rank, lane))


def simulate(
    rank: Rank, ranks: int, *, network: Network = H100, slow: Slow | None = None
) -> Timeline:
    """Run the programs `rank(r, ranks)` of all ranks r together and say what happened when.

    `slow` stretches computing: one factor for each rank, or `slow(r, i)` for Compute number i of
    rank r. Messages between two ranks are received in the order in which they were sent, whichever
    lane asks for them.
    Raises ValueError for a request that makes no sense (another rank that does not exist, a shape
    that was not sent, negative seconds), and RuntimeError when ranks wait for each other for ever
    or a message was never received; both say which rank.
    """
    require_whole("ranks", ranks)
    lanes = Lanes(ranks, network, _factors(slow, ranks))
    programs = [rank(r, ranks) for r in range(ranks)]
    main = [lanes.start(r, program) for r, program in enumerate(programs)]
    lanes.clock.run()
    _require_ended(lanes, main)
    spans = sorted((Span(*span) for span in lanes.spans), key=lambda s: (s.start, s.rank, s.lane))
    results = [task.result for task in main]
    return Timeline(lanes.clock.now, spans, lanes.sent, lanes.memory, results)


def _factors(slow: Slow | None, ranks: int) -> Callable[[int, int], float]:
    if slow is None:
        return lambda rank, index: 1.0
    if callable(slow):
        return slow
    require(len(slow) == ranks, f"slow holds {len(slow)} factors for {ranks} ranks; one each")
    return lambda rank, index: slow[rank]


def _require_ended(lanes: Lanes, main: list[Task]) -> None:
    stuck = [task for task in main if not task.done]
    stuck += [queue[0] for queue in lanes.begun if queue]
    if stuck:
        reasons = _list([_why(lanes, task) for task in stuck], "; ")
        raise RuntimeError(f"deadlock at {lanes.clock.now:g} s: {reasons}")
    lost = [pair for pair, tensors in lanes.arrived.items() if tensors]
    if lost:
        text = [f"rank {to} did not receive all that rank {source} sent" for source, to in lost]
        names = _list(text, "; ")
        raise RuntimeError(f"{names}; every Send needs its Receive")


def _why(lanes: Lanes, task: Task) -> str:
    """What a task that never went on waits for."""
    request = task.request
    if isinstance(request, Receive):
        reason = f"a tensor from rank {request.source}"
    elif isinstance(request, Meet):
        missing = sorted(set(request.members) - set(lanes.meetings[request.key]))
        reason = f"{_list(missing, ', ')} to come to {request.key!r}"
    else:
        reason = "what it began"
    return f"rank {task.rank} ({task.lane}) waits for {reason}"


def _list(items: list, between: str) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return between.join(map(str, items[:SHOWN])) + more

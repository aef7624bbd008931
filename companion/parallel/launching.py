"""Ranks for a notebook: real processes that call a function of a process group.

    workers = ranks(2)  # once a notebook; also a context manager
    losses = workers.run(one_rank, batches)  # one_rank(group, batches) in each; values in order

The processes are ipyparallel's engines, which stay up between runs. The group is plain
`torch.distributed`, made anew for each run, so that a failed run leaves nothing behind in the next.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import cloudpickle
import ipyparallel.error

from companion.checks import require, require_number, require_whole
from companion.parallel.cluster import Cluster, Local
from companion.parallel.engine import Report
from companion.parallel.profiles import Profile
from companion.parallel.sending import cells, pickled

GRACE = 5.0  # seconds for the other ranks to end by themselves after one has failed
MEETING = 30.0  # seconds in which ranks that are up join a group; most do in 0.1 s
DIED = "its process died or was halted: killed, out of memory, or ended by the function itself"


class RankError(RuntimeError):
    """A rank raised an exception, or died: its number is `rank`, its traceback `text`."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(rank, text)
        self.rank, self.text = rank, text

    def __str__(self) -> str:
        return f"rank {self.rank} failed\n{self.text}"


def ranks(
    count: int,
    *,
    profile: str | None = None,
    start_timeout: float = 60.0,
    timeout: float = 300.0,
) -> Ranks:
    """Start `count` ranks on this machine, which takes about 7 s; timeouts are in seconds.

    Each rank is a process with one torch thread that flushes denormals. Its group works on CPU
    tensors over gloo, and on CUDA tensors over NCCL where each rank has a GPU to itself.

    `profile` names an ipyparallel profile instead, which says where engines run: on hosts reached
    by SSH, in jobs of Slurm, and so on. (`ipython profile create --parallel --profile=NAME` makes
    one; its `ipcluster_config.py` sets `c.Cluster.engine_launcher_class`.) If `ipcluster start` has
    started it, its first `count` engines are used and left running. `companion`, with the same
    versions of Python and torch, must be installed wherever engines run, and host names resolve.

    ValueError: a count that is no whole number of at least 1, a timeout that is no number above 0,
    an unknown profile. TimeoutError: some rank was not there after `start_timeout`. RuntimeError: a
    process ended while it started (with what it wrote). Whatever came up is stopped first.
    """
    return Ranks(count, profile, start_timeout, timeout)


class Ranks:
    """Processes that call functions of a process group; made by `ranks`.

    They stop with `close`, at the end of a `with` block, when the object is garbage collected and
    when Python ends, even by SIGKILL (those of a profile: not by SIGKILL).
    """

    def __init__(
        self, count: int, profile: str | None, start_timeout: float, timeout: float
    ) -> None:
        require_whole("count", count)
        require_number("start_timeout", start_timeout, above=0)
        require_number("timeout", timeout, above=0)
        self.count, self.profile = count, profile
        self.start_timeout, self.timeout = start_timeout, timeout
        self._one_run = threading.Lock()
        self._closed = False
        self._start()

    def run(
        self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None
    ) -> list[Any]:
        """Call `function(group, *arguments)` in each rank; one value a rank, in order of rank.

        `group` is a fresh process group and the default one; the seed is 0. What the function
        prints is printed here when all have ended. Function, arguments and values are pickled, so
        that each rank has copies of its own. A second thread that calls `run` waits for the first.

        RankError: a rank raised an exception, or died. Of several the first is shown, with its
        traceback; all are stopped if one died or still runs 5 s later. TimeoutError: not all
        answered within `timeout` seconds; all are stopped, and the lines where they were are shown.
        KeyboardInterrupt: all are stopped. RuntimeError: the controller died, all are stopped; or
        `close` came before. Stopped ranks are started anew by the next run. ValueError: `function`
        cannot be called, `timeout` is no number above 0, something cannot be pickled.
        """
        require(callable(function), f"function is {function!r}; it must be callable")
        seconds = self.timeout if timeout is None else timeout
        require_number("timeout", seconds, above=0)
        call = pickled(function, arguments)
        with self._one_run:
            if self._closed:
                raise RuntimeError("these ranks are closed; start new ones with ranks(count)")
            if not self._stopping.alive:
                self._start()
            try:
                reports = self._reports(call, seconds)
            except BaseException:
                self._stopping()
                raise
        return _values(reports)

    def close(self) -> None:
        """Stop the ranks, also in the middle of a run; closing twice is harmless."""
        self._closed = True
        self._stopping()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "up" if self._stopping.alive else "stopped"
        return f"<{self.count} ranks, {state}>"

    def _start(self) -> None:
        self._cluster = Local() if self.profile is None else Profile(self.profile)
        self._cluster.start(self.count, self.start_timeout)
        self._stopping = weakref.finalize(self, self._cluster.stop)

    def _reports(self, call: bytes, seconds: float) -> dict[int, Report]:
        """{rank: report}; stops the ranks if one has died or keeps a failed run waiting."""
        deadline = time.monotonic() + seconds
        waiting, reports = self._met(seconds, deadline)
        if not waiting and not _failures(reports):
            waiting = self._cluster.send(call, cells())
            reports = _gathered(self._cluster, waiting, deadline)
        failures = _failures(reports)
        if waiting and not failures:
            raise TimeoutError(_late(self._cluster, sorted(waiting.values()), seconds))
        if waiting or DIED in failures or (failures and "nccl" in self._cluster.backend):
            self._stopping()
        else:
            self._cluster.forget()
        return reports

    def _met(self, seconds: float, deadline: float) -> tuple[dict[Future, int], dict[int, Report]]:
        """Let all join a group: who has not answered, and {rank: report}.

        Gloo waits for ever in some group of ten thousand. Then new processes try again, once.
        """
        patience = seconds + 10 * GRACE  # of the group: the deadline of the run must come first
        waiting = self._cluster.meet(patience)
        reports = _gathered(self._cluster, waiting, min(deadline, time.monotonic() + MEETING))
        if waiting and not _failures(reports) and time.monotonic() < deadline:
            self._stopping()
            self._start()
            waiting = self._cluster.meet(patience)
            reports = _gathered(self._cluster, waiting, deadline)
        return waiting, reports


def _failures(reports: dict[int, Report]) -> set[str]:
    return {report.failure for report in reports.values()} - {""}


def _gathered(cluster: Cluster, waiting: dict[Future, int], deadline: float) -> dict[int, Report]:
    """{rank: report}; whoever answered leaves `waiting`. A failure shortens the deadline."""
    reports: dict[int, Report] = {}
    while waiting and time.monotonic() < deadline:
        done, _ = wait(waiting, 0.1, FIRST_COMPLETED)
        reports |= {waiting.pop(future): _report(future) for future in done}
        reports |= {rank: _death() for rank in cluster.lost(waiting.values())}
        if any(report.failure for report in reports.values()):
            died = any(report.failure == DIED for report in reports.values())
            deadline = min(deadline, time.monotonic() + (0 if died else GRACE))
    return reports


def _report(future: Future) -> Report:
    try:
        return future.result()
    except ipyparallel.error.RemoteError as error:  # raised around the function, not by it
        died = error.ename == "EngineError"
        return _death() if died else Report(b"", str(error), time.time())


def _death() -> Report:
    """A death is noticed late: it comes before the complaints of ranks that lost their peer."""
    return Report(b"", DIED, time.time() - GRACE)


def _late(cluster: Cluster, late: list[int], seconds: float) -> str:
    """Who did not answer, and the innermost lines of where each of them is."""
    names = ", ".join(f"rank {rank}" for rank in late)
    text = f"no answer within {seconds:g} s from {names}; all ranks were stopped"
    for rank, stack in cluster.stacks(late).items():
        where = f":\n{stack.rstrip()}" if stack else " does not say where it is"
        text += f"\nrank {rank}{where}"
    return text


def _values(reports: dict[int, Report]) -> list[Any]:
    """The values in order of rank, after what the ranks printed; raises the first failure."""
    for rank, report in sorted(reports.items()):
        for line in report.printed.splitlines():
            print(f"rank {rank}: {line}")
    failed = [rank for rank, report in reports.items() if report.failure]
    if failed:
        first = min(failed, key=lambda rank: reports[rank].at)
        raise RankError(first, reports[first].failure)
    return [cloudpickle.loads(reports[rank].value) for rank in sorted(reports)]

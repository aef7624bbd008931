"""What runs inside a rank: meet the others in a fresh group, call the function, report.

`cluster` sends these functions to ipyparallel's engines. The function, its arguments and its value
travel as bytes made by cloudpickle, so that what is defined in a notebook's cells travels too.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import io
import linecache
import os
import re
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cloudpickle
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """Where an engine runs."""

    host: str
    pid: int
    gpus: int


@dataclass(frozen=True)
class Seat:
    """One rank's part in one run."""

    rank: int
    ranks: int
    local: int  # number among the ranks of the same host
    backend: str
    meeting: str  # file:///path, or tcp://host:port of a store that rank 0 holds
    stack: str  # file for the rank's stack, written on a signal; empty for none
    seconds: float  # after which a collective gives up


@dataclass(frozen=True)
class Report:
    """What a rank hands back: the pickled value, or the text of a traceback and no value."""

    value: bytes
    failure: str
    at: float  # seconds since the epoch, which tell the first of several failures
    printed: str = ""


def place() -> Place:
    """Say where this engine runs."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Place(socket.gethostname(), os.getpid(), gpus)


def hold() -> str:
    """Open a store on a port that the system chooses, and say where: rank 0 holds it for a run."""
    global _held
    host = socket.gethostname()
    _held = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    return f"tcp://{host}:{_held.port}"


_held: dist.Store | None = None


def meet(seat: Seat) -> Report:
    """Join the group of a run. What goes wrong becomes part of the report."""
    return _reported(seat, lambda: _take(seat))


def perform(seat: Seat, call: bytes, cells: dict[str, list[str]]) -> Report:
    """Call the pickled function; whatever it raises becomes part of the report.

    `cells` holds the source of a notebook's cells, which the lines of a traceback need.
    """
    for name, lines in cells.items():
        linecache.cache[name] = (sum(map(len, lines)), None, lines, name)

    def called() -> object:
        function, arguments = cloudpickle.loads(call)
        return function(dist.group.WORLD, *arguments)

    return _reported(seat, called)


def _reported(seat: Seat, task: Callable[[], object]) -> Report:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), _stack_on_signal(seat.stack):
        value, failure = _attempt(task)
    at = time.time()
    if failure and "nccl" not in seat.backend:
        _leave()
        gc.collect()  # closes the sockets, which frees the ranks that wait for this one
    return Report(value, failure, at, printed.getvalue())


def _attempt(task: Callable[[], object]) -> tuple[bytes, str]:
    try:
        return _pickled(task()), ""
    except BaseException as error:  # SystemExit too: the engine outlives its function
        inner = error.__traceback__.tb_next.tb_next  # the frames of this function and of `task`
        return b"", "".join(traceback.format_exception(type(error), error, inner))


def _take(seat: Seat) -> None:
    """Leave the group of the run before, set the rank up and join the group of this run."""
    _leave()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    if "nccl" in seat.backend:
        torch.cuda.set_device(seat.local)
    patience = datetime.timedelta(seconds=seat.seconds)
    dist.init_process_group(
        seat.backend,
        store=_store(seat, patience),
        rank=seat.rank,
        world_size=seat.ranks,
        timeout=patience,
    )


def _store(seat: Seat, patience: datetime.timedelta) -> dist.Store:
    kind, _, where = seat.meeting.partition("://")
    if kind == "file":
        return dist.FileStore(where, seat.ranks)
    host, _, port = where.rpartition(":")
    return dist.TCPStore(host, int(port), is_master=False, timeout=patience)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _pickled(value: object) -> bytes:
    try:
        return cloudpickle.dumps(value)
    except Exception as error:
        kind = type(value).__name__
        raise TypeError(f"the value, a {kind}, cannot be sent to the notebook: {error}") from error


@contextlib.contextmanager
def _stack_on_signal(path: str) -> Iterator[None]:
    """Write the stack to `path` on SIGUSR1, even while the rank waits in a collective."""
    if not path or not hasattr(faulthandler, "register"):  # Windows has no such signal
        yield
        return
    with open(path, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR1)


def frames(dump: str) -> str:
    """What `_stack_on_signal` wrote as a traceback, from the function called to where it is."""
    found = []
    for line in dump.splitlines():
        frame = re.fullmatch(r'  File "(.+)", line (\d+) in (.+)', line)
        if frame and frame[1] == __file__:
            break
        if frame:
            found.insert(0, (frame[1], int(frame[2]), frame[3], None))
    return "".join(traceback.StackSummary.from_list(found).format())

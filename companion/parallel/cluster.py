"""The engines behind `ranks`, started and reached by ipyparallel.

`Local` engines run on this machine, under a guard that stops them, and meet over a file. A
`profiles.Profile` has engines elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path

import ipyparallel
import psutil

from companion.parallel import engine
from companion.parallel.guard import MARK, Guard

CONTROLLER = ["--usethreads", "--nodb", "--IPController.broadcast_scheduler_depth=0"]
ENGINE = [sys.executable, "-m", "ipyparallel.engine"]
# Gloo would ask for the address of the host's name, which many a laptop cannot answer.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
LINES = 15  # of the log of processes that would not start
SILENT = logging.Logger("ranks", level=logging.CRITICAL + 1)  # stands in no tree of loggers


class Cluster:
    """A controller, its engines and a client of them; where they run is said below this class."""

    def __init__(self, launcher: ipyparallel.Cluster) -> None:
        self._launcher = launcher
        self._client: ipyparallel.Client | None = None
        self._numbers: list[int] = []  # ipyparallel's number of each rank's engine
        self._places: list[engine.Place] = []
        self._seats: list[engine.Seat] = []
        self._sent: dict[Future, int] = {}

    def start(self, count: int, seconds: float) -> None:
        """Start and reach `count` engines; if not, RuntimeError or TimeoutError and no process."""
        deadline = time.monotonic() + seconds
        try:
            self._launch(count, seconds)
            self._connect(count, seconds, deadline)
        except BaseException:
            self.stop()
            raise

    def meet(self, seconds: float) -> dict[Future, int]:
        """Begin a run, in which all ranks join a group: {future of a rank's report: its number}."""
        meeting, stacks = self._meeting(seconds)
        ranks, self._seats = len(self._numbers), []
        for rank in range(ranks):
            stack, local = f"{stacks}/{rank}" if stacks else "", self._local(rank)
            seat = engine.Seat(rank, ranks, local, self.backend, meeting, stack, seconds)
            self._seats.append(seat)
        return self._send(engine.meet)

    def send(self, call: bytes, cells: dict[str, list[str]]) -> dict[Future, int]:
        """Let the ranks that have met call a function: {future of a rank's report: its number}."""
        return self._send(engine.perform, call, cells)

    def _send(
        self, function: Callable[..., engine.Report], *arguments: object
    ) -> dict[Future, int]:
        self._sent = {
            self._client[number].apply_async(function, seat, *arguments): seat.rank
            for number, seat in zip(self._numbers, self._seats, strict=True)
        }
        return dict(self._sent)

    def forget(self) -> None:
        """End a run that all ranks have answered."""
        self._sent.clear()
        self._client.purge_local_results("all")

    @property
    def backend(self) -> str:
        """Gloo, and beside it NCCL for tensors on GPUs where each rank has a GPU to itself."""
        own = all(place.gpus > self._local(rank) for rank, place in enumerate(self._places))
        return "cpu:gloo,cuda:nccl" if own else "gloo"

    def lost(self, waiting: Iterable[int]) -> list[int]:
        """Those of the waiting ranks whose process is gone."""
        return []

    def stacks(self, waiting: Iterable[int]) -> dict[int, str]:
        """Where in its code each of these ranks is, as far as one can see."""
        return {}

    def stop(self) -> None:
        """Let go of the engines."""
        if self._client is not None:
            self._client.close(linger=0)

    def _launch(self, count: int, seconds: float) -> None:
        raise NotImplementedError

    def _meeting(self, seconds: float) -> tuple[str, str]:
        raise NotImplementedError

    def _check(self) -> None:
        """Raise RuntimeError if what was started is known to have ended."""

    def _connect(self, count: int, seconds: float, deadline: float) -> None:
        def wait(ready: Callable[[], bool], state: Callable[[], str]) -> None:
            while not ready():
                self._check()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{state()} within {seconds:g} s")
                time.sleep(0.05)

        left = max(0.1, deadline - time.monotonic())
        self._client = client = self._launcher.connect_client_sync(timeout=left)
        wait(lambda: len(client.ids) >= count, lambda: f"{len(client.ids)} of {count} engines came")
        self._numbers = sorted(client.ids)[:count]
        asked = [client[number].apply_async(engine.place) for number in self._numbers]
        wait(lambda: all(one.done() for one in asked), lambda: "not all engines imported companion")
        self._places = [one.get() for one in asked]

    def _local(self, rank: int) -> int:
        """The rank's number among those of its host."""
        hosts = [place.host for place in self._places]
        return hosts[:rank].count(hosts[rank])


class Local(Cluster):
    """Engines on this machine, which end when the notebook does."""

    def __init__(self) -> None:
        self._guard = Guard()
        self._started: list[int] = []
        self._folder = ""
        super().__init__(
            quiet_launcher(
                profile_dir=self._guard.folder,
                cluster_id="",
                load_profile=False,
                controller_args=CONTROLLER,
                delay=0,
            )
        )

    def _launch(self, count: int, seconds: float) -> None:
        launcher = self._launcher
        environment = {
            MARK: self._guard.mark,
            "IPYTHONDIR": self._guard.folder,
            "OMP_NUM_THREADS": "1",
            **LOOPBACK,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        # A nanny, one process more for each engine, would only tell what `lost` sees at once.
        arguments = [f"--timeout={seconds}", "--IPEngine.enable_nanny=False"]
        launcher.start_controller_sync(environment=environment, connection_info_timeout=seconds)
        launcher.start_engines_sync(
            count, environment=environment, engine_cmd=ENGINE, engine_args=arguments, delay=0
        )
        engines = launcher.engine_set.launchers.values()
        self._started = [launcher.controller.pid, *(one.pid for one in engines)]

    def _check(self) -> None:
        if all(map(psutil.pid_exists, self._started)):
            return
        output = f"{self._launcher.controller.get_output()}{self._launcher.engine_set.get_output()}"
        end = "\n".join(output.splitlines()[-LINES:])
        raise RuntimeError(f"a process of the ranks ended while they started; it wrote\n{end}")

    def _meeting(self, seconds: float) -> tuple[str, str]:
        self._folder = tempfile.mkdtemp(dir=self._guard.folder)
        return f"file://{self._folder}/store", self._folder

    def forget(self) -> None:
        super().forget()
        shutil.rmtree(self._folder, ignore_errors=True)

    def lost(self, waiting: Iterable[int]) -> list[int]:
        if not psutil.pid_exists(self._launcher.controller.pid):
            raise RuntimeError("the controller of the ranks died; the next run starts it anew")
        return [rank for rank in waiting if not psutil.pid_exists(self._places[rank].pid)]

    def stacks(self, waiting: Iterable[int]) -> dict[int, str]:
        found = {}
        for rank in waiting:
            with contextlib.suppress(OSError, AttributeError):  # gone; no such signal on Windows
                os.kill(self._places[rank].pid, signal.SIGUSR1)
        time.sleep(0.2)
        for rank in waiting:
            file = Path(self._folder, str(rank))
            found[rank] = engine.frames(file.read_text()) if file.exists() else ""
        return found

    def stop(self) -> None:
        self._guard.close()
        super().stop()


def quiet_launcher(**settings: object) -> ipyparallel.Cluster:
    """A cluster that says nothing, and that only `stop` stops."""
    return ipyparallel.Cluster(parent=None, log=SILENT, shutdown_atexit=False, **settings)

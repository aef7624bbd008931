"""The lanes of simulated ranks: programs run on them and are sent the answers they ask for.

A program goes on at once after a request that needs no waiting (Send, Begin, Hold). After any other
it rests until the clock, a message or another rank wakes it.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from companion.checks import require
from companion.parallel import requests
from companion.parallel.clock import Clock
from companion.parallel.network import Network, Ports
from companion.parallel.requests import Program, Request

LATER = object()  # no answer yet


@dataclass(eq=False)
class Task:
    """A program on a lane, and the tasks that wait for its result."""

    rank: int
    lane: str
    program: Program
    request: Request | None = None  # its last one
    done: bool = False
    result: Any = None
    waiting: list[Task] = field(default_factory=list)


class Lanes:
    """Two lanes for each of `ranks` ranks; `slow(r, i)` stretches Compute number i of rank r."""

    def __init__(self, ranks: int, network: Network, slow: Callable[[int, int], float]) -> None:
        self.ranks, self.slow = ranks, slow
        self.clock = Clock()
        self.ports = Ports(network, self.clock)
        self.spans: list[tuple[int, str, str, float, float]] = []
        self.sent: list[float] = [0] * ranks
        self.memory: list[tuple[list[float], list[float]]] = [([0.0], [0]) for _ in range(ranks)]
        self.computed = [0] * ranks
        self.begun: list[deque[Task]] = [deque() for _ in range(ranks)]  # the first of each runs
        self.arrived: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)
        self.receivers: dict[tuple[int, int], deque[Task]] = defaultdict(deque)
        self.meetings: dict[object, dict[int, Task]] = {}

    def start(self, rank: int, program: Program) -> Task:
        """Put a rank's own program on its first lane."""
        require(hasattr(program, "send"), f"rank {rank} has {program!r}; a generator is needed")
        task = Task(rank, "compute", program)
        self._wake(0.0, task)
        return task

    def _wake(self, seconds: float, task: Task, answer: Any = None) -> None:
        self.clock.after(seconds, self._go_on, task, answer)

    def _go_on(self, task: Task, answer: Any) -> None:
        """Let a program run until it has to wait, or to its end."""
        try:
            while answer is not LATER:
                task.request = task.program.send(answer)
                answer = self._answer(task, task.request)
        except StopIteration as end:
            self._end(task, end.value)
        except Exception as error:
            error.add_note(f"in a program of rank {task.rank}, at {self.clock.now:g} s")
            raise

    def _end(self, task: Task, result: Any) -> None:
        """Keep the result, wake who waits for it, and start what was begun next."""
        task.done, task.result = True, result
        for waiting in task.waiting:
            self._wake(0.0, waiting, result)
        if task.lane == "link":
            queue = self.begun[task.rank]
            queue.popleft()
            if queue:
                self._wake(0.0, queue[0])

    def _answer(self, task: Task, request: Request) -> Any:
        """What a program is sent for its request: a value, or LATER."""
        match request:
            case requests.Send(to, tensor):
                return self._send(task, to, tensor)
            case requests.Receive(source):
                return self._receive(task, source)
            case requests.Compute(seconds, label):
                return self._compute(task, seconds, label)
            case requests.Meet():
                return self._meet(task, request)
            case requests.Begin(program):
                return self._begin(task, program)
            case requests.Wait(handle):
                return self._wait(task, handle)
            case requests.Hold(bytes, label):
                return self._hold(task, bytes, label)
        raise ValueError(f"rank {task.rank} yields {request!r}; that is none of the requests")

    def _send(self, task: Task, to: int, tensor: Tensor) -> None:
        self._require_other(task.rank, to)
        copy = tensor.detach().clone()  # the receiver's own memory, as between processes
        self.sent[task.rank] += copy.nbytes
        self.ports.send(task.rank, to, copy.nbytes, partial(self._arrive, task.rank, to, copy))

    def _arrive(self, source: int, to: int, tensor: Tensor, start: float) -> None:
        self._span(source, "link", f"send to {to}", start)
        if self.receivers[source, to]:
            self._hand_over(tensor, self.receivers[source, to].popleft())
        else:
            self.arrived[source, to].append(tensor)

    def _receive(self, task: Task, source: int) -> Any:
        self._require_other(task.rank, source)
        tensors = self.arrived[source, task.rank]
        if tensors:
            self._hand_over(tensors.popleft(), task)
        else:
            self.receivers[source, task.rank].append(task)
        return LATER

    def _hand_over(self, tensor: Tensor, task: Task) -> None:
        like = task.request.like
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            expected = f"rank {task.rank} expects {tuple(like.shape)} of {like.dtype}"
            sent = f"rank {task.request.source} sent {tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"{expected}; {sent}")
        self._wake(0.0, task, tensor)

    def _compute(self, task: Task, seconds: float, label: str) -> object:
        self._require_seconds(task, seconds)
        factor = self.slow(task.rank, self.computed[task.rank])
        require(0 < factor < math.inf, f"slow is {factor!r} for rank {task.rank}; above 0 needed")
        self.computed[task.rank] += 1
        seconds *= factor
        self.clock.after(seconds, self._span, task.rank, task.lane, label, self.clock.now)
        self._wake(seconds, task)
        return LATER

    def _meet(self, task: Task, request: requests.Meet) -> object:
        self._require_seconds(task, request.seconds)
        here = self.meetings.setdefault(request.key, {})
        self._require_member(task, request, here)
        here[task.rank] = task
        self.sent[task.rank] += request.sent
        if len(here) == len(request.members):
            del self.meetings[request.key]
            for rank, member in here.items():
                span = (rank, "link", member.request.label, self.clock.now)
                self.clock.after(request.seconds, self._span, *span)
                self._wake(request.seconds, member)
        return LATER

    def _begin(self, task: Task, program: Program) -> Task:
        queue = self.begun[task.rank]
        queue.append(Task(task.rank, "link", program))
        if queue[0] is queue[-1]:
            self._wake(0.0, queue[0])
        return queue[-1]

    def _wait(self, task: Task, handle: object) -> Any:
        own = isinstance(handle, Task) and handle.rank == task.rank
        require(own, f"rank {task.rank} waits for {handle!r}; wait for what Begin answered it")
        if handle.done:
            return handle.result
        handle.waiting.append(task)
        return LATER

    def _hold(self, task: Task, bytes: float, label: str) -> None:
        times, held = self.memory[task.rank]
        text = f"rank {task.rank} gives {-bytes:g} bytes ({label!r}) back, but holds {held[-1]:g}"
        require(held[-1] + bytes > -0.5, text)  # half a byte: sums of fractions are not exact
        times.append(self.clock.now)
        held.append(held[-1] + bytes)

    def _span(self, rank: int, lane: str, label: str, start: float) -> None:
        self.spans.append((rank, lane, label, start, self.clock.now))

    def _require_other(self, rank: int, other: int) -> None:
        good = isinstance(other, int) and 0 <= other < self.ranks and other != rank
        require(good, f"rank {rank} of {self.ranks} asks for rank {other!r}; name another one")

    def _require_seconds(self, task: Task, seconds: float) -> None:
        text = f"rank {task.rank} asks for {seconds!r} seconds; they must be finite, at least 0"
        require(0 <= seconds < math.inf, text)

    def _require_member(self, task: Task, request: requests.Meet, here: dict[int, Task]) -> None:
        first, member = next(iter(here.values()), task).request, task.rank in request.members
        alike = (first.members, first.seconds) == (request.members, request.seconds)
        if task.rank in here or not member or not alike:
            text = "every member comes once, with the same members and seconds"
            raise ValueError(f"rank {task.rank} asks for {request} after {first}; {text}")

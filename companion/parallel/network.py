"""Links between ranks, and the ports through which messages leave and arrive.

A message of m bytes takes latency + m / bandwidth, all of it on a port of the sender and on a port
of the receiver: a rank sends one message and takes in one at a time, both at once, as in the closed
forms of `companion.parallel.traffic`. Messages that want the same port go one after the other.

Ranks come in nodes. Two ranks of one node talk over the link `inside`, any others over the link
`between`. Every rank has ports of its own to both, as a GPU has NVLink and a network card: what
goes on inside a node does not hold up what goes on between nodes.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from companion.checks import require_whole
from companion.parallel.clock import Clock
from companion.parallel.traffic import Link

Port = tuple[int, bool]  # a rank, and whether it is its port to the own node


@dataclass(frozen=True)
class Network:
    """The link inside a node of `node` ranks and that between nodes; None: one link for all."""

    inside: Link
    between: Link | None = None
    node: int = 8

    def __post_init__(self) -> None:
        require_whole("node", self.node)

    def within(self, source: int, to: int) -> bool:
        """Whether two ranks talk over the link inside a node."""
        return self.between is None or source // self.node == to // self.node

    def link(self, source: int, to: int) -> Link:
        """The link over which two ranks talk."""
        return self.inside if self.within(source, to) else self.between


# Nodes of 8 H100: for every GPU NVLink with 450 GB/s and a network card with 400 Gb/s each way, as
# NVIDIA's data sheets of H100 and DGX H100 say. The latencies are only of the right order.
H100 = Network(inside=Link(3e-6, 450e9), between=Link(15e-6, 50e9))


class Ports:
    """Lets messages go as soon as both their ports are free, in the order they were handed over."""

    def __init__(self, network: Network, clock: Clock) -> None:
        self.network, self.clock = network, clock
        self.queues: dict[Port, deque] = defaultdict(deque)  # handed over, not yet on its way
        self.sending: set[Port] = set()
        self.receiving: set[Port] = set()
        self.blocked: dict[Port, dict[Port, None]] = defaultdict(dict)  # by whose port: in order

    def send(self, source: int, to: int, size: float, arrive: Callable[[float], None]) -> None:
        """Hand over a message; `arrive(start)` is called when it is there, `start` when it left."""
        within = self.network.within(source, to)
        seconds = self.network.link(source, to).seconds(size)
        self.queues[source, within].append(((to, within), seconds, arrive))
        self._start((source, within))

    def _start(self, out: Port) -> None:
        if out in self.sending or not self.queues[out]:
            return
        into, seconds, arrive = self.queues[out][0]
        if into in self.receiving:
            self.blocked[into][out] = None
            return
        self.queues[out].popleft()
        self.sending.add(out)
        self.receiving.add(into)
        self.clock.after(seconds, self._end, out, into, arrive, self.clock.now)

    def _end(self, out: Port, into: Port, arrive: Callable[[float], None], start: float) -> None:
        self.sending.remove(out)
        self.receiving.remove(into)
        arrive(start)
        for port in (*self.blocked.pop(into, ()), out):
            self._start(port)

"""Adding up over nodes: the fast links inside carry the bulk, each slow link between only a share.

With g ranks a node and N nodes, every rank first gets the sum of one g-th of the tensor over its
node (reduce-scatter inside), adds that share up with the ranks of the same place in other nodes
(all-reduce between, all g shares at once), and then fetches the rest (all-gather inside).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from companion.checks import require, require_whole
from companion.parallel.network import Network
from companion.parallel.requests import Program, Receive, Send
from companion.parallel.rings import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from companion.parallel.traffic import seconds, sent_bytes


def among(members: Sequence[int], program: Program) -> Program:
    """Run a program written for ranks 0, 1, ... among these ranks: 0 is members[0] and so on."""
    answer = None
    while True:
        try:
            request = program.send(answer)
        except StopIteration as end:
            return end.value
        match request:
            case Send(to, tensor):
                request = Send(members[to], tensor)
            case Receive(source, like):
                request = Receive(members[source], like)
        answer = yield request


def hierarchical_all_reduce(rank: int, ranks: int, tensor: Tensor, node: int = 8) -> Program:
    """The sum of all ranks' tensors, by way of the nodes; the same on every rank.

    Raises ValueError when the ranks do not fill their nodes.
    """
    inside, peers = groups(rank, ranks, node)
    place = rank - inside[0]
    shard = yield from among(inside, ring_reduce_scatter(place, len(inside), tensor))
    shard = yield from among(peers, ring_all_reduce(peers.index(rank), len(peers), shard))
    gather = ring_all_gather(place, len(inside), shard, like=tensor)
    return (yield from among(inside, gather))


def groups(rank: int, ranks: int, node: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ranks of this rank's node, and those with its place in every node.

    Fewer ranks than `node` are one node. Raises ValueError when the ranks do not fill their nodes.
    """
    require_whole("ranks", ranks)
    node = min(node, ranks)
    require(ranks % node == 0, f"{ranks} ranks do not fill nodes of {node}; take a multiple of it")
    first = rank - rank % node
    return tuple(range(first, first + node)), tuple(range(rank % node, ranks, node))


class Part(NamedTuple):
    """One collective of a sum: its members, its seconds, and the bytes that each of them sends."""

    kind: str
    members: tuple[int, ...]
    seconds: float
    sent: float


def parts(size: float, rank: int, ranks: int, network: Network) -> list[Part]:
    """What the sum of `size` bytes is made of for `rank`; with one link for all, a single ring."""
    if network.between is None:
        plan = [("all_reduce", tuple(range(ranks)), size, network.inside)]
    else:
        inside, peers = groups(rank, ranks, network.node)
        plan = [
            ("reduce_scatter", inside, size, network.inside),
            ("all_reduce", peers, size / len(inside), network.between),
            ("all_gather", inside, size, network.inside),
        ]
    return [
        Part(kind, members, seconds(kind, amount, n, link), sent_bytes(kind, amount, n))
        for kind, members, amount, link in plan
        if (n := len(members)) > 1
    ]


def all_reduce_seconds(size: float, ranks: int, network: Network) -> float:
    """Seconds of one sum of S bytes over N nodes of g ranks, over rings:

    2 (g - 1) (latency + S / g / bandwidth) of the link inside, and
    2 (N - 1) (latency + S / (g N) / bandwidth) of the link between.
    """
    return sum(part.seconds for part in parts(size, 0, ranks, network))

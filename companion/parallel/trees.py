"""Collectives on a binomial tree: whole tensors, and twice as many ranks in each round.

Every program here is one rank's part of the algorithm (see `requests`). Counted from the root, the
partner of a rank stands 1, 2, 4, ... ranks away. Few rounds, so good for small tensors; but the
whole tensor travels each time, and the root has it in hand in every round.
"""

from __future__ import annotations

from torch import Tensor

from companion.parallel.requests import Program, Receive, Send


def tree_broadcast(rank: int, ranks: int, tensor: Tensor, root: int = 0) -> Program:
    """The root's tensor, in ceil(log2 n) rounds of the whole tensor.

    Other ranks' tensors only say the shape and the type. The root returns its tensor itself.
    """
    place = (rank - root) % ranks
    for distance in reversed(_distances(ranks)):
        if place % (2 * distance) == distance:
            tensor = yield Receive((rank - distance) % ranks, tensor)
        elif place % (2 * distance) == 0 and place + distance < ranks:
            yield Send((rank + distance) % ranks, tensor)
    return tensor


def tree_reduce(rank: int, ranks: int, tensor: Tensor, root: int = 0) -> Program:
    """At the root the sum of all ranks' tensors, elsewhere a part of it; a broadcast backwards.

    ceil(log2 n) rounds of the whole tensor.
    """
    place = (rank - root) % ranks
    for distance in _distances(ranks):
        if place % (2 * distance) == distance:
            yield Send((rank - distance) % ranks, tensor)
        elif place % (2 * distance) == 0 and place + distance < ranks:
            tensor = tensor + (yield Receive((rank + distance) % ranks, tensor))
    return tensor


def tree_all_reduce(rank: int, ranks: int, tensor: Tensor) -> Program:
    """The sum of all ranks' tensors, bit for bit the same on every rank: up the tree and down.

    2 ceil(log2 n) rounds of the whole tensor.
    """
    total = yield from tree_reduce(rank, ranks, tensor)
    return (yield from tree_broadcast(rank, ranks, total))


def _distances(ranks: int) -> list[int]:
    """1, 2, 4, ... below `ranks`."""
    return [1 << bit for bit in range((ranks - 1).bit_length())]

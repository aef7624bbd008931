"""Collectives on a ring: cut the tensor into one part a rank and pass the parts on.

Every program here is one rank's part of the algorithm (see `requests`). Parts are those of
`torch.tensor_split` of the flat tensor, so any length will do: they differ by at most one number,
and some are empty where there are more ranks than numbers. A rank sends to the next one only, and
receives the next part at the same time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from companion.parallel.requests import Program, Receive, Send


def ring_reduce_scatter(rank: int, ranks: int, tensor: Tensor) -> Program:
    """Part number `rank` of the flat sum of all ranks' tensors, shape (numbers / ranks).

    Part p sets out at rank p + 1; each rank that it comes to adds its own numbers; the last of them
    is rank p. n - 1 rounds of size / n bytes.
    """
    parts = list(tensor.flatten().tensor_split(ranks))
    for turn in range(ranks - 1):
        yield Send((rank + 1) % ranks, parts[(rank - turn - 1) % ranks])
        part = (rank - turn - 2) % ranks
        parts[part] = parts[part] + (yield Receive((rank - 1) % ranks, parts[part]))
    return parts[rank]


def ring_all_gather(rank: int, ranks: int, shard: Tensor, like: Tensor | None = None) -> Program:
    """All ranks' shards as one tensor, the same on every rank; n - 1 rounds of size / n bytes.

    Shards have one shape and are joined along the first axis. Where they are uneven, `like` says
    what they are parts of (its numbers are not read): the result has its shape.
    """
    if like is None:
        shard = torch.atleast_1d(shard)
        like = shard.new_empty((ranks * len(shard), *shard.shape[1:]))
    parts = list(like.flatten().tensor_split(ranks))
    parts[rank] = shard.flatten()
    for turn in range(ranks - 1):
        yield Send((rank + 1) % ranks, parts[(rank - turn) % ranks])
        part = (rank - turn - 1) % ranks
        parts[part] = yield Receive((rank - 1) % ranks, parts[part])
    return torch.cat(parts).reshape(like.shape)


def ring_all_reduce(rank: int, ranks: int, tensor: Tensor) -> Program:
    """The sum of all ranks' tensors, bit for bit the same on every rank.

    Each part is added up once, in one order, and then copied. 2 (n - 1) rounds of size / n bytes:
    no all-reduce sends less (Patarasuk and Yuan, doi:10.1016/j.jpdc.2008.09.002).
    """
    shard = yield from ring_reduce_scatter(rank, ranks, tensor)
    return (yield from ring_all_gather(rank, ranks, shard, like=tensor))


def ring_broadcast(
    rank: int, ranks: int, tensor: Tensor, root: int = 0, parts: int | None = None
) -> Program:
    """The root's tensor, down a chain of ranks in `parts` messages (as many as ranks if not said).

    A rank hands a part on while the next one arrives. n + parts - 2 rounds of size / parts bytes.
    Other ranks' tensors only say the shape and the type.
    """
    chain = (rank - root) % ranks  # how far down this rank stands
    passed = list(tensor.flatten().tensor_split(ranks if parts is None else parts))
    for number, part in enumerate(passed):
        if chain > 0:
            passed[number] = yield Receive((rank - 1) % ranks, part)
        if chain < ranks - 1:
            yield Send((rank + 1) % ranks, passed[number])
    return torch.cat(passed).reshape(tensor.shape)

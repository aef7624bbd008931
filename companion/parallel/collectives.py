"""Collectives over a torch process group, made of nothing but send and receive.

Each runs the program of `rings` or `trees` that its name says, by `processes.perform`, and returns
a new tensor. They equal torch's own, which are quicker: these are here to be read and counted.
All ranks of the group must call the same one with tensors of the same shape and type. One rank
cannot see the others' shapes: where they differ, the call fails, hangs until the group's time-out,
or returns numbers that mean nothing. Reductions are sums; no gradient flows through.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from companion.checks import require, require_known
from companion.parallel.measuring import measured
from companion.parallel.processes import Sent, perform, place
from companion.parallel.requests import Program
from companion.parallel.rings import (
    ring_all_gather,
    ring_all_reduce,
    ring_broadcast,
    ring_reduce_scatter,
)
from companion.parallel.trees import tree_all_reduce, tree_broadcast, tree_reduce

__all__ = [
    "all_gather", "all_reduce", "broadcast", "measured", "reduce_scatter",
    "ring_all_gather", "ring_all_reduce", "ring_broadcast", "ring_reduce_scatter",
    "tree_all_reduce", "tree_broadcast", "tree_reduce",
]  # fmt: skip

BROADCASTS = {"ring": ring_broadcast, "tree": tree_broadcast}
ALL_REDUCES = {"ring": ring_all_reduce, "tree": tree_all_reduce}


def broadcast(
    tensor: Tensor,
    group: dist.ProcessGroup,
    *,
    root: int = 0,
    way: str = "ring",
    sent: Sent | None = None,
) -> Tensor:
    """The tensor of rank `root` of the group, on every rank; other tensors say shape and type.

    `sent` counts the bytes. Raises ValueError for an unknown way and a root out of range.
    """
    require_known("way", way, BROADCASTS)
    rank, ranks = place(group)
    good = isinstance(root, int) and 0 <= root < ranks
    require(good, f"root is {root!r}; of {ranks} ranks it must be one of 0 to {ranks - 1}")
    return _run(BROADCASTS[way](rank, ranks, _own(tensor), root), tensor, group, sent)


def all_reduce(
    tensor: Tensor, group: dist.ProcessGroup, *, way: str = "ring", sent: Sent | None = None
) -> Tensor:
    """The sum of all ranks' tensors, bit for bit the same on every rank, shape as given.

    `sent` counts the bytes. Raises ValueError for an unknown way.
    """
    require_known("way", way, ALL_REDUCES)
    return _run(ALL_REDUCES[way](*place(group), _own(tensor)), tensor, group, sent)


def reduce_scatter(tensor: Tensor, group: dist.ProcessGroup, *, sent: Sent | None = None) -> Tensor:
    """This rank's part of the sum of all ranks' tensors, shape (numbers / ranks), flat.

    Parts are those of `torch.tensor_split`; any number of numbers will do. `sent` counts the bytes.
    """
    return _run(ring_reduce_scatter(*place(group), _own(tensor)), tensor, group, sent)


def all_gather(
    shard: Tensor,
    group: dist.ProcessGroup,
    *,
    like: Tensor | None = None,
    sent: Sent | None = None,
) -> Tensor:
    """All ranks' shards, of one shape, joined along the first axis, the same on every rank.

    With `like` it undoes `reduce_scatter`, for any length: shards are the flat parts of a tensor of
    that shape. `sent` counts the bytes. Raises ValueError for a shard that is not this rank's part.
    """
    rank, ranks = place(group)
    if like is not None:
        part = like.flatten().tensor_split(ranks)[rank]
        good = shard.numel() == part.numel() and shard.dtype == part.dtype
        given, due = f"{shard.numel()} {shard.dtype}", f"{part.numel()} {part.dtype}"
        require(good, f"rank {rank}'s shard is {given}; its part of such a tensor is {due}")
    return _run(ring_all_gather(rank, ranks, _own(shard), like), shard, group, sent)


def _own(tensor: Tensor) -> Tensor:
    require(isinstance(tensor, Tensor), f"there is {type(tensor).__name__} to send; give a tensor")
    return tensor.detach()


def _run(program: Program, given: Tensor, group: dist.ProcessGroup, sent: Sent | None) -> Tensor:
    """The program's result, in memory of its own (a root's result is the tensor it was given)."""
    result = perform(program, group, sent=sent)
    shared = result.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    return result.clone(memory_format=torch.contiguous_format) if shared else result

"""What a rank may ask of the world: the few words in which parallel algorithms are written here.

A rank's part of an algorithm is a *program*, a generator: it yields a request and is sent the
answer. The same lines then run over a virtual clock with any number of ranks (`simulator`) and in
real processes (`processes`), so what is true of one is true of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Send:
    """Hand a tensor to rank `to` and go on at once; what was handed over must not change."""

    to: int
    tensor: Tensor


@dataclass(frozen=True)
class Receive:
    """Wait for the next tensor from rank `source`; shape and type are those of `like`."""

    source: int
    like: Tensor


@dataclass(frozen=True)
class Compute:
    """Be busy for so many seconds (simulator only)."""

    seconds: float
    label: str = ""


@dataclass(frozen=True)
class Meet:
    """A collective taken as one piece: starts when the last member comes, takes `seconds`.

    All members name the same `key`; it counts `sent` bytes for each of them (simulator only).
    """

    key: object
    members: tuple[int, ...]
    seconds: float
    sent: float = 0.0
    label: str = ""


@dataclass(frozen=True)
class Begin:
    """Run `program` beside this one, after all that was begun before; the answer is a handle.

    It is the second lane of a rank, on which a device sends while it computes (simulator only).
    """

    program: Program


@dataclass(frozen=True)
class Wait:
    """Wait until what was begun is done; the answer is its result (simulator only)."""

    handle: object


@dataclass(frozen=True)
class Hold:
    """Take `bytes` of memory from now on; a negative number gives them back (simulator only)."""

    bytes: float
    label: str = ""


Request = Send | Receive | Compute | Meet | Begin | Wait | Hold
Program = Generator[Request, Any, Any]
Rank = Callable[[int, int], Program]  # (rank, how many there are) -> its program

"""What a collective costs, in closed form: bytes sent, messages in a row, seconds.

Two numbers describe a link: its *latency* (alpha, what any message costs) and its *bandwidth*
(1/beta, bytes a second). A message of m bytes takes alpha + m beta. A rank sends one message and
takes in one at a time, both at once, and a collective runs in rounds of equal messages, so

    seconds = rounds x (alpha + message x beta).

A *ring* cuts the tensor into n parts, one a rank, and passes parts on to the next rank: many
rounds, short messages. A binomial *tree* sends the whole tensor, and twice as many ranks take part
in each round: few rounds, long messages. Thakur, Rabenseifner and Gropp,
doi:10.1177/1094342005051521, compare such algorithms in these terms; Patarasuk and Yuan,
doi:10.1016/j.jpdc.2008.09.002, derive the lower bound that the ring reaches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from companion.checks import require, require_known, require_number, require_whole

KINDS = ("broadcast", "all_reduce", "all_gather", "reduce_scatter")
WAYS = ("ring", "tree")
ON_TREES = ("broadcast", "all_reduce")  # the others need every part somewhere else: only rings


@dataclass(frozen=True)
class Link:
    """What joins two ranks: seconds that any message costs, and bytes a second."""

    latency: float
    bandwidth: float  # infinite where the bytes cost nothing

    def __post_init__(self) -> None:
        good = math.isfinite(self.latency) and self.latency >= 0
        require(good, f"latency is {self.latency!r}; it must be finite and at least 0 seconds")
        good = self.bandwidth > 0
        require(good, f"bandwidth is {self.bandwidth!r}; it must be above 0 bytes a second")

    def seconds(self, size: float) -> float:
        """Seconds of one message: latency + size / bandwidth. ValueError for a size below 0."""
        _require_size(size)
        return self.latency + size / self.bandwidth


def sent_bytes(kind: str, size: float, ranks: int, way: str = "ring") -> float:
    """Bytes one rank sends, the mean over the ranks; `size` is the bytes of the whole tensor.

    Count what must arrive. A broadcast brings the tensor to n - 1 ranks; an all-gather brings each
    of n ranks the n - 1 parts it lacks; both are (n - 1) size in all, and a reduce-scatter is an
    all-gather backwards. An all-reduce is two of these. Divided by n:

        (n - 1) / n x size,  for an all-reduce 2 (n - 1) / n x size.

    Ring and tree send the same; a tree sends more of it from few ranks. Exact for any length: where
    parts are uneven (they differ by one number) some ranks send more, but the mean stays.
    Raises ValueError for an unknown kind or way, a negative size, less than one rank.
    """
    _require(kind, ranks, way)
    _require_size(size)
    return (2 if kind == "all_reduce" else 1) * (ranks - 1) * size / ranks


def rounds(kind: str, ranks: int, way: str = "ring") -> int:
    """Messages that have to wait for one another.

    Ring: n - 1 until a part has come round, for an all-reduce twice that. A broadcast is a chain
    of n - 1 links through which n parts follow each other: the first arrives after n - 1 rounds,
    the last n - 1 later. Tree: ceil(log2 n), for an all-reduce up and down again.
    Raises ValueError for an unknown kind or way, less than one rank.
    """
    _require(kind, ranks, way)
    if way == "tree":
        return (2 if kind == "all_reduce" else 1) * (ranks - 1).bit_length()
    return (2 if kind in ON_TREES else 1) * (ranks - 1)


def seconds(kind: str, size: float, ranks: int, link: Link, way: str = "ring") -> float:
    """Predicted seconds of a collective: rounds x (latency + message / bandwidth).

    A message is size / n bytes on a ring and `size` on a tree. Adding up what arrives costs time
    for each byte, too; it has no term of its own, a fitted bandwidth holds it.
    Raises ValueError as `sent_bytes` does.
    """
    _require_size(size)
    return rounds(kind, ranks, way) * link.seconds(_message(size, ranks, way))


def fit_link(
    kind: str, sizes: Sequence[float], seconds: Sequence[float], ranks: int, way: str = "ring"
) -> Link:
    """The link that explains measured `seconds` of a collective at `sizes` (bytes) best.

    Least squares of the relative errors, sum of (1 - predicted / measured)^2, so that the short
    calls count as much as the long; latency and 1 / bandwidth are not negative.
    Raises ValueError as `sent_bytes` does, and for fewer than two different sizes, a size without
    its seconds, seconds that are not above 0, and less than two ranks, which send nothing.
    """
    _require(kind, ranks, way)
    require_whole("ranks", ranks, least=2)
    good = len(sizes) == len(seconds) and len(set(sizes)) >= 2
    require(
        good, f"{len(set(sizes))} different sizes and {len(seconds)} times; a line needs 2 each"
    )
    for size, time in zip(sizes, seconds, strict=True):
        _require_size(size)
        require_number("seconds", time, above=0)
    messages = rounds(kind, ranks, way)
    fixed = [messages / time for time in seconds]
    each = [f * _message(size, ranks, way) for f, size in zip(fixed, sizes, strict=True)]
    latency, inverse = _nearest_to_one(fixed, each)
    return Link(latency, 1 / inverse if inverse > 0 else math.inf)


def _message(size: float, ranks: int, way: str) -> float:
    return size if way == "tree" else size / ranks


def _nearest_to_one(u: Sequence[float], v: Sequence[float]) -> tuple[float, float]:
    """a, b >= 0 with the smallest sum of (1 - a u - b v)^2."""
    uu, vv, uv = _dot(u, u), _dot(v, v), _dot(u, v)
    su, sv, scale = sum(u), sum(v), uu * vv - uv * uv
    a, b = (su * vv - sv * uv) / scale, (sv * uu - su * uv) / scale
    if a >= 0 and b >= 0:
        return a, b
    # then the best has one of them at zero: u alone takes su^2 / uu off the sum, v alone sv^2 / vv
    return (su / uu, 0.0) if su * su * vv >= sv * sv * uu else (0.0, sv / vv)


def _dot(u: Sequence[float], v: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(u, v, strict=True))


def _require(kind: str, ranks: int, way: str) -> None:
    require_known("kind", kind, KINDS)
    require_known("way", way, WAYS)
    require_known(f"kind for a {way}", kind, KINDS if way == "ring" else ON_TREES)
    require_whole("ranks", ranks)


def _require_size(size: float) -> None:
    good = isinstance(size, (int, float)) and math.isfinite(size) and size >= 0
    require(good, f"size is {size!r}; it must be a finite number of bytes, at least 0")

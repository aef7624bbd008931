"""A step of data-parallel training on any number of ranks: as a program, and in closed form.

A rank computes forward and backward. When backward has passed a part of the model, the gradients of
that part (a *bucket*) can be added up over all ranks while backward goes on; only what is left over
at its end costs time. The step is over when the slowest rank is done, and the slowest of many ranks
is slower than the slowest of few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from companion.checks import require, require_number, require_whole
from companion.parallel.hierarchy import all_reduce_seconds, parts
from companion.parallel.network import H100, Network
from companion.parallel.requests import Begin, Compute, Meet, Program, Rank, Wait

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Work:
    """What each rank computes in a step (seconds), and what has to be added up (bytes).

    A step has `batches` micro-batches; gradients are added up in the last one only. `backward[i]`
    is how long backward takes from bucket i - 1 to bucket i, `update` is the optimizer's time.
    """

    forward: float
    backward: tuple[float, ...]
    buckets: tuple[float, ...]
    update: float = 0.0
    batches: int = 1

    def __post_init__(self) -> None:
        found = (len(self.backward), len(self.buckets))
        text = f"backward has {found[0]} parts and there are {found[1]} buckets; as many are needed"
        require(found[0] == found[1] > 0, text)
        times = (self.forward, *self.backward, *self.buckets, self.update)
        good = all(math.isfinite(time) and time >= 0 for time in times)
        require(good, f"{self}: seconds and bytes must be finite and at least 0")
        require_whole("batches", self.batches)

    @property
    def before(self) -> float:
        """Seconds of computing until the backward pass that sends."""
        return (self.batches - 1) * (self.forward + sum(self.backward)) + self.forward

    @property
    def compute(self) -> float:
        """Seconds of all computing: what a step takes where nothing has to be sent."""
        return self.before + sum(self.backward) + self.update


def even(
    forward: float, backward: float, size: float, buckets: int, *, update: float = 0.0
) -> Work:
    """Work of one micro-batch whose `size` bytes of gradients come in equal buckets, evenly."""
    require_whole("buckets", buckets)
    pieces = (backward / buckets,) * buckets, (size / buckets,) * buckets
    return Work(forward, *pieces, update=update)


def training_step(work: Work, network: Network = H100, *, overlap: bool = True) -> Rank:
    """The program of one step, to `simulate`; without `overlap` nothing is sent before the end of
    backward. Each sum is a reduce-scatter, all-reduce and all-gather that the ranks meet in."""

    def program(rank: int, ranks: int) -> Program:
        for _ in range(work.batches - 1):
            yield Compute(work.forward, "forward")
            yield Compute(sum(work.backward), "backward")
        yield Compute(work.forward, "forward")
        sums = [_add_up(i, size, rank, ranks, network) for i, size in enumerate(work.buckets)]
        begun = []
        for number, time in enumerate(work.backward):
            yield Compute(time, f"backward {number}")
            if overlap:
                begun.append((yield Begin(sums[number])))
        for left in sums[len(begun) :]:
            begun.append((yield Begin(left)))
        for handle in begun:
            yield Wait(handle)
        yield Compute(work.update, "update")

    return program


def _add_up(bucket: int, size: float, rank: int, ranks: int, network: Network) -> Program:
    for kind, members, time, sent in parts(size, rank, ranks, network):
        key, label = (bucket, kind, members[0]), f"{kind.replace('_', '-')} {bucket}"
        yield Meet(key, members, time, sent, label)


def step_seconds(
    work: Work, ranks: int, network: Network = H100, *, overlap: bool = True, factor: float = 1.0
) -> float:
    """Seconds of a step in closed form, exact; the slowest rank computes `factor` times as long.

    Backward reaches bucket k after b_0 + ... + b_k, and then c_k + c_k+1 + ... of sums are still to
    come, one after the other. So both together take the maximum over k of
    b_0 + ... + b_k + c_k + ... + c_B-1. Of B equal buckets the first or the last decides:
    max(backward + c, backward / B + B c), so max(backward, B c) and a tail that cannot overlap.
    """
    require_number("factor", factor, above=0)
    cost = {size: all_reduce_seconds(size, ranks, network) for size in set(work.buckets)}
    ready = list(accumulate(work.backward))
    if not overlap:
        ready = ready[-1:] * len(ready)
    left = list(accumulate(cost[size] for size in reversed(work.buckets)))[::-1]
    both = max(factor * b + c for b, c in zip(ready, left, strict=True))
    return factor * (work.before + work.update) + both


def stragglers(ranks: int, spread: float, seed: int = 0) -> list[float]:
    """One factor a rank for `simulate(slow=...)`: log-normal with median 1.

    `spread` is the standard deviation of its logarithm; 0.05 is about 5 %.
    """
    _require(ranks, spread)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(ranks, generator=generator, dtype=torch.float64)
    return (spread * noise).exp().tolist()


def slowest(ranks: int, spread: float) -> float:
    """The factor to expect of the slowest of so many stragglers, the mean over all draws.

    The largest of n normal numbers has the density n pdf(z) cdf(z)^(n - 1); exp(spread z) of it.
    """
    _require(ranks, spread)
    if spread == 0:
        return 1.0
    z = torch.linspace(-12, 12, 481, dtype=torch.float64)
    density = -(z**2) / 2 + (ranks - 1) * torch.special.log_ndtr(z)
    scale = ranks / math.sqrt(2 * math.pi)
    return float(scale * torch.trapezoid((density + spread * z).exp(), z))


def efficiency(
    work: Work,
    ranks: int,
    network: Network = H100,
    *,
    overlap: bool = True,
    spread: float = 0.0,
) -> float:
    """How many of the P ranks count: speed on P ranks / (P x speed of the median rank alone).

    Stragglers enter by the factor to expect of the slowest. That is exact without overlap; with
    it, the mean over many steps is a little longer (the time is convex in the factor).
    """
    factor = slowest(ranks, spread)
    return work.compute / step_seconds(work, ranks, network, overlap=overlap, factor=factor)


def curve(
    work: Work,
    tokens: int,
    network: Network = H100,
    *,
    ranks: Sequence[int] = RANKS,
    batches: int | None = None,
    overlap: bool = True,
    spread: float = 0.0,
) -> list[dict[str, float]]:
    """Step time, tokens/s of each rank and efficiency over the number of ranks.

    A micro-batch has `tokens`. The work of a rank stays as it is (weak scaling); with `batches`,
    that many micro-batches are shared out among the ranks (strong scaling), which must go evenly.
    """
    require_number("tokens", tokens, above=0)
    rows = []
    for n in ranks:
        each = work if batches is None else share(work, batches, n)
        ratio = efficiency(each, n, network, overlap=overlap, spread=spread)
        time = each.compute / ratio
        speed = tokens * each.batches / time
        rows.append({"ranks": n, "seconds": time, "speed": speed, "efficiency": ratio})
    return rows


def share(work: Work, batches: int, ranks: int) -> Work:
    """The work of one of `ranks` ranks that share `batches` micro-batches evenly."""
    text = f"{batches} micro-batches cannot be shared evenly by {ranks} ranks"
    require(batches >= ranks and batches % ranks == 0, text)
    return replace(work, batches=batches // ranks)


def _require(ranks: int, spread: float) -> None:
    require_whole("ranks", ranks)
    require(0 <= spread <= 2, f"spread is {spread!r}; it must lie between 0 and 2")

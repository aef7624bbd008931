"""A measured number without its uncertainty is half a number: here are the other halves.

A mean of many values gets Student's t interval; a mean over text, whose neighbouring tokens are
alike, gets it over blocks of tokens; times, which have wild outliers, get a median between two
order statistics. Each has been simulated: of 100 such intervals about 95 hold the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from companion.checks import require, require_whole


@dataclass(frozen=True)
class Interval:
    """An estimate between two bounds that hold the truth in a share `level` of all measurements.

    An estimate of nan, the value of `Interval.unknown()`, says "not measured": its bounds are
    infinite, so that it holds every number and excludes none.
    """

    estimate: float
    low: float
    high: float
    level: float = 0.95

    def __post_init__(self) -> None:
        require_level(self.level)
        bounds = f"low {self.low} and high {self.high} do not enclose {self.estimate}"
        require(not self.known or self.low <= self.estimate <= self.high, bounds)

    @classmethod
    def unknown(cls, level: float = 0.95) -> Interval:
        """What a measurement gives that could not be made."""
        return cls(math.nan, -math.inf, math.inf, level)

    @property
    def known(self) -> bool:
        return not math.isnan(self.estimate)

    def contains(self, x: float) -> bool:
        return self.low <= x <= self.high

    def excludes(self, x: float) -> bool:
        return not self.contains(x)

    def map(self, function: Callable[[float], float]) -> Interval:
        """The interval of `function` of the number; the function must only rise or only fall.

        Seconds become tokens a second by `interval.map(lambda s: tokens / s)`.
        """
        if not self.known:
            return self
        low, high = sorted((function(self.low), function(self.high)))
        return Interval(function(self.estimate), low, high, self.level)

    def __str__(self) -> str:
        """Such as "1.42 (1.38 to 1.47)", with as many digits as the width warrants."""
        if not self.known:
            return "not measured"
        places = decimals(self.high - self.low, self.estimate)
        estimate, low, high = (f"{x:,.{places}f}" for x in (self.estimate, self.low, self.high))
        return f"{estimate} ({low} to {high})"

    def _repr_html_(self) -> str:
        return f"<span title='{self.level:.0%} interval'>{self}</span>"


def decimals(width: float, estimate: float) -> int:
    """Decimal places that show an interval of this width in at least five steps, twelve at most."""
    scale = width / 5 if 0 < width < math.inf else abs(estimate) / 100
    return min(12, max(0, -math.floor(math.log10(scale)))) if scale > 0 else 0


def require_level(level: float) -> None:
    require(0 < level < 1, f"level is {level!r}; it must lie between 0 and 1")


def as_values(name: str, values: Sequence[float] | Tensor, least: int) -> Tensor:
    """The values as an FP64 vector; ValueError where they are too few or one is not finite."""
    vector = torch.as_tensor(values, dtype=torch.float64).detach().cpu().flatten()
    require(len(vector) >= least, f"{name} holds {len(vector)} values; at least {least} are needed")
    require(bool(vector.isfinite().all()), f"{name} holds a value that is not finite")
    return vector


@lru_cache(maxsize=1024)
def t_quantile(probability: float, freedom: int) -> float:
    """Student's t: the value that a share `probability` of the distribution lies below.

    With t = sqrt(freedom) tan(angle) the density is proportional to cos(angle)^(freedom - 1).
    Simpson's rule integrates it from 0, and Newton's steps find the angle; they start at 0 on a
    curve that bends down, so each falls short of the goal and none overshoots.
    """
    require(0 < probability < 1, f"probability is {probability!r}; it must lie between 0 and 1")
    require_whole("freedom", freedom)
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    goal, angle = (probability - 0.5) / math.exp(log_scale), 0.0
    for _ in range(100):
        step = (goal - _cosine_area(angle, freedom - 1)) / math.cos(angle) ** (freedom - 1)
        angle += step
        if abs(step) < 1e-13:
            break
    return math.sqrt(freedom) * math.tan(angle)


def _cosine_area(angle: float, power: int, panels: int = 200) -> float:
    """The integral of cos(x)^power from 0 to `angle`, by Simpson's rule."""
    width = angle / panels
    weights = (1 if k in (0, panels) else 4 if k % 2 else 2 for k in range(panels + 1))
    return width / 3 * sum(w * math.cos(k * width) ** power for k, w in enumerate(weights))


def mean_interval(values: Sequence[float] | Tensor, level: float = 0.95) -> Interval:
    """The mean of independent values (at least 2) with Student's t interval."""
    require_level(level)
    vector = as_values("values", values, least=2)
    return _around(vector.mean().item(), vector, level)


def _around(mean: float, parts: Tensor, level: float) -> Interval:
    """`mean` give or take what the spread of independent `parts` says of their average."""
    error = parts.std().item() / math.sqrt(len(parts))
    reach = t_quantile((1 + level) / 2, len(parts) - 1) * error
    return Interval(mean, mean - reach, mean + reach, level)


def paired_difference(
    a: Sequence[float] | Tensor,
    b: Sequence[float] | Tensor,
    level: float = 0.95,
    blocks: int | None = None,
) -> Interval:
    """The mean of a - b over pairs (two models' losses on the same tokens), with an interval.

    Neighbouring tokens are not independent, and an interval that takes them for such is too
    narrow. With `blocks`, the pairs are cut into that many runs and t is taken over their averages:
    16 to 64 blocks, each longer than the dependence reaches.
    """
    require_level(level)
    first, second = as_values("a", a, least=2), as_values("b", b, least=2)
    require(len(first) == len(second), f"a holds {len(first)} values and b {len(second)}")
    difference = first - second
    if blocks is None:
        return _around(difference.mean().item(), difference, level)
    require_whole("blocks", blocks, least=2)
    require(blocks <= len(first), f"{blocks} blocks are more than the {len(first)} pairs")
    averages = torch.stack([part.mean() for part in difference.tensor_split(blocks)])
    return _around(difference.mean().item(), averages, level)


def order_rank(count: int, level: float = 0.95) -> int:
    """Between the k-th smallest and k-th largest of `count` values lies the median: the best k.

    Each value is below the median with chance 1/2, so the interval misses with the chance of fewer
    than k heads, or fewer than k tails, in `count` throws, whatever the distribution.
    ValueError if even the whole range is too narrow: 95 % takes 6 values.
    """
    require_level(level)
    require_whole("count", count)
    rank, missed = 0, 2.0 * 0.5**count
    while missed <= 1 - level + 1e-12:
        rank += 1
        missed += 2 * math.comb(count, rank) * 0.5**count
    least = math.ceil(1 - math.log2(1 - level))
    require(rank > 0, f"{count} values give no {level:.0%} interval; it takes at least {least}")
    return rank


def median_interval(values: Sequence[float] | Tensor, level: float = 0.95) -> Interval:
    """The median with its distribution-free interval between two of the sorted values."""
    vector = as_values("values", values, least=1)
    rank = order_rank(len(vector), level)
    ordered = vector.sort().values
    estimate = ordered.quantile(0.5).item()
    return Interval(estimate, ordered[rank - 1].item(), ordered[-rank].item(), level)


def median_ratio(
    a: Sequence[float] | Tensor, b: Sequence[float] | Tensor, level: float = 0.95
) -> Interval:
    """The median of a / b over rounds that timed both, with its distribution-free interval.

    What slows a whole round (another program, a lower clock) cancels in its ratio.
    """
    first, second = as_values("a", a, least=1), as_values("b", b, least=1)
    require(len(first) == len(second), f"a holds {len(first)} values and b {len(second)}")
    require(bool((first > 0).all() and (second > 0).all()), "times must all be above 0")
    return median_interval(first / second, level)

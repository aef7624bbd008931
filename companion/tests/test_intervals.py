"""Intervals against tables of Student's t, a slow count of coin throws, and simulated coverage."""

import math
from itertools import product

import pytest
import torch

from companion.intervals import (
    Interval,
    mean_interval,
    median_interval,
    median_ratio,
    order_rank,
    paired_difference,
    t_quantile,
)

# probability, degrees of freedom, quantile: printed tables of Student's t
TABLE = [
    (0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 4, 2.77645), (0.975, 9, 2.26216),
    (0.975, 30, 2.04227), (0.975, 120, 1.97993), (0.95, 3, 2.35336), (0.995, 1, 63.6567),
    (0.995, 9, 3.24984), (0.9995, 5, 6.86883), (0.9, 10, 1.37218), (0.025, 9, -2.26216),
]  # fmt: skip


@pytest.mark.parametrize("probability, freedom, expected", TABLE)
def test_t_quantile_agrees_with_the_printed_table(probability, freedom, expected):
    assert t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-5)


def test_t_quantile_becomes_normal_and_is_zero_in_the_middle():
    assert t_quantile(0.975, 10_000_000) == pytest.approx(1.959964, rel=1e-6)
    assert t_quantile(0.5, 7) == pytest.approx(0, abs=1e-12)


def misses(interval_of, draws, truth):
    """Share of simulated measurements whose interval does not hold the truth."""
    return sum(interval_of(draw).excludes(truth) for draw in draws) / len(draws)


@pytest.mark.parametrize("count", [2, 5, 30])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_mean_interval_covers_at_its_level(count, level):
    draws = torch.randn(1500, count, generator=torch.Generator().manual_seed(count)) * 3 + 7
    assert misses(lambda d: mean_interval(d, level), draws, 7) == pytest.approx(1 - level, abs=0.03)


@pytest.mark.parametrize("count", [6, 12, 20, 25])
def test_median_interval_covers_even_where_outliers_are_wild(count):
    generator = torch.Generator().manual_seed(count)
    draws = torch.randn(1500, count, generator=generator).exp() ** 3  # a median of 1, a long tail
    tosses = list(range(order_rank(count)))
    nominal = 2 * sum(math.comb(count, k) for k in tosses) / 2**count
    missed = misses(median_interval, draws, 1)
    assert missed == pytest.approx(nominal, abs=0.017)
    assert nominal <= 0.05


def test_blocks_repair_the_coverage_that_dependence_breaks():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(600, 2048, generator=generator, dtype=torch.float64)
    for i in range(1, noise.shape[1]):  # each value keeps 0.8 of the one before
        noise[:, i] += 0.8 * noise[:, i - 1]
    zero = torch.zeros(2048)
    naive = misses(lambda d: paired_difference(d, zero), noise, 0)
    blocked = misses(lambda d: paired_difference(d, zero, blocks=32), noise, 0)
    assert naive > 0.3
    assert blocked == pytest.approx(0.05, abs=0.025)


def test_paired_difference_sees_what_unpaired_spread_hides():
    generator = torch.Generator().manual_seed(0)
    shared = 10 * torch.randn(50, generator=generator)
    a = shared + 0.5 + 0.1 * torch.randn(50, generator=generator)
    difference = paired_difference(a, shared)
    assert difference.contains(0.5) and difference.excludes(0)
    assert mean_interval(a).contains(mean_interval(shared).estimate)


def test_blocks_keep_the_plain_mean_when_they_do_not_divide():
    a, b = torch.arange(10.0) ** 2, torch.zeros(10)
    assert paired_difference(a, b, blocks=3).estimate == pytest.approx(28.5)


@pytest.mark.parametrize("count", [6, 7, 9, 12])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_order_rank_agrees_with_counting_every_throw(count, level):
    """Throw all coins: the interval misses when fewer than `rank` fall on one side."""
    sides = [sum(throw) for throw in product((0, 1), repeat=count)]

    def missed(rank):
        return sum(s < rank or count - s < rank for s in sides) / len(sides)

    rank = order_rank(count, level)
    assert missed(rank) <= 1 - level + 1e-12 < missed(rank + 1)


def test_median_ratio_pairs_by_round():
    drift = torch.linspace(1, 50, 21)
    ratio = median_ratio(1.1 * drift, drift)
    assert (ratio.low, ratio.estimate, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    shuffled = median_ratio(1.1 * drift, drift.flip(0))
    assert shuffled.high / shuffled.low > 4


def test_median_interval_is_between_sorted_values():
    interval = median_interval([9, 1, 8, 2, 7, 3, 6, 4, 5])
    assert (interval.low, interval.estimate, interval.high) == (2, 5, 8)
    assert median_interval([4, 1, 3, 2, 6, 5]).estimate == 3.5


@pytest.mark.parametrize(
    "interval, text",
    [
        (Interval(1.4213, 1.376, 1.466), "1.42 (1.38 to 1.47)"),
        (Interval(18.04, 17.2, 19.1), "18.0 (17.2 to 19.1)"),
        (Interval(0.00312, 0.00308, 0.00317), "0.00312 (0.00308 to 0.00317)"),
        (Interval(146_123_000.0, 145e6, 147e6), "146,123,000 (145,000,000 to 147,000,000)"),
        (Interval(2.0, 2.0, 2.0), "2.00 (2.00 to 2.00)"),
        (Interval(0, 0, 0), "0 (0 to 0)"),
        (Interval.unknown(), "not measured"),
    ],
)
def test_text_has_the_digits_that_the_width_warrants(interval, text):
    assert str(interval) == text
    assert text in interval._repr_html_()


def test_contains_excludes_and_map():
    interval = Interval(2.0, 1.0, 4.0)
    assert interval.contains(1.0) and interval.contains(4.0) and interval.excludes(4.001)
    assert interval.map(lambda s: 8 / s) == Interval(4.0, 2.0, 8.0)
    assert interval.map(lambda s: 10 * s) == Interval(20.0, 10.0, 40.0)


def test_unknown_excludes_nothing():
    unknown = Interval.unknown()
    assert not unknown.known and unknown.contains(1) and not unknown.excludes(1)
    assert not unknown.map(lambda s: 1 / s).known


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mean_interval([1.0]), "values holds 1 values; at least 2"),
        (lambda: mean_interval([1.0, math.nan]), "values holds a value that is not finite"),
        (lambda: mean_interval([1.0, 2.0], level=1.0), "level is 1.0"),
        (lambda: paired_difference([1, 2], [1, 2, 3]), "a holds 2 values and b 3"),
        (lambda: paired_difference([1, 2], [1, 2], blocks=3), "3 blocks are more than the 2"),
        (lambda: paired_difference([1, 2], [1, 2], blocks=1), "blocks is 1"),
        (lambda: median_interval([]), "values holds 0 values"),
        (lambda: median_interval([1, 2, 3, 4, 5]), "5 values give no 95% interval; .* least 6"),
        (lambda: median_ratio([1] * 6, [0] * 6), "above 0"),
        (lambda: median_ratio([1] * 6, [1] * 7), "a holds 6 values and b 7"),
        (lambda: Interval(3, 1, 2), "low 1 and high 2 do not enclose 3"),
        (lambda: Interval(1, 1, 1, level=95), "level is 95"),
        (lambda: t_quantile(0.9, 0), "freedom is 0"),
        (lambda: t_quantile(1.0, 3), "probability is 1.0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

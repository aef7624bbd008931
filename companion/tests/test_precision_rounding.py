"""Stochastic rounding takes one of two neighbours, and is right on average; wrong ones are not."""

import math

import pytest
import torch

from companion.hardware import best_device
from companion.precision.formats import FORMATS
from companion.precision.rounding import rounded, stochastically_rounded
from companion.tests.test_precision_formats import all_numbers, edges, random_patterns, same

SMALL = [name for name in FORMATS if name != "FP32"]
DRAWS = 8_000


def generator(seed=0):
    return torch.Generator(best_device()).manual_seed(seed)


def neighbours(x, name):
    """The numbers of a format at or below and at or above |x|, which it must not exceed, FP64."""
    numbers = all_numbers(name)
    size = x.double().abs()
    above = torch.searchsorted(numbers, size)
    exact = numbers[above] == size
    return torch.where(exact, size, numbers[(above - 1).clamp(min=0)]), numbers[above]


def sample(name, count=150):
    """Numbers across the whole range, denormals of the format among them, none beyond it."""
    found = FORMATS[name]
    low, high = math.log2(max(found.smallest_denormal, 2.0**-120)) - 1, math.log2(found.largest)
    draw = torch.Generator().manual_seed(1)
    powers = low + (high - low) * torch.rand(count, generator=draw, dtype=torch.float64)
    sign = torch.randint(2, (count,), generator=draw) * 2 - 1
    return (sign * torch.exp2(powers)).float()


def bias_in_deviations(rounding, name):
    """How far the mean of many draws is from x, in standard deviations that the formula gives.

    A draw is `below` or `below` + s, up with chance p: variance s^2 p (1 - p).
    """
    x = sample(name)
    below, above = neighbours(x, name)
    chance = (x.double().abs() - below) / (above - below).clamp(min=1e-300)
    deviation = (above - below) * (chance * (1 - chance) / DRAWS).sqrt()
    many = x.to(best_device()).expand(DRAWS, -1).contiguous()
    mean = rounding(many, name, generator()).double().mean(0).cpu()
    likely = chance * (1 - chance) * DRAWS > 10  # seen often enough for a normal law
    assert likely.sum() > 75
    return ((mean - x.double()) / deviation)[likely]


@pytest.mark.parametrize("name", SMALL)
def test_the_mean_of_many_draws_is_the_number(name):
    found = bias_in_deviations(stochastically_rounded, name)
    assert found.abs().max() < 4.5  # of 150 normal numbers: a chance of 0.1 % for larger
    assert abs(found.mean()) < 4 / math.sqrt(len(found)) and 0.8 < found.std() < 1.2


WRONG = {
    "nearest": lambda x, name, draw: rounded(x, name),
    "too much noise": lambda x, name, draw: rounded(
        x + (torch.rand(x.shape, generator=draw, device=x.device) - 0.5) * 1.5 * step(x, name), name
    ),
    "up as often as down": lambda x, name, draw: rounded(
        x + (torch.rand(x.shape, generator=draw, device=x.device) - 0.5).sign() * step(x, name) / 2,
        name,
    ),
}  # fmt: skip


def step(x, name):
    return FORMATS[name].spacing(x).float()


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_roundings_are_found_out(wrong):
    found = bias_in_deviations(WRONG[wrong], "FP16")
    assert not (found.abs().max() < 4.5 and 0.8 < found.std() < 1.2)


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_of_the_format_never_move(name):
    near = rounded(torch.cat([edges("E5M2"), edges("E2M1"), random_patterns(10_000)]), name)
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        assert same(stochastically_rounded(near, name, draw), near)


@pytest.mark.parametrize("draw", [0, 2**24 - 1])
def test_not_even_the_extreme_draws_move_a_number_of_the_format(monkeypatch, draw):
    def constant(high, shape, *, generator, device, dtype):
        assert draw < high
        return torch.full(shape, draw, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "randint", constant)
    for name in FORMATS:
        near = rounded(torch.cat([edges("E5M2"), edges("E2M1")]), name)
        assert same(stochastically_rounded(near, name), near)


@pytest.mark.parametrize("name", SMALL)
def test_only_the_two_neighbours_are_taken(name):
    x = torch.cat([edges(name), random_patterns(50_000)])
    x = x[x.abs() <= FORMATS[name].largest]
    found = stochastically_rounded(x.to(best_device()), name, generator()).cpu()
    below, above = neighbours(x, name)
    size = found.double().abs()
    assert ((size == below) | (size == above)).all()
    assert torch.equal(found.signbit(), x.signbit())
    inner = (below < x.double().abs()) & (x.double().abs() < above)
    assert (size == below)[inner].any() and (size == above)[inner].any()


@pytest.mark.parametrize("name", SMALL)
def test_what_lies_beyond_the_largest_is_rounded_to_the_nearest(name):
    x = torch.cat([edges(name), random_patterns(10_000), torch.tensor([math.nan, math.inf])])
    x = x[~(x.abs() <= FORMATS[name].largest)]
    assert same(stochastically_rounded(x, name), rounded(x, name))


def test_the_chance_is_exact_where_bits_are_dropped():
    # BF16 drops 16 bits; 1/4 of the way up
    x = torch.full((400_000,), 1 + 2**-9).to(best_device())
    up = (stochastically_rounded(x, "BF16", generator()) > 1).float().mean().item()
    assert up == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 400_000))


def test_a_sum_that_stops_with_the_nearest_goes_on_by_chance():
    one, total = torch.full((64,), 0.01, device=best_device()), torch.zeros(64).to(best_device())
    draw = generator()
    for _ in range(1000):
        total = stochastically_rounded(total + rounded(one, "BF16"), "BF16", draw)
    mean = total.mean().item()
    truth = 1000 * rounded(one, "BF16")[0].item()
    assert abs(mean - truth) < 4 * total.std().item() / 8
    near = torch.zeros(())
    for _ in range(1000):
        near = rounded(near + rounded(one[0].cpu(), "BF16"), "BF16")
    assert near == 4.0


def test_draws_repeat_with_their_seed_and_differ_without():
    x = torch.randn(1000, device=best_device())
    first, second, other = (
        stochastically_rounded(x, "E4M3", generator(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert not stochastically_rounded(x.clone().requires_grad_(), "E4M3").requires_grad


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        stochastically_rounded(torch.ones(2).double(), "BF16")
    with pytest.raises(ValueError, match="format is 'half'"):
        stochastically_rounded(torch.ones(2), "half")

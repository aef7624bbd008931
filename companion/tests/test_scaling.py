"""Closed forms of a training step against the simulator, and a published curve against both."""

import math
import random

import pytest
import torch

from companion.parallel import playbook
from companion.parallel.hierarchy import all_reduce_seconds, among, hierarchical_all_reduce, parts
from companion.parallel.network import H100, Network
from companion.parallel.rings import ring_all_reduce
from companion.parallel.scaling import (
    RANKS,
    Work,
    curve,
    efficiency,
    even,
    share,
    slowest,
    step_seconds,
    stragglers,
    training_step,
)
from companion.parallel.simulator import simulate
from companion.parallel.traffic import Link

FREE = Network(Link(0.0, math.inf))
SLOW = Network(Link(1e-4, 1e10), between=Link(1e-3, 1e9), node=4)
WORK = even(0.03, 0.06, 2e9, 6, update=0.01)


def uneven(seed, buckets=5):
    draw = random.Random(seed)
    times, sizes = ([draw.random() for _ in range(buckets)] for _ in range(2))
    return Work(draw.random(), tuple(times), tuple(1e9 * size for size in sizes), draw.random(), 3)


@pytest.mark.parametrize("ranks, node", [(4, 4), (8, 4), (12, 4), (16, 2), (6, 8)])
def test_the_sum_over_nodes_is_right_and_takes_what_its_closed_form_says(ranks, node):
    network = Network(Link(1e-5, 1e9), between=Link(1e-4, 1e8), node=node)
    base = torch.arange(384, dtype=torch.float64)
    timeline = simulate(
        lambda r, n: hierarchical_all_reduce(r, n, base * (r + 1), node), ranks, network=network
    )
    assert all(torch.equal(t, base * sum(range(ranks + 1))) for t in timeline.results)
    expected = all_reduce_seconds(base.nbytes, ranks, network)
    assert timeline.seconds == pytest.approx(expected, rel=1e-12)
    plan = parts(base.nbytes, ranks - 1, ranks, network)
    assert timeline.sent == pytest.approx([sum(part.sent for part in plan)] * ranks)
    flat = simulate(lambda r, n: ring_all_reduce(r, n, base), ranks, network=network)
    assert timeline.seconds <= flat.seconds * (1 + 1e-12)


def test_the_closed_form_of_the_sum_over_nodes_by_hand():
    # 8 bytes, 2 nodes of 4: 3 rounds of 2 bytes inside, twice, and 2 rounds of 1 byte between
    network = Network(Link(1.0, 2.0), between=Link(10.0, 0.5), node=4)
    assert all_reduce_seconds(8, 8, network) == 2 * 3 * (1 + 1) + 2 * (10 + 2)
    assert all_reduce_seconds(8, 8, Network(Link(1.0, 2.0))) == 2 * 7 * (1 + 0.5)


def test_a_program_runs_among_any_ranks():
    def program(rank, ranks):
        if rank in (5, 1, 3):
            place = (5, 1, 3).index(rank)
            return (yield from among((5, 1, 3), ring_all_reduce(place, 3, torch.ones(3) * rank)))

    results = simulate(program, 6).results
    assert results[0] is None and all(
        torch.equal(results[r], torch.full((3,), 9.0)) for r in (1, 5)
    )


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("network", [H100, SLOW, Network(Link(1e-4, 1e9)), FREE])
@pytest.mark.parametrize("work", [WORK, even(0.5, 1.0, 1e8, 1), uneven(1), uneven(2)])
def test_the_closed_form_of_a_step_is_what_the_simulator_finds(work, network, overlap):
    for ranks in (1, 8, 32):
        program = training_step(work, network, overlap=overlap)
        timeline = simulate(program, ranks, network=network)
        expected = step_seconds(work, ranks, network, overlap=overlap)
        assert timeline.seconds == pytest.approx(expected, rel=1e-12)
        sent = sum(part.sent for size in work.buckets for part in parts(size, 0, ranks, network))
        assert timeline.sent == pytest.approx([sent] * ranks)
        slow = stragglers(ranks, 0.2, seed=ranks)
        timeline = simulate(program, ranks, network=network, slow=slow)
        expected = step_seconds(work, ranks, network, overlap=overlap, factor=max(slow))
        assert timeline.seconds == pytest.approx(expected, rel=1e-9)


def test_a_thousand_ranks_agree_too():
    work, slow = even(0.03, 0.06, 5e9, 2), stragglers(1024, 0.1)
    timeline = simulate(training_step(work), 1024, slow=slow)
    expected = step_seconds(work, 1024, factor=max(slow))
    assert timeline.seconds == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("size", [1e8, 1e9, 1e10, 1e11])
def test_equal_buckets_follow_the_short_formula(size):
    work = even(0.03, 0.06, size, 6, update=0.01)
    cost = all_reduce_seconds(size / 6, 64, H100)
    late = 0.03 + 0.06 + 6 * cost + 0.01
    assert step_seconds(work, 64, overlap=False) == pytest.approx(late, rel=1e-12)
    short = 0.03 + max(0.06 + cost, 0.01 + 6 * cost) + 0.01
    assert step_seconds(work, 64) == pytest.approx(short, rel=1e-12)


def test_the_slowest_of_many_is_slower_as_expected():
    spread = 0.3
    mean = math.exp(spread**2 / 2)
    assert slowest(1, spread) == pytest.approx(mean, rel=1e-9)
    of_two = 2 * mean * (1 + math.erf(spread / 2)) / 2  # known for two log-normal numbers
    assert slowest(2, spread) == pytest.approx(of_two, rel=1e-9)
    draws = [max(stragglers(64, spread, seed)) for seed in range(1000)]
    error = torch.tensor(draws).std().item() / math.sqrt(len(draws))
    assert abs(sum(draws) / len(draws) - slowest(64, spread)) < 4 * error
    assert stragglers(8, spread, 1) == stragglers(8, spread, 1) != stragglers(8, spread, 2)
    found = [slowest(ranks, spread) for ranks in RANKS]
    assert found == sorted(found)


def test_curves_of_weak_and_of_strong_scaling():
    ideal = curve(WORK, 4096, FREE)
    assert [row["ranks"] for row in ideal] == list(RANKS)
    assert all(row["efficiency"] == pytest.approx(1) for row in ideal)
    assert ideal[0]["speed"] == pytest.approx(4096 / WORK.compute)
    weak = [row["efficiency"] for row in curve(WORK, 4096, H100, spread=0.05)]
    strong = [row["efficiency"] for row in curve(WORK, 4096, H100, spread=0.05, batches=1024)]
    assert weak == sorted(weak, reverse=True) and strong == sorted(strong, reverse=True)
    assert strong[-1] == weak[-1] and strong[0] > weak[0]
    assert efficiency(WORK, 64, overlap=False) < efficiency(WORK, 64)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: Work(1.0, (1.0,), (1.0, 2.0)), "1 parts and there are 2 buckets"),
        (lambda: Work(1.0, (), ()), "0 parts"),
        (lambda: Work(-1.0, (1.0,), (1.0,)), "at least 0"),
        (lambda: even(1.0, 1.0, math.nan, 2), "must be finite"),
        (lambda: even(1.0, 1.0, 1.0, 0), "buckets is 0"),
        (lambda: Work(1.0, (1.0,), (1.0,), batches=0), "batches is 0"),
        (lambda: step_seconds(WORK, 12), "12 ranks do not fill nodes of 8"),
        (lambda: step_seconds(WORK, 0), "ranks is 0"),
        (lambda: share(WORK, 256, 512), "256 micro-batches cannot be shared evenly by 512"),
        (lambda: share(WORK, 12, 8), "12 micro-batches"),
        (lambda: slowest(0, 0.1), "ranks is 0"),
        (lambda: stragglers(8, -0.1), "spread is -0.1"),
        (lambda: step_seconds(WORK, 8, factor=0.0), "factor is 0"),
        (lambda: curve(WORK, 0), "tokens is 0"),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_the_published_numbers_fit_together():
    assert all(run.ranks * run.sequences * run.batches == 256 for run in playbook.RUNS)
    fastest = {n: max(r.speed for r in playbook.RUNS if r.ranks == n) for n in playbook.CHART}
    assert fastest == playbook.CHART
    assert abs(playbook.PARAMETERS / 1.34e9 - 1) < 2e-3
    # published: 39.18 % of 989.5 TFLOP/s
    assert abs(playbook.FLOPS * playbook.CHART[8] / 989.5e12 / 0.3918 - 1) < 2e-3
    assert playbook.work(0.1, 1).compute == pytest.approx(0.12, rel=2e-2)
    assert sum(playbook.work(0.1, 1).buckets) == 4 * playbook.PARAMETERS


@pytest.fixture(scope="module")
def fitted():
    return playbook.fit()


def test_the_fit_finds_what_made_the_speeds():
    truth = playbook.between(2e10), 0.03
    made = playbook.speeds(playbook.FITTED, *truth)
    runs = [run._replace(speed=s) for run, s in zip(playbook.FITTED, made, strict=True)]
    found = playbook.fit(runs)
    assert found == pytest.approx((2e10, 0.03), rel=1e-5)


def test_what_the_fit_on_64_gpus_says_about_256(fitted):
    rows = {(row["ranks"], row["sequences"]): row for row in playbook.table(fitted)}

    def off(column, *key):
        return rows[key][column] / rows[key]["speed"] - 1

    assert all(abs(off("fitted", n, 1)) < 0.01 for n in (8, 16, 32, 64))
    assert off("fitted", 128, 1) == pytest.approx(0.02, abs=0.01)
    assert off("fitted", 128, 2) == pytest.approx(0.15, abs=0.01)
    assert off("fitted", 256, 1) == pytest.approx(0.07, abs=0.01)
    assert off("measured", 256, 1) == pytest.approx(0.13, abs=0.01)
    assert off("sheet", 256, 1) == pytest.approx(0.62, abs=0.01)

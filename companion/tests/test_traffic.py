"""Closed forms of the collectives, held against the programs run over a virtual clock."""

from __future__ import annotations

import math
import random
from functools import partial

import pytest
import torch

from companion.parallel import rings, trees
from companion.parallel.network import Network
from companion.parallel.simulator import simulate
from companion.parallel.traffic import (
    KINDS,
    WAYS,
    Link,
    fit_link,
    rounds,
    seconds,
    sent_bytes,
)

LINK = Link(latency=3e-6, bandwidth=2e9)
RANKS = (1, 2, 3, 4, 5, 7, 8, 11, 16)
PROGRAMS = {
    ("broadcast", "ring"): rings.ring_broadcast,
    ("broadcast", "tree"): trees.tree_broadcast,
    ("all_reduce", "ring"): rings.ring_all_reduce,
    ("all_reduce", "tree"): trees.tree_all_reduce,
    ("all_gather", "ring"): rings.ring_all_gather,
    ("reduce_scatter", "ring"): rings.ring_reduce_scatter,
}
CASES = list(PROGRAMS)


def run(kind, way, numbers, ranks):
    """The collective of so many FP64 numbers over the virtual clock."""
    whole = torch.zeros(numbers, dtype=torch.float64)

    def rank(r, ranks):
        if kind == "all_gather":
            return rings.ring_all_gather(r, ranks, whole.tensor_split(ranks)[r], like=whole)
        return PROGRAMS[kind, way](r, ranks, whole)

    return simulate(rank, ranks, network=Network(LINK))


def test_a_hand_counted_example():
    assert sent_bytes("all_reduce", 1200, 4) == 1800  # 3 parts of 300 bytes, twice
    assert sent_bytes("reduce_scatter", 1200, 4) == sent_bytes("all_gather", 1200, 4) == 900
    assert sent_bytes("broadcast", 1200, 4, "tree") == 900  # three copies, four ranks
    assert [rounds(kind, 4) for kind in KINDS] == [6, 6, 3, 3]
    assert [rounds("broadcast", n, "tree") for n in (1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]
    link = Link(latency=1.0, bandwidth=100.0)
    assert seconds("all_reduce", 1200, 4, link) == 6 * (1 + 3)
    assert seconds("all_reduce", 1200, 4, link, "tree") == 4 * (1 + 12)


@pytest.mark.parametrize("kind, way", CASES)
def test_bytes_sent_are_exact_for_any_length(kind, way):
    for ranks in RANKS:
        for numbers in (0, 1, 7, 1000):
            sent = run(kind, way, numbers, ranks).sent
            assert sum(sent) / ranks == sent_bytes(kind, 8 * numbers, ranks, way)


@pytest.mark.parametrize("kind, way", CASES)
def test_seconds_are_those_of_the_virtual_clock(kind, way):
    for ranks in RANKS:
        size = 8 * 10 * ranks
        predicted = seconds(kind, size, ranks, LINK, way)
        assert math.isclose(run(kind, way, 10 * ranks, ranks).seconds, predicted, rel_tol=1e-12)


def test_a_chain_of_more_parts_has_more_rounds_of_shorter_messages():
    whole = torch.zeros(60, dtype=torch.float64)
    for parts in (1, 2, 5, 30):

        def rank(r, ranks, parts=parts):
            return rings.ring_broadcast(r, ranks, whole, parts=parts)

        expected = (4 + parts - 2) * LINK.seconds(480 / parts)
        assert math.isclose(simulate(rank, 4, network=Network(LINK)).seconds, expected)


def test_on_a_ring_all_ranks_send_the_same_on_a_tree_few_send_most():
    assert set(run("all_reduce", "ring", 48, 8).sent) == {2 * 7 / 8 * 48 * 8}
    sent = run("all_reduce", "tree", 48, 8).sent
    assert max(sent) == sent[0] == 3 * 48 * 8 and min(sent) == 48 * 8


def test_a_tree_is_quicker_for_small_tensors_and_a_ring_for_large_ones():
    ring, tree = (partial(seconds, "all_reduce", ranks=16, link=LINK, way=w) for w in WAYS)
    assert tree(size=1e3) < ring(size=1e3) and ring(size=1e7) < tree(size=1e7)


@pytest.mark.parametrize("kind, way", CASES)
def test_fit_finds_the_link_that_made_the_times(kind, way):
    sizes = [2**k for k in range(12, 24)]
    times = [seconds(kind, size, 4, LINK, way) for size in sizes]
    found = fit_link(kind, sizes, times, 4, way)
    assert math.isclose(found.latency, LINK.latency, rel_tol=1e-9)
    assert math.isclose(found.bandwidth, LINK.bandwidth, rel_tol=1e-9)


def test_fit_minimises_the_relative_error():
    draw = random.Random(1)
    sizes = [2**k for k in range(12, 24)]
    times = [seconds("all_reduce", size, 2, LINK) * draw.uniform(0.7, 1.4) for size in sizes]

    def loss(latency, bandwidth):
        link = Link(latency, bandwidth)
        pairs = zip(sizes, times, strict=True)
        return sum((1 - seconds("all_reduce", size, 2, link) / time) ** 2 for size, time in pairs)

    found = fit_link("all_reduce", sizes, times, 2)
    best = loss(found.latency, found.bandwidth)
    for a in (0.99, 1.0, 1.01):
        for b in (0.99, 1.0, 1.01):
            assert loss(found.latency * a, found.bandwidth * b) >= best


def test_fitted_latency_and_cost_of_a_byte_are_not_negative():
    falling = fit_link("all_reduce", [1000, 2000, 4000], [4.0, 2.0, 1.0], 2)
    assert falling.bandwidth == math.inf and falling.latency > 0
    steep = fit_link("all_reduce", [1000, 2000, 4000], [1.0, 4.0, 16.0], 2)
    assert steep.latency == 0 and 0 < steep.bandwidth < math.inf


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: sent_bytes("gather", 8, 2), "kind is 'gather'; known are: broadcast"),
        (lambda: sent_bytes("broadcast", 8, 2, "star"), "way is 'star'; known are: ring, tree"),
        (lambda: sent_bytes("all_gather", 8, 2, "tree"), "for a tree is 'all_gather'; known are"),
        (lambda: sent_bytes("broadcast", -8, 2), "size is -8; it must be a finite number"),
        (lambda: sent_bytes("broadcast", math.nan, 2), "size is nan"),
        (lambda: sent_bytes("broadcast", 8, 0), "ranks is 0; it must be a whole number"),
        (lambda: rounds("broadcast", 2.0), "ranks is 2.0; it must be a whole number"),
        (lambda: rounds("scatter", 2), "kind is 'scatter'"),
        (lambda: seconds("broadcast", 8, -1, LINK), "ranks is -1"),
        (lambda: seconds("broadcast", -1, 2, LINK), "size is -1"),
        (lambda: Link(-1e-6, 1e9), "latency is -1e-06; it must be finite and at least 0"),
        (lambda: Link(math.inf, 1e9), "latency is inf"),
        (lambda: Link(1e-6, 0.0), "bandwidth is 0.0; it must be above 0 bytes a second"),
        (lambda: Link(1e-6, math.nan), "bandwidth is nan"),
        (lambda: LINK.seconds(-1), "size is -1"),
        (lambda: fit_link("gather", [1, 2], [1, 2], 2), "kind is 'gather'"),
        (lambda: fit_link("broadcast", [1, 2], [1, 2], 1), "ranks is 1; .* at least 2"),
        (lambda: fit_link("broadcast", [8, 8], [1, 2], 2), "1 different sizes and 2 times"),
        (lambda: fit_link("broadcast", [1, 2, 3], [1, 2], 2), "3 different sizes and 2 times"),
        (lambda: fit_link("broadcast", [1, 2], [1, 0], 2), "seconds is 0; it must be a finite"),
        (lambda: fit_link("broadcast", [-1, 2], [1, 2], 2), "size is -1"),
    ],
)
def test_bad_input_is_refused_and_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()

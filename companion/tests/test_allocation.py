"""Bits go where they help most; the choice fits the budget and is near the best of all."""

import random
from itertools import product
from statistics import median

import pytest
import torch

from companion.data import Passage
from companion.memory import stored_bytes
from companion.quantization import quantize
from companion.quantization.allocation import allocate, sensitivities
from companion.tests.test_replacing import small, tokens


def a_text():
    line = tokens().flatten()
    return Passage("x" * len(line), line, torch.ones_like(line), 20, 0)


def test_sensitivities_are_those_of_one_layer_alone():
    model = small()
    harms, sizes = sensitivities(model, a_text(), bits=(8, 2), group=16)
    assert len(harms) == 14 and harms.keys() == sizes.keys()
    for name, by_bits in harms.items():
        assert 0 <= by_bits[8] < by_bits[2], name
    name = "blocks.1.mlp.down"
    alone = quantize(model, {name: 2}, group=16, head=None)
    plain = stored_bytes(model) - model.get_submodule(name).weight.nbytes
    assert sizes[name][2] == stored_bytes(alone) - plain


def brute_force(harms, sizes, budget):
    names = list(harms)
    every = [dict(zip(names, bits, strict=True)) for bits in product((2, 3, 4, 8), repeat=5)]
    fitting = [c for c in every if sum(sizes[n][b] for n, b in c.items()) <= budget]
    return min(sum(harms[n][b] for n, b in c.items()) for c in fitting)


def test_the_choice_fits_and_is_near_the_best_of_all():
    ratios, gains = [], []
    for seed in range(30):
        draw = random.Random(seed)
        names = [f"layer {i}" for i in range(5)]
        sizes = {
            n: {b: b * w for b in (2, 3, 4, 8)}
            for n, w in ((n, draw.choice((1, 3))) for n in names)
        }
        steep = {n: 10 ** draw.uniform(-2, 2) for n in names}
        harms = {n: {b: steep[n] * draw.uniform(0.8, 1.2) * 4.0**-b for b in (2, 3, 4, 8)}
                 for n in names}  # fmt: skip
        budget = round(sum(size[4] for size in sizes.values()) * draw.uniform(0.7, 1.3))
        bits = allocate(harms, sizes, budget)
        assert sum(sizes[n][b] for n, b in bits.items()) <= budget
        best = brute_force(harms, sizes, budget)
        found = sum(harms[n][b] for n, b in bits.items())
        assert best <= found * (1 + 1e-9)
        ratios.append(found / best)
        even = max(b for b in (2, 3, 4, 8) if sum(size[b] for size in sizes.values()) <= budget)
        gains.append(sum(harms[n][even] for n in names) / found)
    assert median(ratios) < 1.1 and max(ratios) < 3
    assert median(gains) > 2  # than the same bits for all


def test_a_sensitive_layer_gets_more_bits():
    sizes = {name: {2: 2, 4: 4, 8: 8} for name in "abc"}
    harms = {name: {2: 0.1, 4: 0.01, 8: 0.0} for name in "abc"}
    harms["b"] = {2: 5.0, 4: 1.0, 8: 0.0}
    assert allocate(harms, sizes, 12) == {"a": 2, "b": 8, "c": 2}
    assert allocate(harms, sizes, 100) == dict.fromkeys("abc", 8)


def test_an_impossible_budget_is_refused():
    sizes, harms = {"a": {2: 100}}, {"a": {2: 1.0}}
    with pytest.raises(ValueError, match="the fewest bits take 100 bytes, more than 99"):
        allocate(harms, sizes, 99)
    for other in ({}, {"a": {2: 100, 4: 200}}):
        with pytest.raises(ValueError, match="name other layers or other bits"):
            allocate(harms, other, 99)
    with pytest.raises(ValueError, match="a harm is not finite"):
        allocate({"a": {2: float("nan")}}, sizes, 100)

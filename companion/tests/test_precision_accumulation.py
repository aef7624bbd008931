"""Sums with few digits against hand-computed ones, torch's casts, FP64 and the bound."""

import math

import pytest
import torch

from companion.losses import next_token_loss
from companion.precision.accumulation import (
    ORDERS,
    accumulated_gradient,
    additions,
    dot,
    error_bound,
    half_spacing,
    relative_error,
    running,
    stage_errors,
    summed,
)
from companion.precision.rounding import rounded
from companion.tests.equalities import refusals, some_batches
from companion.tests.test_model import small


def some_terms(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("format", "stop"), [("BF16", 256), ("FP16", 2048), ("E4M3", 16), ("E5M2", 8)]
)
def test_a_sum_of_ones_stands_still_at_the_known_place(format, stop):
    terms = torch.cat([torch.tensor([stop - 8.0]), torch.ones(16)])
    sums = running(terms, format)
    assert sums[:9].tolist() == list(range(stop - 8, stop + 1))
    assert (sums[9:] == stop).all() and summed(terms, format) == stop
    assert summed(torch.ones(2 * stop), format, order="pairwise") == 2 * stop
    assert summed(terms, format, order="kahan") == stop + 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_the_loop_in_torchs_own_type(dtype):
    name = {torch.bfloat16: "BF16", torch.float16: "FP16"}[dtype]
    terms = some_terms(3, 100)
    total = torch.zeros(3, dtype=dtype)
    for term in terms.to(dtype).unbind(-1):
        total = total + term
    assert torch.equal(summed(terms, name), total.float())
    assert torch.equal(running(terms, name)[:, -1], total.float())


def test_chunked_and_pairwise_are_these_sums():
    a, b, c, d, e = terms = rounded(some_terms(5), "BF16")

    def plus(x, y):
        return rounded(x + y, "BF16")

    assert summed(terms, order="pairwise") == plus(plus(plus(a, b), plus(c, d)), e)
    assert summed(terms, order="chunked", chunk=2) == plus(plus(plus(a, b), plus(c, d)), e)
    assert summed(terms, order="chunked", chunk=3) == plus(plus(plus(a, b), c), plus(d, e))
    assert summed(terms, order="chunked", chunk=9) == summed(terms)


@pytest.mark.parametrize("format", ["FP32", "TF32", "BF16", "FP16"])
@pytest.mark.parametrize("order", ORDERS)
def test_errors_stay_within_the_bound(format, order):
    for count in (1, 2, 7, 100, 333):
        terms = rounded(some_terms(40, count, seed=count), format)
        off = (summed(terms, format, order=order).double() - terms.double().sum(-1)).abs()
        if order == "kahan":  # no bound of ours; twice u, and a little that grows with n
            u = half_spacing(format)
            assert (off <= (2 * u + 2 * count * u**2) * terms.double().abs().sum(-1)).all()
        else:
            assert (off <= error_bound(terms, format, order=order)).all()


def test_the_bound_is_reached_by_the_worst_terms():
    # 1, and then terms of half a spacing: each is lost, to the even neighbour
    terms = torch.cat([torch.ones(1), torch.full((8,), half_spacing("BF16"))])
    off = (summed(terms).double() - terms.double().sum()).abs()
    assert off == 8 * 2**-8 and 0.9 < off / error_bound(terms) <= 1


def test_the_additions_a_term_passes_through():
    assert [additions(n) for n in (1, 2, 100)] == [0, 1, 99]
    assert [additions(n, "pairwise") for n in (1, 2, 3, 1000)] == [0, 1, 2, 10]
    assert additions(1000, "chunked", chunk=10) == 9 + 99
    assert additions(5, "chunked", chunk=10) == 4
    assert half_spacing("BF16") == 2**-8 and half_spacing("FP32") == 2**-24


def test_better_orders_have_smaller_errors():
    terms = some_terms(20, 600, seed=1).abs()
    exact = rounded(terms, "BF16").double().sum(-1)
    off = {order: relative_error(summed(terms, order=order), exact) for order in ORDERS}
    assert off["sequential"] > 10 * off["chunked"] > 0
    assert off["chunked"] > off["pairwise"] and max(off["pairwise"], off["kahan"]) < 2**-7


def test_a_dot_product_rounds_at_each_stage():
    a, b = some_terms(4, 50), some_terms(4, 50, seed=1)
    operands = (a.bfloat16().double() * b.bfloat16().double()).sum(-1)
    assert relative_error(dot(a, b, operands="BF16"), operands) < 1e-6
    products = (a * b).bfloat16().double().sum(-1)
    assert relative_error(dot(a, b, products="BF16"), products) < 1e-6
    exact = (a.double() * b.double()).sum(-1)
    assert torch.equal(dot(a, b, result="BF16"), dot(a, b).bfloat16().float())
    assert torch.equal(dot(a, b, accumulator="BF16"), summed(a * b, "BF16"))
    assert relative_error(dot(a, b), exact) < 1e-6


def test_stage_errors_name_each_stage():
    a, b = some_terms(16, 1, 300), some_terms(1, 16, 300, seed=1)
    found = stage_errors(a, b, "BF16")
    assert list(found) == ["operands", "products", "accumulator", "result", "all"]
    step = 2**-8 / math.sqrt(3)  # one rounding: spread evenly over a band of u on either side
    assert found["result"] == pytest.approx(step, rel=0.5)
    assert found["operands"] == pytest.approx(math.sqrt(2) * step, rel=0.5)
    assert found["accumulator"] > 5 * found["result"]
    assert max(stage_errors(a, b, "FP32").values()) < 1e-6


def test_gradients_over_microbatches():
    batches = some_batches(rows=4, steps=6)
    whole = small()
    next_token_loss(whole(torch.cat(batches)), torch.cat(batches)).backward()
    exact = torch.cat([p.grad.flatten() for p in whole.parameters()])
    model = small()
    assert relative_error(accumulated_gradient(model, batches), exact) < 1e-12
    assert 1e-9 < relative_error(accumulated_gradient(model, batches, "FP32"), exact) < 1e-6
    assert 1e-3 < relative_error(accumulated_gradient(model, batches, "BF16"), exact) < 1e-2
    assert all(p.grad is None for p in model.parameters())


def test_bad_input():
    ones = torch.ones(3)
    found = refusals(
        [
            lambda: summed(ones, order="backwards"),
            lambda: summed(ones, "BF15"),
            lambda: summed(ones.double()),
            lambda: summed(torch.ones(2, 0)),
            lambda: summed(ones * torch.inf),
            lambda: summed(ones, order="chunked", chunk=0),
            lambda: error_bound(ones, order="kahan"),
            lambda: accumulated_gradient(small(), []),
        ]
    )
    words = ("backwards", "BF15", "float64", "(2, 0)", "not finite", "chunk is 0", "kahan", "empty")
    for message, word in zip(found, words, strict=True):
        assert word in message

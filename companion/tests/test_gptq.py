"""GPTQ agrees with the slow form it was derived from, and lies between nearest and the optimum."""

import itertools
from dataclasses import replace

import pytest
import torch

from companion.calibration import Inputs, observe
from companion.curvature import factor
from companion.quantization import minimum, quantize
from companion.quantization.awq import output_error
from companion.quantization.gptq import compensated, gptq
from companion.quantization.grids import fit
from companion.quantization.replacing import Coding, nearest
from companion.tests.test_replacing import small, tokens


def seen_inputs(width=16, positions=200, seed=0, alike=0.7):
    """Inputs that go together, as activations do."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(positions, 2, generator=random) @ torch.randn(2, width, generator=random)
    own = torch.randn(positions, width, generator=random)
    found = Inputs(width, torch.device("cpu"))
    found.add(alike * common + (1 - alike) * own)
    return found


def some_weight(outputs=8, width=16, seed=1):
    return torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed))


def column_grids(weight, bits=3):
    grid = fit(weight.unsqueeze(1), bits, mapping=minimum)
    fields = {n: getattr(grid, n).view(-1, 1).expand_as(weight) for n in ("scale", "offset")}
    return replace(grid, **fields)


def slow(weight, grid, products):
    """Optimal Brain Surgeon, step by step: invert what is left of H anew for every input."""
    weight, codes = weight.double().clone(), []
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(products[i:, i:])
        one = replace(grid, **{n: getattr(grid, n)[:, i : i + 1].double()
                               for n in ("scale", "offset")})  # fmt: skip
        codes.append(one.codes(weight[:, i : i + 1]))
        error = weight[:, i : i + 1] - one.numbers(codes[-1])
        weight[:, i:] -= error * inverse[0] / inverse[0, 0]
    return torch.cat(codes, dim=1)


@pytest.mark.parametrize("block", [1, 5, 16, 128])
def test_the_fast_form_is_the_slow_one(block):
    weight, found = some_weight(), seen_inputs()
    damped = found.products.double()
    damped = damped + 0.01 * damped.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    grid = column_grids(weight)
    fast = compensated(weight, grid, factor(found.products, 0.01), block)
    assert torch.equal(fast, slow(weight, grid, damped))


def test_the_factor_is_one_of_the_inverse():
    products = seen_inputs().products
    upper = factor(products, 0.01).double()
    damped = products.double()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(16, dtype=torch.float64), atol=1e-4)


def test_inputs_that_do_not_go_together_need_no_making_up():
    found = Inputs(16, torch.device("cpu"))
    found.add(torch.eye(16) * 3)
    weight, coding = some_weight(), Coding(bits=3)
    ours = gptq({"w": found})("w", weight, coding)
    assert torch.equal(ours.codes, nearest("w", weight, coding).codes)


def test_gptq_lies_between_nearest_and_the_best_of_all_codes():
    """All 4^6 codings of six weights are tried; over 20 weights GPTQ closes most of the gap."""
    coding, gaps = Coding(bits=2, mapping=minimum), []
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=6)), dtype=torch.int8)
    for seed in range(20):
        found, weight = seen_inputs(6, seed=seed), some_weight(1, 6, seed=seed)
        plain = nearest("w", weight, coding)
        ours = gptq({"w": found}, damping=1e-4)("w", weight, coding)
        all_errors = weight - plain.scheme.numbers(every)
        best = ((all_errors @ found.products) * all_errors).sum(-1).min().item()
        errors = [output_error(weight - r.numbers(6), found) for r in (plain, ours)]
        assert best <= min(errors) * (1 + 1e-4)
        gaps.append((errors[0] - best, errors[1] - best))
    nearest_gap, gptq_gap = (sum(gap) for gap in zip(*gaps, strict=True))
    assert gptq_gap < 0.5 * nearest_gap


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3, "group": 8},
        {"bits": "nf4", "group": 16},
        {"bits": 4, "group": "tensor"},
        {"bits": "float8_e5m2"},
    ],
)
def test_outputs_are_nearer_than_with_nearest(ordered, options):
    coding, found, weight = Coding(**options), seen_inputs(), some_weight()
    ours = gptq({"w": found}, ordered=ordered)("w", weight, coding)
    plain = nearest("w", weight, coding)
    assert torch.equal(ours.scheme.scale, plain.scheme.scale)
    errors = [output_error(weight - r.numbers(16), found) for r in (ours, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_ordered_is_the_slow_form_on_inputs_put_in_order():
    found, weight, coding = seen_inputs(), some_weight(), Coding(bits=3, mapping=minimum)
    found.products *= torch.linspace(0.5, 2, 16).outer(torch.linspace(0.5, 2, 16))
    order = found.products.diagonal().argsort(descending=True)
    assert not torch.equal(order, torch.arange(16))
    ours = gptq({"w": found})("w", weight, coding)
    damped = found.products[order][:, order].double()
    damped = damped + 0.01 * damped.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    grid = replace(ours.scheme, **{n: getattr(ours.scheme, n).view(-1, 1).expand_as(weight)
                                   for n in ("scale", "offset")})  # fmt: skip
    assert torch.equal(ours.codes.view(8, 16)[:, order], slow(weight[:, order], grid, damped))


def test_inputs_that_leave_h_singular_are_refused():
    found = Inputs(16, torch.device("cpu"))
    found.add(torch.ones(3, 16) * 1e3)
    found.products[0, 0] *= 0.5  # no sum of squares: rounding errors can do that too
    with pytest.raises(ValueError, match=r"singular at a damping of 1e-10; give more"):
        gptq({"w": found}, damping=1e-10)("w", some_weight(), Coding())


def test_order_changes_nothing_but_the_order():
    """With inputs already in order, `ordered` has nothing to do."""
    found = seen_inputs()
    order = found.products.diagonal().argsort(descending=True)
    found.products = found.products[order][:, order].contiguous()
    weight, coding = some_weight(), Coding(bits=3)
    one, other = (gptq({"w": found}, ordered=o)("w", weight, coding) for o in (True, False))
    assert torch.equal(one.codes, other.codes)


def test_a_whole_model_predicts_nearer_to_the_original():
    model, text = small(), tokens()
    inputs = observe(model, [text])
    expected = model(text)
    ours = quantize(model, 3, group=16, rounding=gptq(inputs), head=None)
    plain = quantize(model, 3, group=16, head=None)
    assert (ours(text) - expected).norm() < (plain(text) - expected).norm()


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="damping is 0; it must be a finite number above 0"):
        gptq({}, damping=0)
    with pytest.raises(ValueError, match="block is 0"):
        gptq({}, block=0)
    with pytest.raises(ValueError, match=r"no inputs of blocks\.0\.attention\.query were observed"):
        quantize(small(), 4, rounding=gptq({}))

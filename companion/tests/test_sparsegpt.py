"""SparseGPT agrees with the slow form it came from, and lies between magnitude and the best."""

import itertools

import pytest
import torch

from companion.calibration import observe
from companion.curvature import factor
from companion.pruning import (
    in_groups,
    over_matrix,
    over_rows,
    prune,
    sparsegpt,
    sparsity_of,
    wanda,
)
from companion.pruning.sparsegpt import compensated
from companion.tests.test_gptq import seen_inputs, some_weight
from companion.tests.test_replacing import small, tokens, weights


def damped(found, damping=0.01):
    """H in FP64, as `factor` damps it."""
    products = found.products.double()
    size = torch.eye(len(products), dtype=torch.float64)
    return products + damping * products.diagonal().mean() * size


def refitted(row, kept, fixed, products):
    """The best row (I,), 0 where not kept, whose first `fixed` weights stay; all in FP64."""
    row, result = row.double(), row.double().clone()
    result[~kept] = 0
    free = [i for i in range(fixed, len(row)) if kept[i]]
    rest = [i for i in range(len(row)) if i not in free]
    change = torch.linalg.solve(
        products[free][:, free], products[free][:, rest] @ (row - result)[rest]
    )
    result[free] = row[free] + change
    return result


def output_error(row, other, products):
    change = (row - other).double()
    return (change @ products @ change).item()


def slow(weight, kept, products):
    """Optimal Brain Surgeon, input by input: invert what is left of H anew for each."""
    weight = weight.double().clone()
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(products[i:, i:])
        error = weight[:, i : i + 1] * ~kept[:, i : i + 1]
        weight[:, i:] -= error * inverse[0] / inverse[0, 0]
    return weight.masked_fill(~kept, 0)


@pytest.mark.parametrize("columns", [1, 5, 16, 128])
def test_the_fast_form_is_the_slow_one(columns):
    found, weight = seen_inputs(), some_weight()
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    upper = factor(found.products.double(), 0.01)
    fast = compensated(
        weight.double(), upper, lambda i, losses: kept[:, i : i + losses.shape[1]], columns
    )
    assert torch.allclose(fast, slow(weight, kept, damped(found)), rtol=1e-6, atol=1e-7)


def test_wide_matrices_carry_the_change_across_blocks():
    found, weight = seen_inputs(200, 300), some_weight(4, 200)
    kept = over_rows(weight.abs(), 0.5)
    expected = slow(weight, kept, damped(found))
    upper = factor(found.products.double(), 0.01)
    for columns in (7, 128, 150, 200):
        fast = compensated(
            weight.double(), upper, lambda i, losses: kept[:, i : i + losses.shape[1]], columns
        )
        assert torch.allclose(fast, expected, rtol=1e-6, atol=1e-7)


def test_the_weight_given_survives():
    found, weight = seen_inputs(), some_weight(1)
    before = weight.clone()
    sparsegpt({"w": found})("w", weight, None, lambda losses: over_matrix(losses, 0.5))
    assert torch.equal(weight, before)


def given(kept):
    """A criterion that ranks first what a mask keeps."""
    return lambda name, weight: kept.to(weight.dtype)


def one_row(found, row, kept):
    """SparseGPT's making up for a given mask, as `prune` would call it."""
    share = (~kept).sum().item() / len(row)
    method = sparsegpt({"w": found}, damping=1e-6)
    return method("w", row[None], given(kept[None]), lambda s: over_matrix(s, share))[0]


@pytest.mark.parametrize("gone", [0, 3, 7])
def test_one_weight_is_made_up_for_by_the_closed_form(gone):
    """OBS: w -= w_j H^-1[:, j] / H^-1[j, j]; of a weight in the middle, by those that follow."""
    found, row = seen_inputs(8), some_weight(1, 8)[0]
    kept = torch.arange(8) != gone
    products = damped(found, 1e-6)
    inverse = torch.linalg.inv(products[gone:, gone:])
    expected = row.double().clone()
    expected[gone:] -= row[gone] * inverse[0] / inverse[0, 0]
    assert torch.allclose(one_row(found, row, kept).double(), expected, rtol=1e-3, atol=1e-4)
    refit = refitted(row, kept, gone, products)
    assert torch.allclose(expected[kept], refit[kept], rtol=1e-6, atol=1e-8)


def test_if_the_first_inputs_go_the_rest_is_the_least_squares_fit():
    """Then every kept weight may still change when the last one goes: nothing is left to gain."""
    found, row = seen_inputs(12), some_weight(1, 12)[0]
    kept = torch.arange(12) >= 5
    expected = refitted(row, kept, 0, damped(found, 1e-6))
    assert torch.allclose(one_row(found, row, kept).double(), expected, rtol=1e-3, atol=1e-3)


def test_after_the_last_zero_weights_are_the_best_for_all_before():
    found, row = seen_inputs(12), some_weight(1, 12)[0]
    kept = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1], dtype=torch.bool)
    ours = one_row(found, row, kept)
    start = torch.cat([ours[:6], row[6:]])  # zeros and settled weights; the rest as it was
    products = damped(found, 1e-6)
    change = (row - start).double()
    later = torch.linalg.solve(products[6:, 6:], products[6:] @ change)
    assert torch.allclose(ours[6:].double(), row[6:] + later, rtol=1e-3, atol=1e-3)


def test_sparsegpt_lies_between_magnitude_and_the_best_of_all_masks():
    """All 20 halves of six weights are tried, the kept refitted; over 30 rows SparseGPT is near."""
    gaps = []
    for seed in range(30):
        found, row = seen_inputs(6, seed=seed), some_weight(1, 6, seed=seed)[0]
        products = damped(found, 1e-6)
        ours = sparsegpt({"w": found}, damping=1e-6)(
            "w", row[None], None, lambda losses: over_rows(losses, 0.5)
        )[0]
        plain = row * over_rows(row.abs()[None], 0.5)[0]
        masks = [
            torch.tensor([i in m for i in range(6)]) for m in itertools.combinations(range(6), 3)
        ]
        best = min(output_error(row, refitted(row, m, 0, products), products) for m in masks)
        errors = [output_error(row, other, products) for other in (plain, ours)]
        assert (ours == 0).sum() == 3 and best <= min(errors) * (1 + 1e-4)
        gaps.append([error - best for error in errors])
    plain_gap, our_gap = (sum(gap) for gap in zip(*gaps, strict=True))
    assert our_gap < 0.5 * plain_gap


def test_inputs_that_do_not_go_together_need_no_making_up():
    found, weight = seen_inputs(16), some_weight()
    found.products = torch.eye(16) * 3
    ours = sparsegpt({"w": found})("w", weight, None, lambda losses: over_matrix(losses, 0.5))
    assert torch.equal(ours, weight * over_matrix(weight.abs(), 0.5))


@pytest.mark.parametrize("pattern", [over_matrix, over_rows, in_groups(4)])
@pytest.mark.parametrize("columns", [4, 128])
@pytest.mark.parametrize("ranked", [False, True])
def test_a_whole_model_predicts_nearer_to_the_original(pattern, columns, ranked):
    model, text = small(), tokens()
    before, inputs, expected = weights(model), observe(model, [text]), model(text)
    scores = wanda(inputs) if ranked else None
    ours = prune(
        model, 0.5, scores=scores, pattern=pattern, method=sparsegpt(inputs, columns=columns)
    )
    plain = prune(model, 0.5, scores=scores, pattern=pattern)
    assert (ours(text) - expected).norm() < (plain(text) - expected).norm()
    assert set(sparsity_of(ours).values()) == {0.5}
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_two_of_four_hold_whatever_the_columns():
    model = small()
    inputs = observe(model, [tokens()])
    for columns in (4, 8, 128):
        new = prune(model, 0.5, pattern=in_groups(4), method=sparsegpt(inputs, columns=columns))
        zeros = new.blocks[1].mlp.down.weight == 0
        assert (zeros.view(-1, 4).sum(1) == 2).all()


def test_bad_options_are_refused():
    model = small()
    inputs = observe(model, [tokens()])
    with pytest.raises(ValueError, match="damping is 0; it must be a finite number above 0"):
        sparsegpt(inputs, damping=0)
    with pytest.raises(ValueError, match="columns is 0"):
        sparsegpt(inputs, columns=0)
    with pytest.raises(ValueError, match=r"no inputs of blocks\.0\.attention\.query were observed"):
        prune(model, method=sparsegpt({}))
    wide = observe(small(width=64), [tokens()])
    with pytest.raises(ValueError, match="inputs of 64 numbers were observed"):
        prune(model, method=sparsegpt(wide))
    with pytest.raises(ValueError, match="groups of 4 do not divide the 6 inputs"):
        prune(model, pattern=in_groups(4), method=sparsegpt(inputs, columns=6))

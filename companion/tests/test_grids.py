"""Grids are wrong by half a scale at most, and agree with torchao's code for code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.quantization import affine, extremes, least_squares, minimum, percentile, symmetric
from companion.quantization.grids import Grid, code_range, fit, grouped

MAPPINGS = (symmetric, affine, minimum)


def numbers(shape=(6, 4, 32), seed=0, shift=0.3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(MAPPINGS), st.integers(2, 8), st.integers(0, 10**6), st.floats(-3, 3))
def test_an_error_is_at_most_half_a_scale(mapping, bits, seed, shift):
    x = numbers((3, 2, 16), seed, shift).double()
    grid = fit(x, bits, mapping=mapping)
    error = (grid.rounded(x) - x).abs()
    slack = 1.0 if mapping is affine else 0.5  # a rounded zero moves one end by half a scale
    assert (error <= (slack + 1e-9) * grid.scale).all()
    if mapping is affine:  # only what lies at the moved end is off by more than half a scale
        codes = grid.codes(x)
        inside = (codes > code_range(bits)[0]) & (codes < code_range(bits)[1])
        assert (error[inside] <= (0.5 + 1e-9) * grid.scale.expand_as(x)[inside]).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_each_mapping_promises(bits):
    x = numbers()
    zeros = torch.zeros_like(x)
    assert torch.equal(fit(x, bits, mapping=symmetric).rounded(zeros), zeros)
    assert torch.equal(fit(x, bits, mapping=affine).rounded(zeros), zeros)
    lowest, highest = code_range(bits)
    codes = fit(x, bits, mapping=minimum).codes(x)
    assert (codes.amin(-1) == lowest).all() and (codes.amax(-1) == highest).all()
    codes = fit(x, bits, mapping=symmetric).codes(x)
    assert codes.min() >= -highest and codes.abs().amax(-1).min() == highest


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_numbers_on_a_grid_stay_where_they_are(mapping):
    grid = fit(numbers(), 4, mapping=mapping)
    once = grid.rounded(numbers())
    assert torch.allclose(grid.rounded(once), once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_equal_numbers_and_zeros_have_a_grid_too(mapping):
    for value in (0.0, 2.5):
        x = torch.full((2, 1, 8), value)
        assert torch.allclose(fit(x, 4, mapping=mapping).rounded(x), x, rtol=1e-6)


def test_grids_agree_with_torchao():
    torchao = pytest.importorskip("torchao.quantization.quant_primitives")
    x = numbers((64, 3, 64)).flatten(1)  # (64, 192) in groups of 64
    kinds = {symmetric: torchao.MappingType.SYMMETRIC, affine: torchao.MappingType.ASYMMETRIC}
    for bits in (4, 8):
        for mapping, kind in kinds.items():
            low, high = code_range(bits)
            low = low + 1 if mapping is symmetric else low
            scale, zero = torchao.choose_qparams_affine(
                x, kind, (1, 64), torch.int8, low, high, eps=1e-9, scale_dtype=torch.float32
            )
            theirs = torchao.quantize_affine(x, (1, 64), scale, zero, torch.int8, low, high)
            grid = fit(grouped(x, 64), bits, mapping=mapping)
            assert torch.allclose(grid.scale.flatten(), scale.flatten(), rtol=1e-6)
            differ = (grid.codes(grouped(x, 64)).view(64, 192) - theirs).abs()
            assert differ.max() <= 1 and (differ > 0).float().mean() < 1e-3  # ties, rounded apart


def test_minimum_agrees_with_torchao():
    torchao = pytest.importorskip("torchao.quantization.quant_primitives")
    x = numbers((32, 2, 32)).flatten(1)
    scale, zero = torchao._choose_qparams_affine_tinygemm(
        x, torchao.MappingType.ASYMMETRIC, (1, 32), torch.int32, 0, 15, eps=1e-9
    )
    codes = torchao._quantize_affine_tinygemm(x, (1, 32), scale, zero, torch.int32, 0, 15)
    theirs = torchao._dequantize_affine_tinygemm(
        codes, (1, 32), scale, zero, torch.int32, 0, 15, output_dtype=torch.float32
    )
    ours = fit(grouped(x, 32), 4, mapping=minimum).rounded(grouped(x, 32)).view(32, 64)
    apart = (ours - theirs).abs() > 1e-5
    assert apart.float().mean() < 1e-3


def test_percentile_cuts_off_a_share():
    x = torch.arange(1001.0).view(1, 1, -1)
    grid = fit(x, 8, mapping=minimum, limits=percentile(0.01))
    assert grid.offset.item() == 10 and grid.scale.item() == pytest.approx(980 / 255)
    assert grid.rounded(x).max().item() == pytest.approx(990)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_least_squares_is_the_best_of_the_grids_it_tries(mapping):
    x = numbers((5, 1, 64), shift=0)
    x[:, :, 0] = 8.0  # an outlier in each group
    found = (fit(x, 3, mapping=mapping, limits=least_squares).rounded(x) - x).square().sum(-1)
    slow = []
    for step in range(15):
        share = 1 - step / 20
        grid = mapping(share * x.amin(-1, True), share * x.amax(-1, True), 3)
        slow.append((grid.rounded(x) - x).square().sum(-1))
    assert torch.equal(found, torch.stack(slow).amin(0))
    assert (found <= (fit(x, 3, mapping=mapping).rounded(x) - x).square().sum(-1)).all()


def test_groups_share_a_grid():
    weight = numbers((6, 1, 24)).view(6, 24)
    assert grouped(weight).shape == (6, 1, 24)
    assert grouped(weight, 8).shape == (6, 3, 8)
    assert grouped(weight, "tensor").shape == (1, 1, 144)
    assert torch.equal(grouped(weight, 8)[2, 1], weight[2, 8:16])


def test_a_grid_stored_in_sixteen_bits_is_the_one_that_rounds():
    x = numbers()
    grid = fit(x, 4).stored_as(torch.float16)
    assert torch.equal(grid.scale, grid.scale.half().float())


@pytest.mark.parametrize("size", [1e-9, 1e-7, 3e-6, 1e-3])
def test_a_small_scale_is_stored_so_that_the_limits_stay_inside(size):
    x = numbers() * size
    for mapping in MAPPINGS:
        grid = fit(x, 8, mapping=mapping).stored_as(torch.float16)
        assert torch.equal(grid.scale, grid.scale.half().float()) and (grid.scale > 0).all()
        slack = 1e-3 * x.abs().max() + 2**-25  # digits of FP16; half a step of its smallest numbers
        assert ((grid.rounded(x) - x).abs() <= 1.001 * grid.scale + slack).all()


def test_what_sixteen_bits_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"larger than torch\.float16 can hold, 65,504"):
        Grid(4, torch.tensor([1e6])).stored_as(torch.float16)
    far = torch.tensor([[70_000.0, 70_010.0]])
    with pytest.raises(ValueError, match="scale or offset is larger"):
        fit(far, 4, mapping=minimum).stored_as(torch.float16)


def test_a_symmetric_grid_stays_symmetric_where_limits_cut():
    x = torch.tensor([[-9.0, -1.0, 0.1, 1.0]])
    for bits in (2, 4, 8):
        grid = fit(x, bits, mapping=symmetric, limits=lambda n, make: make(-n[..., 3:], n[..., 3:]))
        assert grid.rounded(x)[0, 0].item() == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(numbers(), 1), "bits is 1; it must be 2 to 8"),
        (lambda: fit(numbers(), 9), "bits is 9; it must be 2 to 8"),
        (lambda: fit(numbers(), 4.0), r"bits is 4\.0; it must be a whole number"),
        (lambda: fit(torch.tensor([[1.0, torch.nan]]), 4), "1 of 2 numbers are not finite"),
        (lambda: fit(torch.empty(2, 0), 4), "0 numbers"),
        (lambda: grouped(torch.ones(2, 10), 3), "group 3 does not divide the 10 inputs"),
        (lambda: grouped(torch.ones(2, 10), "column"), "group is 'column'"),
        (lambda: grouped(torch.ones(2, 10), 0), "group is 0"),
        (lambda: percentile(0.5), r"share is 0\.5; it must be below 0\.5"),
        (lambda: percentile(0), "share is 0; it must be a finite number above 0"),
        (
            lambda: fit(torch.tensor([[1.0, 2.0, 3.0]]), 4, limits=percentile(0.4)),
            "leaves nothing of groups of 3",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_extremes_are_the_default():
    x = numbers()
    assert torch.equal(fit(x, 4).scale, fit(x, 4, limits=extremes, mapping=affine).scale)

"""Integer products equal the products of the rounded numbers, and each range does as it says."""

import pytest
import torch

from companion.calibration import observe
from companion.quantization import quantize, symmetric
from companion.quantization.activations import (
    FirstKept,
    IntegerLinear,
    PerTensor,
    PerToken,
    Static,
    integer,
    static_ranges,
)
from companion.quantization.layers import QuantizedLinear
from companion.tests.test_replacing import small, tokens, weights

RANGES = {"token": PerToken(), "tensor": PerTensor(), "static": Static(-3.0, 2.0)}


def eight_bits(model=None):
    return quantize(model or small(), 8, mapping=symmetric)


@pytest.mark.parametrize("name", RANGES)
def test_integer_products_are_the_products_of_rounded_numbers(name):
    linear = eight_bits().blocks[0].mlp.up
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    grid = RANGES[name](x.flatten(0, 1))
    rounded = grid.rounded(x.flatten(0, 1)).double()
    expected = (rounded @ linear.matrix.expand().double().T).view(2, 7, -1)
    found = IntegerLinear(linear, RANGES[name])(x)
    assert found.dtype == x.dtype and torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_how_many_grids_each_range_has():
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    x[3] *= 50
    assert PerToken()(x).scale.shape == (5, 1) and PerTensor()(x).scale.shape == (1, 1)
    token, tensor = ((r(x).rounded(x) - x)[:3].abs().max() for r in (PerToken(), PerTensor()))
    assert tensor > 20 * token  # one large vector spoils the grid of all others
    fixed = Static(-1, 1)
    assert torch.equal(fixed(x).scale, fixed(9 * x).scale)
    assert Static(-1, 1)(x).rounded(x).abs().max() < 1.01  # what calibration did not see is cut


def test_a_token_alone_does_not_see_the_others():
    """Per token, a vector's result is the same in any company; per tensor it is not."""
    linear = eight_bits().blocks[0].mlp.up
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    x[0, 0] *= 50
    for range_of, same in ((PerToken(), True), (Static(-9, 9), True), (PerTensor(), False)):
        layer = IntegerLinear(linear, range_of)
        assert torch.allclose(layer(x)[:, 1:], layer(x[:, 1:]), atol=1e-6) is same


def test_a_model_of_integers_is_near_the_model_of_eight_bit_weights():
    model = eight_bits()
    before = weights(model)
    new = integer(model)
    layers = [m for m in new.modules() if isinstance(m, IntegerLinear)]
    assert len(layers) == 2 * 7 and isinstance(new.head, QuantizedLinear)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    expected = model(tokens())
    assert (new(tokens()) - expected).norm() < 0.02 * expected.norm()


def test_static_ranges_hold_what_calibration_saw():
    plain = small()
    inputs = observe(plain, [tokens()])
    model = eight_bits(plain)
    ranges = static_ranges(model, inputs)
    new = integer(model, ranges)
    expected = model(tokens())
    assert ranges.keys() == inputs.keys()
    assert (new(tokens()) - expected).norm() < 0.05 * expected.norm()
    lowest = ranges["blocks.0.mlp.up"].grid.numbers(torch.tensor([[-128]]))
    assert lowest.item() == pytest.approx(inputs["blocks.0.mlp.up"].low, rel=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: integer(small()), "no module is chosen"),
        (lambda: integer(quantize(small())), "has no symmetric grid a row"),
        (lambda: integer(quantize(small(), group=16, mapping=symmetric)), "no symmetric grid"),
        (lambda: integer(quantize(small(), "nf4")), "no symmetric grid a row"),
        (lambda: integer(eight_bits(), {}), "no range is given for blocks.0.attention.query"),
        (lambda: static_ranges(eight_bits(), {}), "no inputs of blocks.0.attention.query"),
        (lambda: Static(1.0, 2.0), r"the range is 1\.0 to 2\.0; it must hold 0"),
        (lambda: Static(-float("inf"), 1.0), "the range is -inf to 1"),
        (lambda: PerToken(9), "bits is 9"),
        (lambda: IntegerLinear(quantize(small()).head, PerToken()), "no symmetric grid a row"),
        (lambda: IntegerLinear(torch.nn.Linear(2, 2), PerToken()), "Linear is no QuantizedLinear"),
        (
            lambda: integer(quantize(small(), mapping=symmetric, group="tensor")),
            "no symmetric grid",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_activations_that_are_not_finite_are_refused():
    x = torch.full((1, 2, 32), torch.nan)
    for range_of in RANGES.values():
        with pytest.raises(ValueError, match="64 of 64 numbers are not finite"):
            IntegerLinear(eight_bits().blocks[0].mlp.up, range_of)(x)


def test_the_first_position_can_be_spared():
    """The first of each text as with 8-bit weights alone, the others as if it were not there."""
    linear = eight_bits().blocks[0].mlp.up
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 50
    spared, whole = FirstKept(linear, PerTensor()), IntegerLinear(linear, PerTensor())
    assert torch.equal(spared(x)[:, :1], linear(x[:, :1]))
    assert torch.equal(spared(x)[:, 1:], whole(x[:, 1:]))
    assert torch.equal(spared(x[:, :1]), linear(x[:, :1]))
    kinds = [type(m) for m in integer(eight_bits(), PerTensor(), layer=FirstKept).modules()]
    assert kinds.count(FirstKept) == 14

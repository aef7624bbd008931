"""AWQ is the best of the scalings it tries, plain rounding among them."""

import pytest
import torch

from companion.calibration import Inputs, observe
from companion.memory import stored_bytes
from companion.quantization import quantize
from companion.quantization.awq import awq, output_error, scaled
from companion.quantization.replacing import Coding, nearest
from companion.tests.test_replacing import small, tokens


def uneven(width=16, positions=100):
    """Inputs of which two are thirty times as large as the others."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(positions, width, generator=random)
    x[:, [3, 9]] *= 30
    found = Inputs(width, torch.device("cpu"))
    found.add(x)
    return x, found


def some_weight():
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def test_output_error_is_the_squared_change_of_the_output():
    x, found = uneven()
    change = some_weight()
    assert output_error(change, found) == pytest.approx((x @ change.T).square().sum().item())


def test_uneven_inputs_gain_and_the_best_power_is_taken():
    x, found = uneven()
    weight, coding = some_weight(), Coding(bits=3)

    def error(rounded):
        return (x @ (weight - rounded.numbers(16)).T).square().sum().item()

    best = awq({"w": found})("w", weight, coding)
    tried = [error(scaled(weight, coding, found, step / 10)) for step in range(11)]
    assert error(best) == pytest.approx(min(tried))
    assert error(best) < 0.5 * error(nearest("w", weight, coding))


def test_columns_are_multiplied_by_the_mean_size_to_a_power():
    x, found = uneven()
    rounded = scaled(some_weight(), Coding(bits=8), found, 0.5)
    sizes = x.abs().mean(0).sqrt()
    expected = (sizes.max() * sizes.min()).sqrt() / sizes
    assert torch.allclose(rounded.columns, expected, rtol=2e-3)
    assert torch.allclose(rounded.numbers(16), some_weight(), atol=0.05)


def test_power_zero_is_plain_rounding():
    _, found = uneven()
    plain, zero = nearest("w", some_weight(), Coding()), scaled(some_weight(), Coding(), found, 0.0)
    assert torch.equal(plain.codes, zero.codes) and torch.equal(zero.columns, torch.ones(16))


def test_a_model_stores_a_scale_a_column():
    model = small()
    inputs = observe(model, [tokens()])
    new, plain = quantize(model, 4, rounding=awq(inputs)), quantize(model, 4)
    columns = sum(layer.in_features for name, layer in model.named_modules()
                  if name.startswith("blocks.") and hasattr(layer, "in_features"))  # fmt: skip
    assert stored_bytes(new) == stored_bytes(plain) + 2 * columns
    assert (new(tokens()) - model(tokens())).norm() < (plain(tokens()) - model(tokens())).norm()


def test_bad_powers_are_refused():
    with pytest.raises(ValueError, match="powers is 0"):
        awq({}, powers=0)

"""Underflow read off a histogram against underflow counted by casting."""

import pytest
import torch

from companion.losses import next_token_loss
from companion.precision.underflow import (
    counted_underflow,
    numbers_of_a_step,
    powers,
    predicted_underflow,
)
from companion.tests.test_precision_mixed import HERE, batches, gradients, small


def test_bins_end_at_powers_of_two():
    values = torch.tensor([0.0, 1.0, -1.0, 1.0001, 2.0, 0.75, 2.0**-25, -(2.0**-25) * 1.001])
    assert powers(values) == {0: 3, 1: 2, -25: 1, -24: 1}


@pytest.mark.parametrize("format", ["FP16", "BF16", "E4M3", "E5M2"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-7, 2.0**11, 2.0**16])
def test_predicted_is_counted(format, scale):
    draw = torch.Generator().manual_seed(0)
    exponents = torch.randint(-60, 4, (20_000,), generator=draw)
    values = torch.randn(20_000, generator=draw) * torch.exp2(exponents.float())
    values = torch.cat([values, torch.exp2(torch.arange(-60.0, 4)), torch.zeros(99)]).to(HERE)
    predicted = predicted_underflow(powers(values), format, scale)
    assert predicted == counted_underflow(values, format, scale)
    assert (0 < predicted < 1) == (format != "BF16")


def test_the_tie_at_half_the_smallest_denormal():
    edge = torch.tensor([2.0**-25, 2.0**-25 * (1 + 2.0**-23)], device=HERE)
    assert counted_underflow(edge) == predicted_underflow(powers(edge)) == 0.5


def test_numbers_of_a_step_are_those_of_the_step():
    model, batch = small(), batches()[0].to(HERE)
    found = numbers_of_a_step(model, batch)
    slopes = gradients(model, next_token_loss(model(batch), batch))
    assert torch.equal(found["gradients of weights"], torch.cat([g.flatten() for g in slopes]))
    linear_outputs = 3 * 12 * (2 * (32 + 16 + 16 + 32 + 64 + 64 + 32) + 50)
    for kind in ("activations", "gradients of activations"):
        assert found[kind].shape == (linear_outputs,)
    assert len(found["weights"]) == sum(p.numel() for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not model.head._forward_hooks


def test_refusals():
    with pytest.raises(ValueError, match="scale is 1000; a power of two"):
        predicted_underflow({0: 1}, "FP16", 1000)
    with pytest.raises(ValueError, match="holds no values"):
        predicted_underflow({})
    with pytest.raises(ValueError, match="no values other than zero"):
        counted_underflow(torch.zeros(3))
    with pytest.raises(ValueError, match="not finite"):
        powers(torch.tensor([1.0, torch.inf]))
    with pytest.raises(ValueError, match="format is 'FP12'"):
        predicted_underflow({0: 1}, "FP12")

"""A smoothed model computes the same, from more even activations."""

import pytest
import torch

from companion.calibration import observe
from companion.quantization import quantize
from companion.quantization.smoothing import smooth
from companion.tests.test_replacing import small, tokens, weights


def spiky():
    """A small model one of whose norms lets one input through a hundred times as strongly."""
    model = small()
    with torch.no_grad():
        model.blocks[0].mlp_norm.weight[5] = 100
        model.blocks[1].mlp.up.weight[7] *= 100
    return model


@pytest.mark.parametrize("strength", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("down", [False, True])
def test_smoothing_changes_no_output(strength, down):
    model = spiky().double()
    model.cos, model.sin = model.cos.double(), model.sin.double()
    before = weights(model)
    new = smooth(model, observe(model, [tokens()]), strength=strength, down=down)
    assert torch.allclose(new(tokens()), model(tokens()), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert not torch.equal(new.blocks[0].mlp.up.weight, model.blocks[0].mlp.up.weight)


def test_no_strength_makes_the_weights_even():
    model = spiky()
    new = smooth(model, observe(model, [tokens()]), strength=0, down=True)
    for name in ("blocks.1.mlp.down", "blocks.0.attention.query"):
        names = [name] if "down" in name else [name, name.replace("query", "key"),
                                               name.replace("query", "value")]  # fmt: skip
        largest = torch.stack([new.get_submodule(n).weight.abs().amax(0) for n in names]).amax(0)
        assert torch.allclose(largest, torch.ones_like(largest), rtol=1e-5)


def test_full_strength_makes_inputs_even():
    model = spiky()
    inputs = observe(model, [tokens()])
    new = observe(smooth(model, inputs, strength=1, down=True), [tokens()])
    for name in ("blocks.0.mlp.up", "blocks.1.mlp.down", "blocks.0.attention.query"):
        assert torch.allclose(new[name].largest, torch.ones_like(new[name].largest), rtol=1e-3)
        assert inputs[name].largest.max() > 1.5


def test_half_strength_shares_the_range_evenly():
    """At 0.5 inputs and weights of a column have the same largest size: SmoothQuant, section 4."""
    model = spiky()
    new = smooth(model, observe(model, [tokens()]))
    block = new.blocks[0]
    of_weights = torch.maximum(block.mlp.gate.weight.abs().amax(0),
                               block.mlp.up.weight.abs().amax(0))  # fmt: skip
    assert torch.allclose(
        observe(new, [tokens()])["blocks.0.mlp.up"].largest, of_weights, rtol=1e-3
    )


def test_a_column_nothing_reaches_stays_as_it_is():
    model = small()
    with torch.no_grad():
        model.blocks[0].mlp_norm.weight[3] = 0
    for strength in (0, 0.5):
        new = smooth(model, observe(model, [tokens()]), strength=strength)
        assert torch.equal(new.blocks[0].mlp.up.weight[:, 3], model.blocks[0].mlp.up.weight[:, 3])
        assert torch.allclose(new(tokens()), model(tokens()), atol=1e-5)


def test_a_half_precision_model_stays_finite():
    model = small().half()
    with torch.no_grad():
        model.blocks[0].mlp.down.weight[:, 2] = 1e-5
    inputs = observe(small(), [tokens()])
    new = smooth(model, inputs, strength=0, down=True)
    assert all(p.isfinite().all() for p in new.parameters())


def test_bad_input_is_refused():
    model = small()
    inputs = observe(model, [tokens()])
    for strength in (-0.1, 1.1, "half"):
        with pytest.raises(ValueError, match="strength is"):
            smooth(model, inputs, strength=strength)
    with pytest.raises(ValueError, match=r"no inputs of blocks\.0\.attention\.query"):
        smooth(model, {})
    with pytest.raises(ValueError, match="quantized already"):
        smooth(quantize(model), inputs)

"""`observe` counts what layers read, once each, and leaves no trace in the model."""

import pytest
import torch

from companion.calibration import observe, seen
from companion.tests.test_replacing import small, tokens


def read_by(model, name, batches):
    """What one layer reads, the obvious way."""
    kept = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _, args, out: kept.append(args[0].detach().flatten(0, 1))
    )
    for batch in batches:
        model(batch)
    hook.remove()
    return torch.cat(kept)


@pytest.mark.parametrize("layer", ["attention.key", "attention.out", "mlp.up", "mlp.down"])
def test_sums_and_extremes_are_those_of_the_inputs(layer):
    model, batches = small(), [tokens(), tokens()[:, :7]]
    name = f"blocks.1.{layer}"
    x, found = read_by(model, name, batches), observe(model, batches)[name]
    assert found.positions == len(x) == 54
    assert torch.allclose(found.products, x.T @ x, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found.magnitudes, x.abs().sum(0), rtol=1e-5)
    assert torch.equal(found.largest, x.abs().amax(0))
    assert (found.low, found.high) == (x.min().item(), x.max().item())


def test_layers_that_read_the_same_share_what_was_seen():
    found = observe(small(), [tokens()])
    for names in (("attention.query", "attention.key", "attention.value"), ("mlp.gate", "mlp.up")):
        assert len({id(found[f"blocks.0.{name}"]) for name in names}) == 1
    assert len({id(one) for one in found.values()}) == 2 * 4


def test_no_hook_is_left_even_when_reading_fails():
    model = small()
    observe(model, [tokens()])
    with pytest.raises(ValueError, match="ids run from"):
        observe(model, [tokens(), tokens() + 60])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_bad_calibration_is_refused():
    with pytest.raises(ValueError, match="0 calibration batches"):
        observe(small(), [])
    with pytest.raises(ValueError, match="no layer is chosen"):
        observe(small(), [tokens()], where=lambda name, module: False)
    broken = small()
    with torch.no_grad():
        broken.embedding.weight[:] = torch.nan
    with pytest.raises(ValueError, match="1280 of 1280 calibration inputs are not finite"):
        observe(broken, [tokens()])
    found = observe(small(), [tokens()])
    with pytest.raises(ValueError, match="no inputs of x were observed"):
        seen(found, "x", torch.ones(2, 32))
    with pytest.raises(ValueError, match=r"inputs of 32 numbers .* not of 8"):
        seen(found, "blocks.0.mlp.up", torch.ones(2, 8))

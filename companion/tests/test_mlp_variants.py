"""Activations at equal parameters, counted; and dropout against torch's own."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from companion.cost import forward_flops, parameters
from companion.dropout import with_dropout
from companion.losses import next_token_loss
from companion.memory import unique_parameters
from companion.mlp_variants import (
    GATED,
    NAMES,
    PlainMLP,
    activated_numbers,
    activation_passes,
    mlp_flops,
    mlp_parameters,
    plain_hidden,
    with_activation,
)
from companion.tests.equalities import far, weights
from companion.tests.test_model import small, some_tokens

FORMULAS = {  # written out, one number at a time
    "ReLU": lambda x: x.clamp(min=0),
    "Leaky ReLU": lambda x: torch.where(x > 0, x, x / 100),
    "GELU": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "SiLU": lambda x: x / (1 + torch.exp(-x)),
}


def varied(activation, seed=0, **changes):
    return with_activation(
        small(**changes), activation, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("hidden", [48, 49])
def test_parameters_are_equal_and_counted(activation, hidden):
    model, plain = varied(activation, hidden=hidden), small(hidden=hidden)
    found, expected = unique_parameters(model), parameters(plain.config)
    assert found == expected if hidden == 48 else abs(found / expected - 1) < 0.01
    inside = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name)
    assert inside == mlp_parameters(plain.config, activation)


@pytest.mark.parametrize("activation", NAMES)
def test_flops_are_counted(activation):
    model, tokens = varied(activation), some_tokens(3, 7)
    with FlopCounterMode(display=False) as whole:
        model(tokens)
    with FlopCounterMode(display=False) as rest:
        emptied = varied(activation)
        for block in emptied.blocks:
            block.mlp = nn.Identity()
        emptied(tokens)
    found = whole.get_total_flops() - rest.get_total_flops()
    assert found == mlp_flops(model.config, activation, 7, batch=3)
    assert mlp_flops(model.config, activation, 7) <= forward_flops(model.config, 7)


@pytest.mark.parametrize("activation", NAMES)
def test_as_many_numbers_pass_as_said(activation):
    model, seen = varied(activation), []
    for block in model.blocks:
        block.mlp.down.register_forward_pre_hook(lambda _, x: seen.append(x[0].numel()))
    model(some_tokens(3, 7))
    assert sum(seen) == activated_numbers(model.config, activation, 7, 3)
    activation_passes(model.config, activation, 7, 3)()


@pytest.mark.parametrize("activation", FORMULAS)
def test_each_activation_is_its_formula(activation):
    mlp = varied(activation).blocks[0].mlp
    assert isinstance(mlp, PlainMLP)
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = FORMULAS[activation](x @ mlp.up.weight.T) @ mlp.down.weight.T
    torch.testing.assert_close(mlp(x), expected, rtol=1e-12, atol=1e-12)


def test_what_is_new_and_what_is_kept():
    model = small()
    before = weights(model)
    one, other, third = varied("ReLU"), varied("GELU"), varied("ReLU", seed=1)
    assert far(weights(one), weights(other)) == 0 < far(weights(one), weights(third))
    for name, weight in weights(one).items():
        assert ".mlp." in name or torch.equal(weight, before[name])
    assert far(weights(with_activation(model, GATED)), before) == 0 == far(weights(model), before)
    wide = with_activation(small(hidden=4000), "ReLU").blocks[0].mlp
    assert wide.up.weight.std().item() == pytest.approx(32**-0.5, rel=0.01)
    assert wide.down.weight.std().item() == pytest.approx((6000 * 4) ** -0.5, rel=0.01)
    loss = next_token_loss(one(some_tokens()), some_tokens())
    loss.backward()
    assert all(p.grad is not None for p in one.parameters())


def test_what_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="activation is 'Tanh'; known are: ReLU, "):
        with_activation(small(), "Tanh")
    with pytest.raises(ValueError, match="MLPs are not the plain ones"):
        with_activation(varied("ReLU"), "GELU")
    for call in (mlp_parameters, activated_numbers, mlp_flops):
        with pytest.raises(ValueError, match="known are"):
            call(small().config, "Tanh", *([7] if call is not mlp_parameters else []))
    with pytest.raises(ValueError, match="hidden is 0"):
        plain_hidden(0)
    with pytest.raises(ValueError, match="positions is 0"):
        activated_numbers(small().config, "ReLU", 0)


# --- dropout ------------------------------------------------------------------------------------


def test_dropped_is_what_torch_drops():
    """By hand: the same random numbers give the same places, and the rest is divided by 1 - p."""
    model, tokens = with_dropout(small(), 0.4), some_tokens()
    whole = small().embedding(tokens)
    torch.manual_seed(7)
    found = model.train().embedding(tokens)
    torch.manual_seed(7)
    torch.testing.assert_close(found, nn.Dropout(0.4)(whole))
    zero = found == 0
    assert 0.25 < zero.double().mean() < 0.55
    torch.testing.assert_close(found[~zero], whole[~zero] / 0.6)


def test_only_training_drops_and_both_halves_of_a_block():
    model, plain, tokens = with_dropout(small(), 0.5), small(), some_tokens()
    assert torch.equal(model.eval()(tokens), plain(tokens))
    assert far(weights(model), weights(plain)) == 0
    seen = {}
    for name, module in model.named_modules():
        if name.endswith((".attention", ".mlp")):
            module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
    model.train()(tokens)
    assert len(seen) == 4
    assert all(0.3 < (out == 0).double().mean() < 0.7 for out in seen.values())
    assert torch.equal(plain.train()(tokens), small()(tokens))  # the model given drops nothing
    again = with_dropout(small(), 0).train()
    assert torch.equal(again(tokens), plain(tokens))


@pytest.mark.parametrize("share", [-0.1, 1, True, "0.5", float("nan")])
def test_impossible_shares_are_refused(share):
    with pytest.raises(ValueError, match=r"at least 0 and below 1"):
        with_dropout(small(), share)

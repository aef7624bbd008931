"""Grouped heads, low-rank factors and LoRA: against twins, singular values and merged layers."""

import pytest
import torch
from torch import nn

from companion.losses import next_token_loss
from companion.memory import unique_parameters
from companion.quantization import quantize
from companion.sharing import (
    LoRA,
    LowRank,
    average,
    factored,
    first,
    grouped_query,
    learned,
    lora,
    merged,
    saving_width,
    share,
    shared_layers,
    spread_heads,
    ties,
    truncated,
)
from companion.tests.test_model import small, some_tokens
from companion.tests.test_sharing_ties import four, gradients, state_of
from companion.training import adamw, load_checkpoint, save_checkpoint, train

# --- grouped-query attention --------------------------------------------------------------------


def full():
    return small(kv_heads=4)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_heads_are_pooled_by_group(kv_heads):
    model = full()
    new = grouped_query(model, kv_heads)
    assert new.config.kv_heads == kv_heads == new.blocks[0].attention.kv_heads
    for old, block in zip(model.blocks, new.blocks, strict=True):
        for part in ("key", "value"):
            heads = getattr(old.attention, part).weight.view(4, 8, 32)
            size = 4 // kv_heads
            means = [heads[g * size : (g + 1) * size].mean(0) for g in range(kv_heads)]
            found = getattr(block.attention, part)
            assert torch.allclose(found.weight, torch.cat(means), rtol=0, atol=1e-15)
            assert found.out_features == len(found.weight)
        assert torch.equal(block.attention.query.weight, old.attention.query.weight)
    ones = grouped_query(model, kv_heads, take=first).blocks[1].attention.value.weight
    picked = model.blocks[1].attention.value.weight.view(4, 8, 32)[:: 4 // kv_heads]
    assert torch.equal(ones, picked.flatten(0, 1))


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_grouped_heads_are_full_heads_that_share(kv_heads):
    """The same logits as with a copy for every query head, and the sum of the copies' gradients."""
    new, tokens = grouped_query(full(), kv_heads), some_tokens()
    twin = spread_heads(new)
    assert twin.config.kv_heads == 4
    assert torch.allclose(twin(tokens), new(tokens), rtol=0, atol=1e-12)
    ours, theirs = gradients(new, tokens), gradients(twin, tokens)
    for name, gradient in ours.items():
        other = theirs[name]
        if ".key." in name or ".value." in name:
            other = other.view(kv_heads, -1, 8, 32).sum(1).flatten(0, 1)
        assert (gradient - other).abs().max() < 1e-12
    back = grouped_query(twin, kv_heads)
    assert torch.allclose(back(tokens), new(tokens), rtol=0, atol=1e-12)


def test_grouping_keeps_shared_blocks_and_the_model_given():
    model = shared_layers(full(), 1)
    before = state_of(model)
    new = grouped_query(model, 2)
    assert new.blocks[0] is new.blocks[1] and new.blocks[0].attention.kv_heads == 2
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.config.kv_heads == 4
    spread = spread_heads(new)
    assert spread.blocks[0] is spread.blocks[1]
    assert torch.allclose(spread(some_tokens()), new(some_tokens()), rtol=0, atol=1e-12)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"4 key-value heads do not divide into 3 .* \[1, 2, 4\]"):
        share(full(), kv_heads=3)
    with pytest.raises(ValueError, match="4 key-value heads do not divide into 8"):
        share(full(), kv_heads=8)
    with pytest.raises(
        ValueError, match=r"blocks.0.attention.key is a LowRank; group heads before"
    ):
        share(share(full(), inner=4), kv_heads=2)


# --- low-rank factors ---------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [1, 5, 24])
def test_factors_are_the_nearest_of_their_inner_width(inner):
    """Error: root of the sum of squares of the singular values left out; no other try is nearer."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 24, dtype=torch.float64, generator=random)
    up, down = truncated(weight, inner)
    assert up.shape == (40, inner) and down.shape == (inner, 24)
    error = (weight - up @ down).norm().item()
    left = torch.linalg.svdvals(weight)[inner:].square().sum().sqrt().item()
    assert error == pytest.approx(left, abs=1e-12)
    assert up.norm().item() == pytest.approx(down.norm().item())
    for _ in range(20):  # the best for other rows to mix, by least squares
        rows = torch.randn(inner, 24, dtype=torch.float64, generator=random)
        near = rows + 20 * down if _ % 2 else rows
        mix = torch.linalg.lstsq(near.T, weight.T).solution.T
        assert (weight - mix @ near).norm().item() >= error - 1e-9
    for _ in range(20):  # and no small step from it leads nearer
        moved = (up + 1e-3 * torch.randn(up.shape, dtype=up.dtype, generator=random)) @ down
        assert (weight - moved).norm().item() >= error


def test_the_whole_inner_width_changes_nothing():
    model, tokens = small(), some_tokens()
    new = share(model, inner=8, where=lambda name, _: name.endswith("attention.key"))
    assert not torch.allclose(new(tokens), model(tokens), atol=1e-3)
    new = share(model, inner=16, where=lambda name, _: name.endswith("attention.key"))
    assert torch.allclose(new(tokens), model(tokens), rtol=0, atol=1e-12)
    assert isinstance(new.blocks[0].attention.key, LowRank)
    assert new.blocks[0].attention.key.inner == 16


@pytest.mark.parametrize(("outputs", "inputs"), [(32, 32), (48, 32), (10, 7), (1000, 3)])
def test_the_saving_width_is_the_last_that_saves(outputs, inputs):
    inner = saving_width(outputs, inputs)
    assert inner * (outputs + inputs) < outputs * inputs <= (inner + 1) * (outputs + inputs)


def test_sixteen_bits_keep_their_type():
    weight = torch.randn(12, 8).bfloat16()
    up, down = truncated(weight, 8)
    assert up.dtype == down.dtype == torch.bfloat16
    assert ((up.float() @ down.float()) - weight.float()).norm() < 0.01 * weight.float().norm()


def test_factors_of_a_shared_block_are_shared_and_can_be_quantized():
    new = share(four(), layers=2, inner=6)
    assert new.blocks[0].mlp.up is new.blocks[1].mlp.up
    codes = quantize(new.float(), 8)
    assert codes.blocks[0] is codes.blocks[1] and not isinstance(codes.blocks[0].mlp.up, nn.Linear)


def test_matrices_that_cannot_be_factored_are_refused():
    model = four()
    text = r"blocks.0.attention.key: inner width 17 is above 16, .* 16 x 32 .* up to 10"
    with pytest.raises(ValueError, match=text):
        share(model, inner=17)
    with pytest.raises(ValueError, match="inner width is 0"):
        share(model, inner=0)
    with pytest.raises(ValueError, match=r"inner width is 2\.5"):
        factored(model, 2.5)
    with pytest.raises(ValueError, match=r"head is a RMSNorm|norm is a RMSNorm"):
        factored(model, 2, where=lambda name, _: name == "norm")
    head = {"where": lambda name, _: name == "head"}
    assert isinstance(factored(model, 2, **head).head, LowRank)
    for change in (factored, lora):
        with pytest.raises(ValueError, match="embedding and head share a weight; leave both out"):
            change(small(), 2, **head)
    model.blocks[1].mlp.up = nn.Linear(32, 48)
    with pytest.raises(ValueError, match=r"blocks.1.mlp.up is a Linear; a linear layer without"):
        factored(model.double(), 2)


# --- LoRA ---------------------------------------------------------------------------------------


def test_it_starts_as_the_base_to_the_last_bit():
    for model in (small(), small().float()):
        new, tokens = lora(model, 4), some_tokens()
        assert torch.equal(new(tokens), model(tokens))
        layer = new.blocks[0].mlp.gate
        assert isinstance(layer, LoRA) and torch.equal(layer.base.weight, layer.weight())
        assert layer.down.weight.std().item() == pytest.approx(32**-0.5, rel=0.3)
        again, other = lora(model, 4), lora(model, 4, seed=1)
        for change, same in ((again, True), (other, False)):
            found = torch.equal(change.blocks[0].mlp.gate.down.weight, layer.down.weight)
            assert found == same


def test_only_its_own_parameters_learn(tmp_path):
    model, tokens = four(), some_tokens()
    new = lora(model, 4, scale=2.0)
    before, optimizer = state_of(new), adamw(new, 1e-2)
    loss = next_token_loss(new(tokens), tokens)
    loss.backward()
    own = {id(p) for p in learned(new)}
    assert {id(p) for p in new.parameters() if p.grad is not None} == own
    assert len(own) == 2 * 7 * 4
    train(new, [tokens] * 30, steps=30, optimizer=optimizer, progress=False)
    assert next_token_loss(new(tokens), tokens) < loss - 0.3
    held = sum(s["exp_avg"].numel() + s["exp_avg_sq"].numel() for s in optimizer.state.values())
    assert held == 2 * sum(p.numel() for p in learned(new)) < unique_parameters(model)
    for name, tensor in new.state_dict().items():
        mine = name.endswith((".down.weight", ".up.weight")) and ".base." not in name
        mine = mine and not name.endswith(("mlp.up.weight", "mlp.down.weight"))
        assert torch.equal(tensor, before[name]) != mine
    path = save_checkpoint(tmp_path / "lora", new, optimizer, step=30)
    back = lora(model, 4, scale=2.0)
    load_checkpoint(path, back, adamw(back, 1e-2))
    assert torch.equal(back(tokens), new(tokens))


def test_merged_is_the_same_model_in_plain_layers():
    model, tokens = four(), some_tokens()
    new = lora(model, 4, scale=0.7)
    train(new, [tokens] * 10, steps=10, optimizer=adamw(new, 1e-2), progress=False)
    one = merged(new)
    assert (one(tokens) - new(tokens)).abs().max() < 1e-12
    assert (one(tokens) - model(tokens)).abs().max() > 1e-3
    assert [*one.state_dict()] == [*model.state_dict()]
    assert all(p.requires_grad for p in one.parameters())
    assert isinstance(new.blocks[0].mlp.up, LoRA)  # the model given stays
    layer = new.blocks[1].mlp.down
    by_hand = layer.base.weight + 0.7 * layer.up.weight @ layer.down.weight
    assert torch.equal(one.blocks[1].mlp.down.weight, by_hand)


def test_on_shared_layers_the_addition_is_shared_too():
    new = lora(share(four(), layers=2), 3)
    assert new.blocks[0].mlp.up is new.blocks[1].mlp.up
    assert len(learned(new)) == 2 * 7 * 2
    both = merged(new)
    assert ties(both) == ties(share(four(), layers=2))


def test_what_cannot_be_added_is_refused():
    model = small()
    with pytest.raises(ValueError, match=r"inner width 17 is above 16, the smaller side of a 16 x"):
        lora(model, 17)
    with pytest.raises(ValueError, match=r"scale is 0; it must be a finite number above 0"):
        lora(model, 2, scale=0)
    with pytest.raises(ValueError, match=r"blocks.0.attention_norm is a RMSNorm"):
        lora(model, 2, where=lambda name, _: name.endswith("attention_norm"))
    with pytest.raises(ValueError, match=r"blocks.0.attention.query is a LoRA"):
        lora(lora(model, 2), 2, where=lambda name, _: name.endswith("query"))
    with pytest.raises(ValueError, match="no LoRA layer to merge"):
        merged(model)
    assert all(p.requires_grad for p in model.parameters())
    assert average([torch.ones(2), torch.zeros(2)]).tolist() == [0.5, 0.5]

"""Ties and shared layers: one tensor, the sum of gradients, and what survives a copy."""

import pytest
import torch
from torch import nn

from companion.decoding import cache_for, generate
from companion.losses import next_token_loss
from companion.memory import stored_bytes, unique_parameters
from companion.sharing import (
    average,
    cycle,
    distinct_layers,
    factored,
    first,
    repeat,
    share,
    shared_layers,
    tie,
    tied,
    ties,
    unshared,
)
from companion.surgery import copied
from companion.tests.test_model import small, some_tokens
from companion.training import adamw, train


def four(**changes):
    return small(**{"layers": 4, "tied": False} | changes)


def gradients(model, tokens):
    model.zero_grad()
    next_token_loss(model(tokens), tokens).backward()
    return {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


SHARINGS = {
    "tied": {"tied": True},
    "repeat": {"layers": 2},
    "cycle": {"layers": 2, "order": cycle},
    "one block, average": {"layers": 1, "take": average},
    "all": {"tied": True, "layers": 2, "order": cycle, "kv_heads": 1, "inner": 7},
}
every_sharing = pytest.mark.parametrize("name", SHARINGS)


@pytest.mark.parametrize("take", [first, average])
def test_a_tie_is_one_parameter_with_the_numbers_asked_for(take):
    model = four()
    before = state_of(model)
    new = tied(model, take=take)
    assert new.head.weight is new.embedding.weight and new.config.tied
    assert ties(new) == [("embedding.weight", "head.weight")] and ties(model) == []
    old = [before["embedding.weight"], before["head.weight"]]
    expected = old[0] if take is first else (old[0] + old[1]) / 2
    assert torch.equal(new.head.weight, expected)
    with torch.no_grad():  # an update of one is an update of the other
        new.embedding.weight[3, 5] = 7.0
    assert new.head.weight[3, 5] == 7.0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_equal_numbers_are_no_tie():
    model = four()
    with torch.no_grad():
        model.head.weight.copy_(model.embedding.weight)
    assert ties(model) == []
    train(model, [some_tokens()], steps=1, progress=False)
    assert not torch.equal(model.head.weight, model.embedding.weight)


@pytest.mark.parametrize(
    ("order", "expected"), [(repeat, [0, 0, 1, 1]), (cycle, [0, 1, 0, 1]), (None, [0, 0, 0, 0])]
)
def test_layers_use_the_blocks_of_their_order(order, expected):
    model = four()
    new = share(model, layers=max(expected) + 1, order=order or repeat)
    blocks = list(new.blocks)
    assert [blocks.index(block) for block in blocks] == [expected.index(g) for g in expected]
    assert distinct_layers(new) == max(expected) + 1 and distinct_layers(model) == 4
    for group in set(expected):
        own = model.blocks[expected.index(group)].state_dict()
        kept = blocks[expected.index(group)].state_dict()
        assert all(torch.equal(own[name], kept[name]) for name in own)
    assert new.config == model.config


def test_orders_of_more_layers():
    assert repeat(6, 3) == [0, 0, 1, 1, 2, 2] and cycle(6, 3) == [0, 1, 2, 0, 1, 2]
    assert repeat(6, 2) == [0, 0, 0, 1, 1, 1] and cycle(6, 2) == [0, 1, 0, 1, 0, 1]


def test_an_average_is_the_mean_of_its_group():
    model = four()
    blocks = share(model, layers=2, order=cycle, take=average).blocks
    for g, block in enumerate(blocks[:2]):
        for name, tensor in block.state_dict().items():
            one, other = (model.blocks[layer].state_dict()[name] for layer in (g, g + 2))
            assert torch.allclose(tensor, (one + other) / 2, rtol=0, atol=1e-15)


@every_sharing
def test_a_gradient_is_the_sum_over_the_uses(name):
    """Against the twin in which each use has a parameter of its own, in FP64."""
    new, tokens = share(four(), **SHARINGS[name]), some_tokens()
    twin = unshared(new)
    assert ties(twin) == [] and not twin.config.tied and distinct_layers(twin) == 4
    assert torch.equal(twin(tokens), new(tokens))
    ours, theirs = gradients(new, tokens), gradients(twin, tokens)
    groups = ties(new)
    assert groups
    for names in groups:
        parts = [theirs[each] for each in names]
        assert (ours[names[0]] - sum(parts)).abs().max() < 1e-12
        assert (ours[names[0]] - parts[0]).abs().max() > 1e-6  # one use alone is not it
    alone = ours.keys() - {each for names in groups for each in names}
    assert all((ours[each] - theirs[each]).abs().max() < 1e-12 for each in alone)


@every_sharing
def test_copies_and_conversions_keep_the_sharing(name):
    new = share(four(), **SHARINGS[name])
    for other in (copied(new), copied(new).float(), copied(new).to("cpu")):
        assert ties(other) == ties(new)
        assert unique_parameters(other) == unique_parameters(new)
    assert stored_bytes(copied(new)) == 8 * unique_parameters(new)
    shared = {id(p) for p in copied(new).parameters()} & {id(p) for p in new.parameters()}
    assert not shared


@every_sharing
def test_training_keeps_the_sharing_and_updates_each_parameter_once(name):
    new, tokens = share(four(), **SHARINGS[name]), some_tokens()
    groups, optimizer = ties(new), adamw(new)
    before = next_token_loss(new(tokens), tokens).item()
    train(new, [tokens] * 20, steps=20, optimizer=optimizer, progress=False)
    assert ties(new) == groups
    assert next_token_loss(new(tokens), tokens).item() < before - 0.5
    held = sum(s["exp_avg"].numel() for s in optimizer.state.values())
    assert held == unique_parameters(new)


@every_sharing
def test_decoding_with_a_cache_gives_the_same(name):
    """Each use of a shared layer has keys and values of its own."""
    new, tokens = share(four(), **SHARINGS[name]), some_tokens(1, 6)
    cache = cache_for(new)
    steps = [new(tokens[:, at : at + 1], cache) for at in range(6)]
    assert torch.allclose(torch.cat(steps, 1), new(tokens), rtol=0, atol=1e-12)
    assert generate(new, tokens, 3).shape[-1] >= 3


def test_any_matrices_of_one_shape_can_be_tied():
    names = ("blocks.0.attention.query.weight", "blocks.1.attention.out.weight")
    new = tie(four(), names)
    assert new.blocks[0].attention.query.weight is new.blocks[1].attention.out.weight
    assert ties(share(new, layers=4)) == [names]


def test_what_cannot_be_shared_is_refused():
    model = four()
    with pytest.raises(ValueError, match=r"nothing is to be shared; give tied, layers"):
        share(model)
    with pytest.raises(ValueError, match=r"4 layers do not divide into 3 groups; \[1, 2, 4\] do"):
        share(model, layers=3)
    with pytest.raises(ValueError, match=r"layers is 0; it must be a whole number"):
        share(model, layers=0)
    with pytest.raises(ValueError, match=r"'blocks.0.mlp' is no parameter"):
        tie(model, ("blocks.0.mlp", "head.weight"))
    with pytest.raises(ValueError, match="fewer than two"):
        tie(model, ("head.weight", "head.weight"))
    shapes = r"mlp.up.weight': \(48, 32\), 'blocks.0.mlp.down.weight': \(32, 48\)"
    with pytest.raises(ValueError, match=shapes):
        tie(model, ("blocks.0.mlp.up.weight", "blocks.0.mlp.down.weight"))
    again = share(model, layers=2)  # A A B B: a cycle of two would have both in both groups
    with pytest.raises(ValueError, match=r"of the layers \[0, 1\], two already are one block"):
        shared_layers(again, 2, order=cycle)


def test_layers_of_other_shapes_are_named():
    model = four()
    model.blocks[1].mlp.up = nn.Linear(32, 40, bias=False)
    text = r"blocks.0.mlp.up.weight is \(48, 32\) and blocks.1.mlp.up.weight is \(40, 32\)"
    with pytest.raises(ValueError, match=text):
        share(model, layers=2)
    mixed = factored(four(), 4, where=lambda name, _: name == "blocks.2.mlp.up")
    with pytest.raises(ValueError, match=r"and blocks.2.mlp.up.down.weight is \(4, 32\)"):
        share(mixed, layers=2, order=cycle)
    model.head = nn.Linear(32, 51, bias=False)
    with pytest.raises(ValueError, match=r"only equal shapes can be shared.*\(51, 32\)"):
        share(model, tied=True)


def test_an_average_of_untrained_blocks_starts_with_too_small_a_spread():
    model = four(width=64, hidden=256)
    spreads = [
        share(model, layers=1, take=take).blocks[0].mlp.up.weight.std().item()
        for take in (first, average)
    ]
    assert spreads[0] == pytest.approx(64**-0.5, rel=0.02)
    assert spreads[1] == pytest.approx(64**-0.5 / 2, rel=0.02)  # four blocks

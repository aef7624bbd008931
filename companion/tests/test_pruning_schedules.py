"""Zeros survive training that keeps them, and plans prune when they say."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from companion.losses import next_token_loss
from companion.pruning import (
    Round,
    gradual,
    iterative,
    keeping_zeros,
    one_shot,
    over_rows,
    prune,
    prune_and_train,
    total_sparsity,
)
from companion.surgery import chosen, copied, linears
from companion.tests.test_replacing import small, tokens, weights
from companion.training import adamw, constant, cosine, plain_step, train


def adam(model):
    return adamw(model, 1e-2)


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def trained(model, step, *, steps=20, optimizer=adam):
    new = copied(model)
    options = {"optimizer": optimizer(new), "step": step, "progress": False}
    train(new, [tokens()] * steps, steps=steps, **options)
    return new


@pytest.mark.parametrize("optimizer", [adam, momentum])
def test_zeros_stay_with_masks_and_grow_back_without(optimizer):
    thin = prune(small(), 0.5)
    plain = trained(thin, plain_step, optimizer=optimizer)
    kept = trained(thin, keeping_zeros(), optimizer=optimizer)
    assert total_sparsity(plain) < 0.01 and total_sparsity(kept) == 0.5
    for name, layer in chosen(thin, linears).items():
        now = kept.get_submodule(name).weight
        assert (now[layer.weight == 0] == 0).all()
        assert not torch.equal(now, layer.weight)
    assert next_token_loss(kept(tokens()), tokens()) < next_token_loss(thin(tokens()), tokens())


def test_keeping_zeros_trains_as_torchs_masks_do():
    """With masks in the forward pass no gradient reaches a zero, not even to be measured."""
    ours = trained(prune(small(), 0.7), keeping_zeros(), steps=8)
    slow = prune(small(), 0.7)
    for layer in chosen(slow, linears).values():
        torch_prune.custom_from_mask(layer, "weight", layer.weight != 0)
    options = {"optimizer": adam(slow), "progress": False}
    train(slow, [tokens()] * 8, steps=8, **options)
    for name, layer in chosen(slow, linears).items():
        torch_prune.remove(layer, "weight")
        now = ours.get_submodule(name).weight
        assert torch.allclose(now, layer.weight, rtol=1e-4, atol=1e-6)


def test_zeros_stay_though_the_optimizer_remembers():
    """A weight pruned in the middle of a training has momentum that would move it on."""
    model = small()
    optimizer = adamw(model, 1e-2)
    train(model, [tokens()] * 5, steps=5, optimizer=optimizer, progress=False)
    model.load_state_dict(prune(model, 0.5).state_dict())
    options = {"optimizer": optimizer, "progress": False}
    train(model, [tokens()] * 5, steps=5, step=keeping_zeros(), **options)
    assert total_sparsity(model) == 0.5


def test_one_step_function_serves_several_models():
    step, first, second = keeping_zeros(), prune(small(), 0.5), prune(small(), 0.3)
    assert total_sparsity(trained(first, step, steps=2)) == 0.5
    assert total_sparsity(trained(second, step, steps=2)) == pytest.approx(0.3, abs=1e-3)


def test_any_step_can_be_wrapped_and_frozen_layers_are_left_alone():
    thin = prune(small(), 0.5)
    thin.blocks[0].requires_grad_(False)
    calls = []

    def counted(model, optimizer, batch):
        calls.append(batch)
        return plain_step(model, optimizer, batch)

    assert total_sparsity(trained(thin, keeping_zeros(counted), steps=3)) == 0.5
    assert len(calls) == 3


def test_hooks_are_gone_even_after_an_error():
    thin = prune(small(), 0.5)

    def failing(model, optimizer, batch):
        raise RuntimeError("no step")

    for step in (failing, plain_step):
        with pytest.raises(RuntimeError) if step is failing else torch.enable_grad():
            keeping_zeros(step)(thin, adamw(thin), tokens())
    next_token_loss(thin(tokens()), tokens()).backward()
    weight = thin.blocks[0].mlp.up.weight
    assert (weight.grad[weight == 0] != 0).any()


def test_plans_are_what_their_formulas_say():
    assert one_shot(0.5, 100) == [Round(0.5, 100)]
    rounds = iterative(0.75, 10, rounds=4)
    assert [part.steps for part in rounds] == [2, 2, 3, 3]
    left = [1 - part.sparsity for part in rounds]
    assert left == pytest.approx([0.25 ** (k / 4) for k in (1, 2, 3, 4)])
    assert iterative(0.75, 10, rounds=1) == one_shot(0.75, 10)
    plan = gradual(0.8, 100, every=10, until=0.5)
    assert [part.steps for part in plan] == [10, 10, 10, 10, 60]
    expected = [0.8 * (1 - (1 - k / 5) ** 3) for k in range(1, 6)]
    assert [part.sparsity for part in plan] == pytest.approx(expected)
    assert plan[-1].sparsity == 0.8
    assert gradual(0.8, 5, every=10) == one_shot(0.8, 5)


@pytest.mark.parametrize(
    "plan", [one_shot(0.5, 12), iterative(0.5, 12, rounds=3), gradual(0.5, 12, every=2)]
)
def test_every_plan_ends_at_its_sparsity_after_its_steps(plan):
    model, asked, taken = small(), [], []
    before = weights(model)

    def pruner(now, share):
        asked.append(share)
        return prune(now, share, pattern=over_rows)

    def counted(now, optimizer, batch):
        taken.append(optimizer.param_groups[0]["lr"])
        return plain_step(now, optimizer, batch)

    new = prune_and_train(model, [tokens()] * 12, plan, pruner=pruner, rate=1e-2,
                          schedule=cosine(12, floor=0), step=counted, progress=False)  # fmt: skip
    assert asked == [part.sparsity for part in plan] and asked[-1] == 0.5
    expected = [1e-2 * cosine(12, floor=0)(index) for index in range(12)]
    assert taken == pytest.approx(expected)
    assert total_sparsity(new) == 0.5
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_one_shot_is_pruning_and_then_training():
    model = small()
    new = prune_and_train(model, [tokens()] * 4, one_shot(0.5, 4), rate=1e-2, progress=False)
    slow = trained(prune(model, 0.5), keeping_zeros(), steps=4)
    assert all(map(torch.equal, new.parameters(), slow.parameters()))


def test_the_optimizer_goes_on_from_round_to_round():
    """Two rounds of one sparsity are one: nothing starts anew between them."""
    model, text = small(), [tokens()] * 6
    options = {"rate": 1e-2, "progress": False, "schedule": constant}
    whole = prune_and_train(model, text, [Round(0.5, 6)], **options)
    parts = prune_and_train(model, text, [Round(0.5, 2), Round(0.5, 4)], **options)
    assert all(map(torch.equal, whole.parameters(), parts.parameters()))


def test_bad_plans_are_refused():
    with pytest.raises(ValueError, match="sparsity is 1; it must be at least 0 and below 1"):
        one_shot(1, 10)
    with pytest.raises(ValueError, match="sparsity is -1"):
        iterative(-1, 10)
    with pytest.raises(ValueError, match="steps is 0"):
        one_shot(0.5, 0)
    with pytest.raises(ValueError, match="rounds is 0"):
        iterative(0.5, 10, rounds=0)
    with pytest.raises(ValueError, match="3 steps do not make 4 rounds"):
        iterative(0.5, 3, rounds=4)
    with pytest.raises(ValueError, match="until is 0"):
        gradual(0.5, 10, until=0)
    with pytest.raises(ValueError, match="the plan has 0 rounds"):
        prune_and_train(small(), [tokens()], [], progress=False)
    with pytest.raises(ValueError, match="2 batches are too few for the 4 steps of the plan"):
        prune_and_train(small(), [tokens()] * 2, iterative(0.5, 4, rounds=2), progress=False)
    broken = small()
    with torch.no_grad():
        broken.blocks[0].mlp.up.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="1 of 1536 weights"):
        prune_and_train(broken, [tokens()], one_shot(0.5, 1), progress=False)


def test_pruning_is_no_technique_for_a_bare_layer():
    with pytest.raises(ValueError, match="no layer is chosen"):
        prune(nn.Linear(4, 4))

"""Scores are what they say, by the slow obvious version, and a refit is least squares."""

import pytest
import torch

from companion.calibration import observe
from companion.data import validation
from companion.losses import token_losses
from companion.pretrained import tiny, tiny_tokenizer
from companion.pruning import heads, layers, neurons
from companion.pruning.activity import neuron_activity
from companion.pruning.refitting import refitted
from companion.pruning.structured import block_losses, masked_twin
from companion.quality import judge
from companion.surgery import copied
from companion.tests.test_model import small, some_tokens

BATCHES = [some_tokens(3, 20), some_tokens(2, 7)]


def read_by(model, name, batches=BATCHES):
    """What one layer reads, the obvious way: (N, I)."""
    kept = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_hook(lambda _, args, out: kept.append(args[0].flatten(0, 1)))
    for batch in batches:
        model(batch)
    hook.remove()
    return torch.cat(kept).detach()


def test_moments_are_those_of_the_outputs():
    model = small()
    found = neuron_activity(model, iter(BATCHES))
    assert found.positions == 74 and found.mean.shape == (2, 48)
    for layer in range(2):
        x = read_by(model, f"blocks.{layer}.mlp.down")
        assert torch.allclose(found.mean[layer], x.mean(0))
        assert torch.allclose(found.variance[layer], x.var(0, correction=0))
        assert torch.allclose(neurons.norm(found)[layer], x.square().mean(0).sqrt())
    assert neurons.variance(found) is found.variance


def test_a_neuron_that_never_varies_has_no_variance_but_a_norm():
    model = small()
    down = model.blocks[0].mlp.down
    down.register_forward_pre_hook(
        lambda _, args: (args[0].index_fill(-1, torch.tensor([3]), 2.0),)
    )
    found = neuron_activity(model, BATCHES)
    assert found.variance[0, 3] < 1e-12 < found.variance[1, 3]
    assert found.mean[0, 3] == found.norm[0, 3] == 2


def test_magnitude_is_the_length_of_three_vectors():
    model = small()
    mlp = model.blocks[1].mlp
    all_three = torch.cat([mlp.gate.weight[5], mlp.up.weight[5], mlp.down.weight[:, 5]])
    assert torch.isclose(neurons.magnitude(model)[1, 5], all_three.norm())


def test_magnitude_of_a_group_takes_in_its_queries():
    model = small()
    of = model.blocks[0].attention
    rows, own = slice(16, 32), slice(8, 16)  # two query heads of 8 and their key-value head
    parts = [
        of.query.weight[rows],
        of.out.weight[:, rows],
        of.key.weight[own],
        of.value.weight[own],
    ]
    length = torch.cat([part.flatten() for part in parts]).norm()
    assert torch.isclose(heads.magnitude(model)[0, 1], length)


def test_what_a_group_wrote_is_its_part_of_the_out_projection():
    model = small()
    found = heads.written(model, observe(model, BATCHES))
    for layer in range(2):
        name = f"blocks.{layer}.attention.out"
        x, weight = read_by(model, name), model.get_submodule(name).weight
        wrote = [x[:, c] @ weight[:, c].T for c in (slice(0, 16), slice(16, 32))]
        slow = torch.stack([w.square().sum(1).mean().sqrt() for w in wrote])
        assert torch.allclose(found[layer], slow, rtol=1e-5)  # the products are in FP32


def slope(model, layer, columns, tokens, step=1e-5):
    """By finite differences: the change of a sequence's loss as inputs of a layer are scaled up."""
    losses = []
    for factor in (1 + step, 1 - step):
        scaled = copied(model)
        with torch.no_grad():
            scaled.get_submodule(layer).weight[:, columns] *= factor
            losses.append(token_losses(scaled(tokens), tokens).mean(1))
    return (losses[0] - losses[1]) / (2 * step)


def test_taylor_is_the_slope_of_the_loss():
    """Scaling a neuron's column scales its output: its slope is the sum of output x gradient."""
    model = small()
    found = neurons.taylor(model, BATCHES)
    for layer, k in ((0, 0), (0, 17), (1, 47)):
        each = torch.cat([slope(model, f"blocks.{layer}.mlp.down", k, b) for b in BATCHES])
        assert torch.isclose(found[layer, k], each.abs().mean(), rtol=1e-6)
    groups = heads.taylor(model, BATCHES)
    each = torch.cat([slope(model, "blocks.0.attention.out", slice(16, 32), b) for b in BATCHES])
    assert torch.isclose(groups[0, 1], each.abs().mean(), rtol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
def test_taylor_leaves_no_gradient(grad):
    model = small().requires_grad_(grad)
    with torch.no_grad():
        found = neurons.taylor(model, BATCHES)
    assert torch.equal(found, neurons.taylor(small(), BATCHES)) and not found.requires_grad
    assert all(p.grad is None and p.requires_grad == grad for p in model.parameters())


def test_influence_is_one_minus_the_cosine():
    model = small(layers=3)
    with torch.no_grad():
        for layer in (model.blocks[1].attention.out, model.blocks[1].mlp.down):
            layer.weight.zero_()
    found = layers.influence(model, BATCHES)
    before, after = read_by(model, "blocks.2"), read_by(model, "norm")
    cosines = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
    assert torch.isclose(found[2], 1 - cosines.mean())
    assert found.shape == (3,) and found[1].abs() < 1e-12 < found[0]


def test_random_scores_are_drawn_from_their_seed_alone():
    model, state = small(), torch.random.get_rng_state()
    for module, shape in ((neurons, (2, 48)), (heads, (2, 2))):
        one = module.at_random(model, 1)
        assert one.shape == shape and torch.equal(one, module.at_random(model, 1))
        assert not torch.equal(one, module.at_random(model, 2))
    assert torch.equal(state, torch.random.get_rng_state())


READERS = [neuron_activity, neurons.taylor, heads.taylor, layers.influence]


@pytest.mark.parametrize("reader", READERS)
def test_no_hook_is_left_and_bad_text_is_refused(reader):
    model = small()
    reader(model, BATCHES)
    with pytest.raises(ValueError, match="0 batches"):
        reader(model, [])
    with pytest.raises(ValueError, match="ids run from"):
        reader(model, [some_tokens(), some_tokens() + 60])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("reader", [neuron_activity, layers.influence])
def test_numbers_that_are_not_finite_are_refused(reader):
    broken = small()
    with torch.no_grad():
        broken.blocks[1].mlp_norm.weight[:] = torch.inf
    with pytest.raises(ValueError, match=r"block 1 are not finite"):
        reader(broken, BATCHES)


def regression(name="blocks.1.mlp.down"):
    """Real inputs (N, I) of a layer, its weight, and the columns that stay."""
    model = small()
    x = read_by(
        model, name, [torch.randint(50, (12, 32), generator=torch.Generator().manual_seed(2))]
    )
    return x, model.get_submodule(name).weight.detach(), torch.arange(0, 48, 2)


def test_a_refit_is_least_squares_on_what_the_whole_layer_wrote():
    x, weight, kept = regression()
    slow = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    found = refitted(weight, x.T @ x, kept, damping=1e-13)
    assert torch.allclose(found, slow, rtol=1e-8, atol=1e-9)

    def missed(columns):
        return (x[:, kept] @ columns.T - x @ weight.T).norm()

    assert missed(found) < missed(refitted(weight, x.T @ x, kept)) < 0.95 * missed(weight[:, kept])


def test_damping_is_ridge_regression_of_what_is_missing():
    x, weight, kept = regression()
    rest = torch.arange(1, 48, 2)
    strength = (0.5 * x[:, kept].square().sum(0)).sqrt().diag()  # rows that ask for no change
    rows = torch.cat([x[:, kept], strength])
    goal = torch.cat([x[:, rest] @ weight[:, rest].T, torch.zeros(24, 32).double()])
    slow = weight[:, kept] + torch.linalg.lstsq(rows, goal).solution.T
    assert torch.allclose(refitted(weight, x.T @ x, kept, damping=0.5), slow)
    assert torch.allclose(refitted(weight, x.T @ x, kept, damping=1e9), weight[:, kept])


def test_a_refit_needs_damping_where_inputs_are_few():
    x, weight, kept = regression()
    few = x[:10].T @ x[:10]  # 24 unknowns, 10 positions
    assert refitted(weight, few, kept).isfinite().all()
    assert torch.equal(refitted(weight, 0 * few, kept), weight[:, kept])  # nothing seen: as it was
    with pytest.raises(ValueError, match="singular at a damping of 1e-20"):
        refitted(weight, few, kept, damping=1e-20)
    with pytest.raises(ValueError, match="damping is 0"):
        refitted(weight, few, kept, damping=0)


def test_losses_block_by_block_are_those_of_twins():
    model = tiny()
    text = validation(tiny_tokenizer(), kind="source", characters=500)
    scores = neurons.magnitude(model)
    found = block_losses(model, text, (0.0, 0.5), scores)
    assert found[0.0] == [0.0] * 6 and len(found[0.5]) == 6
    twin = masked_twin(model, neurons=[0, 0, 0, 0, 0, 0.5], by=scores)
    both = judge(text, {"plain": model, "twin": twin})
    more = both["twin"].nats_per_token().estimate - both["plain"].nats_per_token().estimate
    assert found[0.5][5] == pytest.approx(more, abs=1e-6) and max(found[0.5]) > 0.01

"""`prune` puts zeros where its criterion says, as many as asked, in a new model."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from companion.calibration import observe
from companion.decoding import generate
from companion.losses import next_token_loss
from companion.memory import stored_bytes
from companion.pruning import (
    at_random,
    global_shares,
    in_blocks,
    in_groups,
    magnitude,
    masked,
    over_rows,
    prune,
    prune_below,
    sparsity_of,
    taylor,
    total_sparsity,
    wanda,
    weighted,
)
from companion.quantization import quantize, symmetric
from companion.surgery import chosen, copied, linears
from companion.tests.test_replacing import small, tokens, weights


def matrices(model, where=linears):
    return {name: layer.weight for name, layer in chosen(model, where).items()}


def untouched(model, before):
    return all(torch.equal(before[name], now) for name, now in model.state_dict().items())


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.77])
def test_magnitude_is_torchs_l1_unstructured(share):
    model, slow = small(), small()
    before, new = weights(model), prune(model, share)
    for name, layer in chosen(slow, linears).items():
        torch_prune.l1_unstructured(layer, "weight", amount=float(share))
        assert torch.equal(new.get_submodule(name).weight, layer.weight)
    assert untouched(model, before)
    for name, kept in {"embedding": new.embedding, "norm": new.norm}.items():
        assert torch.equal(kept.weight, model.get_submodule(name).weight)


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_global_is_torchs_global_unstructured(share):
    model, slow = small(), small()
    with torch.no_grad():
        for other in (model, slow):
            other.blocks[0].mlp.up.weight.mul_(3)  # so that it keeps more than its share
    layers = chosen(slow, linears)
    torch_prune.global_unstructured(
        [(layer, "weight") for layer in layers.values()], torch_prune.L1Unstructured, amount=share
    )
    shares = global_shares(model, share)
    new = prune(model, shares)
    for name, layer in layers.items():
        assert torch.equal(new.get_submodule(name).weight, layer.weight)
    assert shares["blocks.0.mlp.up"] < share
    assert set(global_shares(model, 0).values()) == {0}
    size = sum(layer.weight.numel() for layer in layers.values())
    assert total_sparsity(new) == round(share * size) / size


def test_global_shares_count_equal_scores_once():
    """All scores are alike: the first layers give all they have, and the sum is still right."""
    model = small()
    sizes = {name: weight.numel() for name, weight in matrices(model).items()}
    shares = global_shares(model, 0.01, scores=lambda name, weight: torch.ones_like(weight))
    gone = {name: round(share * sizes[name]) for name, share in shares.items()}
    assert (
        sum(gone.values()) == gone["blocks.0.attention.query"] == round(0.01 * sum(sizes.values()))
    )


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1 / 3])
@pytest.mark.parametrize("scores", [magnitude, at_random(3)])
def test_every_matrix_loses_the_share_rounded_to_the_nearest_number(share, scores):
    new = prune(small(), share, scores=scores)
    for weight in matrices(new).values():
        assert (weight == 0).sum() == round(share * weight.numel())


def test_chance_is_the_same_each_time_and_lower_sparsities_lie_within_higher():
    model = small()
    new = prune(model, 0.3, scores=at_random(1))
    same, more, other = (
        prune(model, share, scores=at_random(seed))
        for share, seed in ((0.3, 1), (0.6, 1), (0.3, 2))
    )
    name = "blocks.1.mlp.gate"
    new, same, more, other = (m.get_submodule(name).weight == 0 for m in (new, same, more, other))
    assert torch.equal(new, same) and not torch.equal(new, other)
    assert (more | ~new).all()
    parts = new.float().reshape(6, -1).mean(1)  # 256 weights each: 0.3 +- 0.03
    assert (parts - 0.3).abs().max() < 0.15
    key, value = (prune(model, 0.5, scores=at_random(1)).get_submodule(f"blocks.0.attention.{n}")
                  for n in ("key", "value"))  # fmt: skip
    assert not torch.equal(key.weight == 0, value.weight == 0)


@pytest.mark.parametrize("scores", [magnitude, at_random(0)])
def test_pruning_further_keeps_the_zeros_there_are(scores):
    once = prune(small(), 0.3, scores=at_random(5))
    twice = prune(once, 0.6, scores=scores)
    for first, second in zip(matrices(once).values(), matrices(twice).values(), strict=True):
        assert ((second == 0) | (first != 0)).all()
        assert (second == 0).sum() == round(0.6 * second.numel())


def test_wanda_is_magnitude_times_the_length_of_the_inputs():
    model, text = small(), tokens()
    read = {}
    layers = chosen(model, linears)
    hooks = [
        layer.register_forward_pre_hook(lambda _, x, name=name: read.update({name: x[0]}))
        for name, layer in layers.items()
    ]
    model(text)
    for hook in hooks:
        hook.remove()
    scores = wanda(observe(model, [text[:1], text[1:]]))
    new = prune(model, 0.5, scores=scores, pattern=over_rows)
    for name, layer in layers.items():
        lengths = read[name].flatten(0, 1).norm(dim=0)
        expected = layer.weight.abs() * lengths
        assert torch.allclose(scores(name, layer.weight), expected, rtol=1e-4)
        gone = expected.argsort(dim=1)[:, : layer.in_features // 2]
        slow = layer.weight.detach().clone().scatter_(1, gone, 0)
        assert torch.equal(new.get_submodule(name).weight, slow)


def test_taylor_is_weight_times_gradient():
    model, batches = small(), [tokens(), tokens().flip(1)]
    before = weights(model)
    scores = taylor(model, batches)
    assert untouched(model, before) and all(p.grad is None for p in model.parameters())
    slow = copied(model)
    (sum(next_token_loss(slow(batch), batch) for batch in batches) / 2).backward()
    for name, layer in chosen(slow, linears).items():
        expected = (layer.weight * layer.weight.grad).abs()
        assert torch.allclose(scores(name, layer.weight.detach()), expected, rtol=1e-4, atol=1e-9)


def test_taylor_foretells_what_one_weight_less_does_to_the_loss():
    model, text = small().double(), tokens()
    scores, layer = taylor(model, [text]), model.blocks[1].mlp.up
    foretold = scores("blocks.1.mlp.up", layer.weight.detach())[3, 5].item()
    before = next_token_loss(model(text), text).item()
    with torch.no_grad():
        layer.weight[3, 5] *= 0.999  # a thousandth of the way to 0
    change = abs(next_token_loss(model(text), text).item() - before)
    assert change == pytest.approx(foretold / 1000, rel=0.01)


def test_below_a_threshold_is_the_documents_rule():
    model = small()
    before = weights(model)
    new, all_of_it = prune_below(model, 0.1), prune_below(model, 0.1, where=weighted)
    for name, was in before.items():
        expected = was * (was.abs() >= 0.1)
        inside = name.startswith("blocks.") and was.ndim == 2
        assert torch.equal(new.state_dict()[name], expected if inside else was)
        assert torch.equal(all_of_it.state_dict()[name], expected)
    assert untouched(model, before)


def test_a_tied_head_is_pruned_only_when_chosen_and_stays_tied():
    model = small()
    new = prune(model, 0.5)
    assert new.head.weight is new.embedding.weight and (new.head.weight != 0).all()
    chosen_too = prune(model, 0.5, where=weighted)
    assert chosen_too.head.weight is chosen_too.embedding.weight
    assert (chosen_too.head.weight == 0).float().mean() == 0.5
    assert (chosen_too.norm.weight == 0).sum() == 16  # a vector is one row


def test_each_layer_can_have_a_share_of_its_own():
    new = prune(small(), {"blocks.0.mlp.up": 0.25, "blocks.1.mlp.down": 0.5})
    found = {name: share for name, share in sparsity_of(new).items() if share}
    assert found == {"blocks.0.mlp.up": 0.25, "blocks.1.mlp.down": 0.5}


@pytest.mark.parametrize("pattern", [over_rows, in_groups(4), in_blocks(4, 8)])
def test_a_pruned_model_is_one_like_any_other(pattern):
    model = small()
    new = prune(model, 0.5, pattern=pattern)
    assert total_sparsity(new) == 0.5
    assert stored_bytes(new) == stored_bytes(model)
    assert {type(m) for m in new.modules()} == {type(m) for m in model.modules()}
    prompt = tokens()[:1, :5]
    assert torch.equal(generate(new, prompt, 8), generate(new, prompt, 8, cached=False))


@pytest.mark.parametrize("options", [{}, {"mapping": symmetric}, {"group": 16}])
def test_zeros_stay_exact_at_eight_bits(options):
    thin = prune(small(), 0.5)
    both = quantize(thin, 8, **options)
    for name, weight in matrices(thin).items():
        now = both.get_submodule(name).matrix.expand()
        assert (now[weight == 0] == 0).all()


def test_sixteen_bits_are_scored_in_thirty_two_and_stay_sixteen():
    model = small().bfloat16()
    new = prune(model, 0.5)
    assert new.blocks[0].mlp.up.weight.dtype == torch.bfloat16
    assert total_sparsity(new) == 0.5  # many magnitudes are equal there; still half of them


def test_masks_are_applied_as_given():
    model = small()
    kept = torch.rand(48, 32) > 0.3
    new = masked(model, {"blocks.0.mlp.up": kept})
    assert torch.equal(new.blocks[0].mlp.up.weight, model.blocks[0].mlp.up.weight * kept)
    with pytest.raises(ValueError, match=r"mask of blocks\.0\.mlp\.up is \(32, 48\) of torch.bool"):
        masked(model, {"blocks.0.mlp.up": kept.T})
    with pytest.raises(ValueError, match=r"'blocks\.9\.mlp\.up' is no layer"):
        masked(model, {"blocks.9.mlp.up": kept})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0; it must be at least 0 and below 1"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"sparsity": "half"}, "sparsity is 'half'"),
        ({"sparsity": {"blocks.0.mlp.up": 2}}, r"sparsity of blocks\.0\.mlp\.up is 2"),
        ({"sparsity": {"blocks.9.mlp.up": 0.5}}, "'blocks.9.mlp.up' is no layer"),
        ({"sparsity": {"head": 0.5}}, "'head' is no layer that `where` chooses"),
        (
            {"pattern": in_groups(6)},
            r"blocks\.0\.attention\.query: groups of 6 do not divide the 32",
        ),
        ({"pattern": in_blocks(7, 4)}, "blocks of 7 x 4 do not divide a matrix of 32 x 32"),
        ({"scores": wanda({})}, "no inputs of blocks.0.attention.query were observed"),
        (
            {"scores": lambda n, w: w[0]},
            r"scores \(32,\) of blocks\.0\.attention\.query do not fit",
        ),
        ({"scores": lambda n, w: w / 0}, "scores are not finite"),
        ({"where": lambda n, m: False}, "no layer is chosen"),
        ({"where": lambda n, m: n == "blocks.0"}, "blocks.0 has no weight of its own"),
    ],
)
def test_bad_options_are_refused_and_the_model_stays(options, message):
    model = small()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        prune(model, **options)
    assert untouched(model, before)


def test_bad_models_and_thresholds_are_refused():
    with pytest.raises(ValueError, match="no layer is chosen; a quantized model has none"):
        prune(quantize(small()))
    broken = small()
    with torch.no_grad():
        broken.blocks[1].mlp.up.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 1536 weights of blocks\.1\.mlp\.up are not finite"):
        prune(broken)
    with pytest.raises(ValueError, match=r"1 of 1536 weights of blocks\.1\.mlp\.up are not finite"):
        prune_below(broken, 0.1)
    with pytest.raises(ValueError, match="threshold is -1"):
        prune_below(small(), -1)
    with pytest.raises(ValueError, match="inputs of 64 numbers were observed"):
        prune(small(), scores=wanda(observe(small(width=64), [tokens()])))
    with pytest.raises(ValueError, match="there are 0 batches of tokens"):
        taylor(small(), [])
    with pytest.raises(ValueError, match=r"no gradient of blocks\.0\.attention\.query was taken"):
        prune(small(), scores=taylor(small(), [tokens()], where=lambda n, m: n.endswith("mlp.up")))
    lopsided = small()
    with torch.no_grad():
        lopsided.blocks[0].attention.key.weight.mul_(1e-6)
    with pytest.raises(ValueError, match=r"'blocks\.0\.attention\.key'\] would keep no weight"):
        global_shares(lopsided, 0.5)
    with pytest.raises(ValueError, match="seed is -1"):
        at_random(-1)


def test_torch_leaves_a_mask_and_the_original_where_this_leaves_a_matrix():
    layer = nn.Linear(32, 48, bias=False)
    plain = stored_bytes(layer)
    torch_prune.l1_unstructured(layer, "weight", amount=0.5)
    assert stored_bytes(layer) == 2 * plain
    torch_prune.remove(layer, "weight")
    assert stored_bytes(layer) == plain

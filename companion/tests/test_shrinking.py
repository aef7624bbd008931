"""Really smaller models: equal to the same choice made with zeros, and as large as they say."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from companion import cost
from companion.calibration import observe
from companion.catalogue import MODELS
from companion.decoding import TokenByToken, cache_for, generate
from companion.measurement import decode_bytes
from companion.memory import stored_bytes, unique_parameters
from companion.model import ModelConfig
from companion.pretrained import tiny
from companion.pruning import heads, neurons
from companion.pruning.config import ThinConfig, with_groups
from companion.pruning.structured import masked_twin, shrink
from companion.quantization import quantize
from companion.studies import structure
from companion.surgery import copied
from companion.tests.test_model import SMALL, small, some_tokens
from companion.training import train


def scores_of(model, kind):
    return {
        "neurons": neurons.at_random(model, 1),
        "heads": heads.at_random(model, 1),
        "layers": torch.arange(model.config.layers) * 1.0,
    }[kind]


CHANGES = {
    "neurons": {"neurons": 0.5},
    "heads": {"heads": 1},
    "share of heads": {"heads": 0.5},
    "layers": {"layers": 1},
    "last layer": {"layers": [1]},
    "all": {"neurons": 0.25, "heads": 1, "layers": 1},
}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def both(model, change, **options):
    """The smaller model, and its twin with zeros."""
    by = {kind: scores_of(model, kind) for kind in change}
    return (make(model, **change, by=by, **options) for make in (shrink, masked_twin))


def apart(one, other):
    """Largest difference of two tensors, as a share of the largest number."""
    return ((one - other).abs().max() / other.abs().max()).item()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model, before):
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in after)


@every_change
def test_smaller_and_masked_write_the_same_logits(change):
    model, tokens = small(layers=3), some_tokens()
    before, whole = state(model), model(tokens)
    little, masked = both(model, change)
    assert apart(little(tokens), masked(tokens)) < 1e-12
    assert apart(little(tokens), whole) > 1e-3  # something is gone
    assert same_state(model, before) and torch.equal(model(tokens), whole)


@every_change
def test_one_token_at_a_time_too(change):
    model, tokens = small(), some_tokens()
    little, masked = both(model, change)
    found = TokenByToken(little)(tokens)
    assert apart(found, TokenByToken(masked)(tokens)) < 1e-12
    assert apart(found, little(tokens)) < 1e-12
    prompt = tokens[:1, :4]
    assert torch.equal(generate(little, prompt, 6), generate(masked, prompt, 6, cached=False))


@every_change
@torch.inference_mode()
def test_in_single_precision_to_1e_5(change):
    model = tiny()
    tokens = torch.randint(1024, (2, 64), generator=torch.Generator().manual_seed(0))
    little, masked = both(model, change)
    assert apart(little(tokens), masked(tokens)) < 1e-5


@every_change
def test_the_config_tells_the_truth(change):
    model = small(layers=3).float()
    little, masked = both(model, change)
    assert unique_parameters(little) == cost.parameters(little.config)
    assert stored_bytes(little) == cost.weight_bytes(little.config) < stored_bytes(model)
    assert stored_bytes(masked) == stored_bytes(model) and masked.config == model.config
    past = cost.cache_bytes(little.config, 7)
    assert decode_bytes(little, 7) == stored_bytes(little) + past
    assert cache_for(little, capacity=7).bytes == past


def test_sizes_are_those_asked_for():
    model = small(layers=3)
    by = {kind: scores_of(model, kind) for kind in ("neurons", "heads", "layers")}
    new = shrink(model, neurons=0.75, heads=1, layers=1, by=by)
    assert (new.config.hidden, new.config.kv_heads, new.config.heads) == (12, 1, 2)
    assert new.config.layers == len(new.blocks) == 2 and new.config.head_width == 8
    assert tuple(new.blocks[0].attention.query.weight.shape) == (16, 32)
    assert new.blocks[0].attention.out.in_features == 16
    assert shrink(model, neurons=1 / 3, by=by).config.hidden == 32


def test_the_lowest_scores_go_neuron_by_neuron():
    """The slow obvious version: sort, and put zeros by hand."""
    model, tokens = small(), some_tokens()
    scores = neurons.at_random(model, 3)
    slow = copied(model)
    with torch.no_grad():
        for block, row in zip(slow.blocks, scores.tolist(), strict=True):
            for k in sorted(range(48), key=row.__getitem__)[:12]:
                block.mlp.down.weight[:, k] = 0
    assert apart(shrink(model, neurons=0.25, by=scores)(tokens), slow(tokens)) < 1e-12


def test_a_group_goes_with_all_its_query_heads():
    model, tokens = small(), some_tokens()
    scores = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # group 0 of block 0, group 1 of block 1
    slow = copied(model)
    gone = (slice(0, 16), slice(16, 32))  # two query heads of 8 numbers each
    for block, columns in zip(slow.blocks, gone, strict=True):
        block.attention.out.register_forward_pre_hook(lambda _, args, c=columns: zeroed(args[0], c))
    assert apart(shrink(model, heads=1, by=scores)(tokens), slow(tokens)) < 1e-12


def zeroed(x, columns):
    x = x.clone()
    x[..., columns] = 0
    return (x,)


def test_the_blocks_that_stay_are_read_in_order():
    model, tokens = small(layers=4), some_tokens()
    new = shrink(model, layers=2, by=torch.tensor([3.0, 1.0, 2.0, 1.0]))
    slow = copied(model)
    slow.blocks = nn.ModuleList([slow.blocks[0], slow.blocks[2]])
    assert torch.equal(new(tokens), slow(tokens))
    for same in ({"layers": (3, 1)}, {"layers": 0.5, "by": torch.tensor([3.0, 1.0, 2.0, 1.0])}):
        assert torch.equal(shrink(model, **same)(tokens), slow(tokens))


def test_each_block_of_the_twin_may_have_a_share_of_its_own():
    model, tokens = small(), some_tokens()
    scores = neurons.at_random(model, 1)
    uneven = masked_twin(model, neurons=[0.0, 0.5], by=scores)
    alone = masked_twin(model, neurons=0.5, by=scores)
    assert same_state(uneven.blocks[0], state(model.blocks[0]))
    assert same_state(uneven.blocks[1], state(alone.blocks[1]))
    assert apart(uneven(tokens), alone(tokens)) > 1e-3


def test_nothing_removed_is_a_copy():
    model, tokens = small(), some_tokens()
    scores = neurons.at_random(model, 0)
    for new in (shrink(model), shrink(model, heads=0, layers=[]), shrink(model, by=scores)):
        assert new is not model and same_state(new, state(model))
        assert torch.equal(new(tokens), model(tokens)) and new.config == model.config


def test_what_was_tied_or_frozen_stays_so():
    model = small().train()
    model.blocks[0].mlp.up.requires_grad_(False)
    new = shrink(model, neurons=0.5, by=scores_of(model, "neurons"))
    assert new.head.weight is new.embedding.weight and not new.training and model.training
    assert not new.blocks[0].mlp.up.weight.requires_grad
    assert new.blocks[0].mlp.gate.weight.requires_grad
    assert shrink(model.bfloat16(), layers=[0]).norm.weight.dtype == torch.bfloat16


def test_a_smaller_model_can_be_trained_and_quantized():
    model = small().float()
    little, _ = both(model, CHANGES["all"])
    losses = train(little, [some_tokens()] * 20, steps=20, progress=False)
    assert losses[-1] < losses[0] - 0.5
    rounded = quantize(little, 8)
    assert apart(rounded(some_tokens()), little(some_tokens())) < 0.05
    assert stored_bytes(rounded) < stored_bytes(little) / 2


def test_it_can_be_made_smaller_again():
    model, tokens = small(kv_heads=4), some_tokens()
    by = torch.arange(4.0).expand(2, 4)
    once = shrink(shrink(model, heads=1, by=by), heads=1, by=by[:, 1:])
    assert apart(once(tokens), shrink(model, heads=2, by=by)(tokens)) == 0
    assert once.config == shrink(model, heads=2, by=by).config


def test_refitted_twins_are_equal_and_nearer_to_the_whole_model():
    model, tokens = small(), some_tokens(8, 20)
    inputs, whole = observe(model, [tokens]), model(tokens)
    for change in (CHANGES["neurons"], CHANGES["heads"]):
        little, masked = both(model, change, refit=inputs)
        assert apart(little(tokens), masked(tokens)) < 1e-12
        plain, _ = both(model, change)
        assert (little(tokens) - whole).norm() < 0.9 * (plain(tokens) - whole).norm()


@pytest.mark.parametrize(("count", "share"), structure.DEPTHS.items())
def test_the_study_compares_depth_and_width_at_equal_bytes(count, share):
    whole = MODELS["SmolLM2-135M"]
    shallow = replace(whole, layers=whole.layers - count)
    narrow = replace(whole, hidden=whole.hidden - round(share * whole.hidden))
    assert cost.parameters(narrow) == pytest.approx(cost.parameters(shallow), rel=1e-3)


S = torch.zeros(2, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neurons": 1.0, "by": S}, "neurons is 1.0; a share from 0 to below 1"),
        ({"neurons": 1, "by": S}, "neurons is 1; a share"),
        ({"neurons": -0.1, "by": S}, "neurons is -0.1"),
        ({"neurons": float("nan"), "by": S}, "neurons is nan"),
        ({"neurons": 0.999, "by": S}, "all 48 would go"),
        ({"neurons": [0.5, 0.5], "by": S}, r"neurons is \[0.5, 0.5\]"),
        ({"neurons": 0.5}, "which .'neurons'. should go"),
        ({"neurons": 0.5, "by": S[:1]}, r"scores of neurons are \(1, 48\); a tensor of \(2, 48\)"),
        ({"neurons": 0.5, "by": S / 0}, "96 of 96 scores of neurons are not finite"),
        ({"neurons": 0.5, "by": {"neurons": 3}}, "scores of neurons are int"),
        ({"neurons": 0.5, "heads": 1, "by": S}, "one tensor of scores is given, for neurons and h"),
        ({"heads": 2, "by": S[:, :2]}, "heads is 2; of 2, 0 to 1 can go"),
        ({"heads": 0.9, "by": S[:, :2]}, "all 2 would go"),
        ({"heads": -1, "by": S[:, :2]}, "heads is -1"),
        ({"heads": True, "by": S[:, :2]}, "heads is True"),
        ({"heads": 1, "by": S}, r"a tensor of \(2, 2\) is needed"),
        ({"layers": 2, "by": S[:, 0]}, "layers is 2; of 2, 0 to 1 can go"),
        ({"layers": [0, 1]}, "all 2 layers would go"),
        ({"layers": 1}, "which .'layers'. should go"),
        ({"layers": [2]}, "indices from 0 to 1"),
        ({"layers": [-1]}, "indices from 0 to 1"),
        ({"layers": [0, 0]}, "an index is there twice"),
        ({"layers": [0], "by": {"rows": S}}, "kind is 'rows'; known are: neurons, heads, layers"),
        ({"neurons": 0.5, "by": S, "refit": {}}, r"no inputs of blocks\.0\.mlp\.down were observ"),
    ],
)
def test_bad_options_are_refused_and_the_model_stays(options, message):
    model = small()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        shrink(model, **options)
    assert same_state(model, before)


def test_bad_models_are_refused():
    with pytest.raises(ValueError, match=r"0\.mlp\.gate is a QuantizedLinear; a plain lin"):
        shrink(quantize(small().float()), neurons=0.5, by=S)
    for change in CHANGES.values():
        broken = small()
        with torch.no_grad():
            for part in (broken.blocks[1].mlp.up, broken.blocks[1].attention.key):
                part.weight[0, 0] = torch.inf
        with pytest.raises(ValueError, match=r"weights of blocks\.1\..* are not finite"):
            list(both(broken, change))


def test_heads_that_do_not_fill_the_width():
    thin = with_groups(SMALL, 1)
    assert thin == ThinConfig(**vars(SMALL) | {"heads": 2, "kv_heads": 1}, head_size=8)
    assert with_groups(thin, 1) == thin and thin.head_width == 8
    back = with_groups(replace(thin, width=16), 1)  # two heads of 8 fill a width of 16
    assert type(back) is ModelConfig and back.head_width == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_size": 7}, "head width 7 is odd"),
        ({"head_size": 0}, "head_size is 0"),
        ({"heads": 3, "kv_heads": 2}, "3 query heads do not divide over 2"),
        ({"heads": 0}, "heads is 0"),
        ({"width": 0}, "width is 0"),
        ({"layers": 0}, "layers is 0"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0"),
    ],
)
def test_impossible_thin_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ThinConfig(**vars(SMALL) | {"head_size": 8} | change)

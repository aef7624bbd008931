"""The rewritten model: the loss and gradients of the plain one, and the same training."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from companion.decoding import generate
from companion.faster_training import (
    PARTS,
    as_parts,
    faster,
    faster_step,
    fused_adamw,
    separated,
)
from companion.losses import next_token_loss
from companion.memory import unique_parameters
from companion.sliced_attention import sliced_attention
from companion.tests.equalities import far, gradients, weights
from companion.tests.test_model import small, some_tokens
from companion.training import adamw, plain_step, train


def both(model, parts=PARTS, tokens=None):
    """Loss and gradients of a model and of its rewritten copy, by the plain names."""
    tokens = some_tokens(3, 17) if tokens is None else tokens
    fast, found = faster(model, parts), []
    for one in (model, fast):
        loss = next_token_loss(one(tokens), tokens)
        loss.backward()
        found.append((loss.item(), gradients(one)))
    (loss, plain), (other, joined) = found
    return abs(loss - other), far(plain, as_parts(fast, joined))


@pytest.mark.parametrize("parts", [(), *((part,) for part in PARTS), PARTS])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_plain_model(parts, tied):
    assert max(both(small(tied=tied), parts)) < 1e-12


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_any_grouping_of_heads(kv_heads):
    assert max(both(small(kv_heads=kv_heads))) < 1e-12


@pytest.mark.parametrize("time", [2, 31, 32])
def test_any_length(time):
    assert max(both(small(), tokens=some_tokens(2, time))) < 1e-12


def test_in_fp32_too():
    loss, gradient = both(small().float())
    assert 0 <= loss < 1e-5 and gradient < 1e-5


def test_the_model_given_is_not_changed_and_comes_back():
    model = small()
    before = weights(model)
    fast = faster(model)
    assert unique_parameters(fast) == unique_parameters(model)
    assert fast.head.weight is fast.embedding.weight
    train(fast, [some_tokens()] * 3, steps=3, progress=False)
    assert far(before, weights(model)) == 0
    assert far(weights(separated(faster(model))), before) == 0
    back = separated(fast)
    tokens = some_tokens()
    assert type(back) is type(model) and far(weights(back), before) > 1e-3
    back.cos, back.sin = model.cos, model.sin  # FP64 angles, as `small` has
    assert (back(tokens) - fast(tokens)).abs().max() < 1e-12


def test_the_same_training():
    """Clipping and AdamW see the same numbers, joined or not; so do the last position's logits."""
    batches = [some_tokens(4, 17)] * 6
    ends = []
    for model, make, step in (
        (small(), adamw, plain_step),
        (faster(small()), fused_adamw, faster_step),
    ):
        losses = train(
            model, batches, steps=6, optimizer=make(model, 1e-2), step=step, progress=False
        )
        fast = step is faster_step
        ends.append((losses, as_parts(model, weights(model)) if fast else weights(model)))
    assert max(abs(a - b) for a, b in zip(ends[0][0], ends[1][0], strict=True)) < 1e-10
    assert far(ends[0][1], ends[1][1]) < 1e-10 and ends[0][0][-1] < ends[0][0][0] - 0.5


def test_fused_adamw_decays_what_adamw_decays():
    model = small()
    ours, plain = fused_adamw(model, 0.5, decay=0.3), adamw(model, 0.5, decay=0.3)
    for one, other in zip(ours.param_groups, plain.param_groups, strict=True):
        assert all(a is b for a, b in zip(one["params"], other["params"], strict=True))
        assert [one[k] for k in ("lr", "betas", "eps", "weight_decay")] == [
            other[k] for k in ("lr", "betas", "eps", "weight_decay")
        ]
    assert ours.defaults["fused"] is True


def test_it_decodes_with_a_cache():
    model = small()
    prompt = some_tokens(1, 5)
    assert torch.equal(generate(faster(model), prompt, 9), generate(model, prompt, 9))


# --- attention in slices ------------------------------------------------------------------------


def some_heads(batch=2, time=13, heads=4, kv_heads=2, width=6):
    random = torch.Generator().manual_seed(4)
    options = {"generator": random, "dtype": torch.float64, "requires_grad": True}
    return [
        torch.randn(batch, time, count, width, **options) for count in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("rows", [1, 4, 13, 64])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_slices_give_what_torch_gives(rows, kv_heads):
    heads = some_heads(kv_heads=kv_heads)
    query, key, value = (x.transpose(1, 2) for x in heads)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    expected = expected.transpose(1, 2)
    found = sliced_attention(*heads, rows=rows)
    assert (found - expected).abs().max() < 1e-12
    grad = torch.randn(found.shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(x, heads, grad) for x in (found, expected))
    assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) < 1e-12


def test_what_does_not_fit_is_refused():
    query, key, value = some_heads()
    for args, match in (
        ((query, key[:1], value[:1]), "do not fit"),
        ((query, key, value[:, :5]), "do not fit"),
        ((query[0], key, value), "do not fit"),
        ((query[:, :, :3], key, value), "3 query heads do not divide over 2"),
    ):
        with pytest.raises(ValueError, match=match):
            sliced_attention(*args)
    with pytest.raises(ValueError, match="rows is 0"):
        sliced_attention(query, key, value, rows=0)
    with pytest.raises(ValueError, match="part is 'speed'; known are: norms"):
        faster(small(), ("speed",))
    with pytest.raises(ValueError, match="block 0 is not a plain Block"):
        faster(faster(small()))
    with pytest.raises(ValueError, match="not one that `faster` made"):
        separated(small())
    with pytest.raises(ValueError, match="rate is 0"):
        fused_adamw(small(), 0)

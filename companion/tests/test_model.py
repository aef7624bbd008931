"""The decoder against a version written out with loops, and its refusals."""

import math
from dataclasses import replace

import pytest
import torch

from companion.decoding import cache_for
from companion.model import LanguageModel, ModelConfig, RMSNorm, rotary_angles, rotate

SMALL = ModelConfig(vocab=50, context=32, layers=2, heads=4, kv_heads=2, width=32, hidden=48)


def small(**changes) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(replace(SMALL, **changes)).double()
    model.cos, model.sin = (t.double() for t in rotary_angles(model.config))
    return model


def some_tokens(batch=2, time=9):
    return torch.randint(50, (batch, time), generator=torch.Generator().manual_seed(1))


def slow_attention(attention, x, cos, sin):
    """One sequence, one head and one position at a time, positions by complex rotation."""
    time, width = x.shape
    heads, kv_heads, head_width = attention.heads, attention.kv_heads, width // attention.heads
    half = head_width // 2

    def turned(vector, position):
        pairs = torch.complex(vector[:half], vector[half:])
        pairs = pairs * torch.complex(cos[position, :half], sin[position, :half])
        return torch.cat([pairs.real, pairs.imag])

    query, key, value = attention.query(x), attention.key(x), attention.value(x)
    rows = []
    for t in range(time):
        row = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            here = slice(head * head_width, (head + 1) * head_width)
            there = slice(group * head_width, (group + 1) * head_width)
            q = turned(query[t, here], t)
            scores = [q @ turned(key[s, there], s) / math.sqrt(head_width) for s in range(t + 1)]
            weights = torch.stack(scores).softmax(0)
            row.append(sum(w * value[s, there] for s, w in enumerate(weights)))
        rows.append(torch.cat(row))
    return attention.out(torch.stack(rows))


def slow_forward(model, tokens):
    def norm(layer, x):
        return x / (x.square().mean(-1, keepdim=True) + layer.epsilon).sqrt() * layer.weight

    x = model.embedding(tokens)
    for block in model.blocks:
        normed = norm(block.attention_norm, x)
        x = x + slow_attention(block.attention, normed, model.cos, model.sin)
        mlp, normed = block.mlp, norm(block.mlp_norm, x)
        gate = mlp.gate(normed)
        x = x + mlp.down(gate * torch.sigmoid(gate) * mlp.up(normed))
    return norm(model.norm, x) @ model.head.weight.T


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_forward_is_the_model_written_out(kv_heads, tied):
    model, tokens = small(kv_heads=kv_heads, tied=tied), some_tokens()
    expected = torch.stack([slow_forward(model, row) for row in tokens])
    torch.testing.assert_close(model(tokens), expected, rtol=1e-12, atol=1e-12)


def test_angles_are_the_formula_rounded_once():
    cos, sin = rotary_angles(SMALL)
    for position in (0, 1, 31):
        for pair in range(4):
            angle = position / SMALL.rotary_base ** (2 * pair / 8)
            for place in (pair, pair + 4):
                assert cos[position, place].item() == pytest.approx(math.cos(angle), abs=6e-8)
                assert sin[position, place].item() == pytest.approx(math.sin(angle), abs=6e-8)


def test_rotary_scores_depend_on_the_distance_alone():
    cos, sin = (t.double() for t in rotary_angles(SMALL))
    q, k = torch.randn(2, 8, dtype=torch.float64)
    scores = [rotate(q, cos[p + 3], sin[p + 3]) @ rotate(k, cos[p], sin[p]) for p in range(20)]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(20), rtol=0, atol=1e-6)


def test_norm_equals_torch():
    norm = RMSNorm(16, 1e-5)
    x = torch.randn(3, 16)
    torch.testing.assert_close(norm(x), torch.nn.RMSNorm(16, eps=1e-5)(x), rtol=0, atol=0)


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 5], [1, 7, 1], [3, 1, 5]])
def test_a_cache_changes_nothing(pieces):
    model, tokens = small(), some_tokens()
    cache = cache_for(model, batch=2, capacity=9)
    parts = [model(part, cache) for part in tokens.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=0, atol=1e-12)
    assert cache.length == 9


def test_later_tokens_do_not_touch_earlier_logits():
    model, tokens = small(), some_tokens()
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 50
    torch.testing.assert_close(model(tokens)[:, :5], model(other)[:, :5], rtol=0, atol=0)


def test_a_tied_head_is_the_embedding():
    tied, untied = small(), small(tied=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight


def test_first_losses_are_those_of_guessing():
    model, tokens = small(width=256, heads=4, hidden=700), some_tokens(8, 32)
    logits = model(tokens)
    assert logits.std().item() == pytest.approx(1, rel=0.1)  # every sum keeps its size
    losses = -logits.log_softmax(-1)
    assert losses.mean().item() == pytest.approx(math.log(50) + 0.5, abs=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"vocab": -1}, "vocab is -1"),
        ({"width": 32.0}, "width is 32.0"),
        ({"heads": True}, "heads is True"),
        ({"heads": 5}, "width 32 .* heads 5"),
        ({"kv_heads": 3}, "4 query heads .* 3"),
        ({"width": 36, "heads": 4}, "head width 9 is odd"),
        ({"rotary_base": math.nan}, "rotary_base is nan"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0"),
        ({"tied": 1}, "tied is 1"),
    ],
)
def test_impossible_shapes_name_the_value(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"\(3,\)"),
        (torch.zeros(1, 0, dtype=torch.int64), r"\(1, 0\)"),
        (torch.zeros(1, 3), "float32"),
        (torch.zeros(1, 33, dtype=torch.int64), "33 positions exceed the context of 32"),
        (torch.tensor([[0, 50]]), "0 to 50, not 0 to 49"),
        (torch.tensor([[-1, 4]]), "-1 to 4"),
    ],
)
def test_bad_tokens_name_the_value(tokens, message):
    with pytest.raises(ValueError, match=message):
        small()(tokens)

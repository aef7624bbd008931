"""Cached decoding says what uncached decoding says; sampling draws what it should."""

import pytest
import torch

from companion.decoding import Cache, TokenByToken, cache_for, choose, generate
from companion.tests.test_model import SMALL, small, some_tokens


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9}, {"temperature": 1.5, "top_k": 5}])
def test_a_cache_says_the_same(options):
    model, prompt = small(), some_tokens()
    cached = generate(model, prompt, 20, **options)
    assert torch.equal(cached, generate(model, prompt, 20, cached=False, **options))
    assert torch.equal(cached[:, :9], prompt)


def test_greedy_takes_the_best_of_the_full_pass():
    model, prompt = small(), some_tokens()
    tokens = generate(model, prompt, 6)
    best = model(tokens).argmax(-1)
    assert torch.equal(tokens[:, 9:], best[:, 8:-1])


def test_top_one_is_greedy_and_seeds_repeat():
    model, prompt = small(), some_tokens()
    greedy = generate(model, prompt, 8)
    assert torch.equal(generate(model, prompt, 8, temperature=1.0, top_k=1), greedy)
    draws = [generate(model, prompt, 8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_draws_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(20_000, 3)
    drawn = choose(logits, temperature=2.0, random=torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=3) / 20_000
    expected = (logits[0] / 2).softmax(-1)
    spread = (expected * (1 - expected) / 20_000).sqrt()
    assert ((shares - expected).abs() < 4 * spread).all()


def test_rewinding_forgets():
    model, tokens = small(), some_tokens()
    cache = cache_for(model, batch=2)
    model(tokens, cache)
    cache.rewind(4)
    again = model(tokens[:, 4:], cache)
    torch.testing.assert_close(again, model(tokens)[:, 4:], rtol=0, atol=1e-12)


def test_cache_bytes_are_counted():
    cache = Cache(SMALL, batch=3, capacity=10, dtype=torch.bfloat16)
    assert cache.bytes == 2 * 2 * 3 * 2 * 10 * 8 * 2  # keys+values, layers, B, K, C, D, bytes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: generate(m, some_tokens(), 24), r"9 \+ 24 tokens exceed the context of 32"),
        (lambda m: generate(m, some_tokens(), 0), "new is 0"),
        (lambda m: generate(m, some_tokens()[0], 1), r"\(9,\)"),
        (lambda m: generate(m, some_tokens()[:, :0], 1), "prompt is empty"),
        (lambda m: generate(m, some_tokens(), 1, temperature=-1.0), "temperature is -1.0"),
        (lambda m: generate(m, some_tokens(), 1, temperature=1.0, top_k=0), "top_k is 0"),
        (lambda m: Cache(SMALL, capacity=33), "33 exceeds .* 32"),
        (lambda m: Cache(SMALL, batch=0), "batch is 0"),
        (lambda m: cache_for(m).rewind(1), "rewind to 1; the cache holds 0"),
        (lambda m: m(some_tokens(), cache_for(m)), r"\(2, 2\) do not fit a cache for \(1, 2\)"),
        (lambda m: m(some_tokens(1), cache_for(m, capacity=8)), "9 positions exceed .* 8"),
    ],
)
def test_bad_input_names_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())


def test_reading_token_by_token_says_what_reading_at_once_says():
    model, tokens = small(), some_tokens()
    expected, shapes = model(tokens), []
    hook = model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    found = TokenByToken(model)(tokens)
    hook.remove()
    assert shapes == [(len(tokens), 1)] * tokens.shape[1]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)

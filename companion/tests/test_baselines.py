"""Counting is checked against counting with a dictionary; the recurrence against torch's cell."""

from collections import Counter

import pytest
import torch

from companion.baselines import NGram, Recurrent, sample
from companion.decoding import generate
from companion.tests.test_model import small, some_tokens


def slow_chance(text, context, token, vocab, discount):
    """Interpolated absolute discounting, straight from its definition."""
    if context is None:
        return 1 / vocab
    size = len(context) + 1
    grams = Counter(tuple(text[i : i + size]) for i in range(len(text) - size + 1))
    behind = {g[-1]: n for g, n in grams.items() if g[:-1] == context}
    lower = slow_chance(text, context[1:] if context else None, token, vocab, discount)
    if not behind:
        return lower
    total = sum(behind.values())
    kept = max(behind.get(token, 0) - discount, 0)
    return (kept + discount * len(behind) * lower) / total


@pytest.mark.parametrize("order", [1, 2, 3])
def test_chances_are_those_of_the_definition(order):
    text = torch.randint(5, (60,), generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[0, 3, 3, 1, 4, 2]])
    chances = NGram(text, order=order, vocab=5)(tokens)[0].double().exp()
    for position in range(6):
        context = tuple(tokens[0, max(0, position - order + 2) : position + 1].tolist())
        context = context if order > 1 else ()
        for token in range(5):
            expected = slow_chance(text.tolist(), context, token, 5, 0.75)
            assert chances[position, token].item() == pytest.approx(expected, rel=1e-5)


def test_chances_sum_to_one():
    text = torch.randint(50, (500,), generator=torch.Generator().manual_seed(2))
    chances = NGram(text, order=4, vocab=50)(text[None, :40]).exp()
    torch.testing.assert_close(chances.sum(-1), torch.ones(1, 40))


def test_longer_contexts_help_on_text_that_repeats():
    text = torch.arange(7).repeat(30)
    right = [NGram(text, order=n, vocab=7)(text[None, :14])[0, 3, 4].exp() for n in (1, 2)]
    assert right[1] > 0.9 > right[0]


def test_recurrent_carries_its_state_from_left_to_right():
    torch.manual_seed(0)
    model = Recurrent(vocab=11, width=8).double()
    tokens = torch.randint(11, (2, 5))
    hidden = cell = torch.zeros(2, 8, dtype=torch.float64)
    weights = model.recurrence.weight_ih_l0, model.recurrence.weight_hh_l0
    biases = model.recurrence.bias_ih_l0, model.recurrence.bias_hh_l0
    expected = []
    for position in range(5):
        seen = model.embedding(tokens[:, position])
        hidden, cell = torch.lstm_cell(seen, (hidden, cell), *weights, *biases)
        expected.append(model.head(hidden))
    torch.testing.assert_close(model(tokens), torch.stack(expected, 1), rtol=1e-12, atol=1e-12)


def test_sampling_any_model_is_generating_without_a_cache():
    model, prompt = small(), some_tokens()
    expected = generate(model, prompt, 8, temperature=0.7, seed=3, cached=False)
    assert torch.equal(sample(model, prompt, 8, temperature=0.7, seed=3), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0, "vocab": 5}, "order is 0"),
        ({"order": 7, "vocab": 1024}, "1024"),
        ({"order": 2, "vocab": 5, "discount": 1.0}, "discount is 1.0"),
        ({"order": 30, "vocab": 2}, "20 tokens hold no 30-gram"),
    ],
)
def test_bad_input_names_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        NGram(torch.zeros(20, dtype=torch.int64), **options)

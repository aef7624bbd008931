"""What Python takes, told from what it does not."""

import pytest
import torch

from companion.acceptance import accepted, begins, parses, sample_sources, tokenizes
from companion.pretraining import every, rounded
from companion.tests.test_model import small, some_tokens
from companion.tokenization import train_tokenizer


@pytest.mark.parametrize(
    ("text", "token", "tree", "beginning"),
    [
        ("x = 1\n", True, True, True),
        ("", True, True, False),
        ("def f(x):\n    return x +", True, False, False),
        ("import os\nimport sys\nx = (1,", False, False, True),
        ("x = = 1\n", True, False, False),
        ("    x\n  y\n", False, False, False),
    ],
)
def test_each_test_says_what_python_says(text, token, tree, beginning):
    assert (tokenizes(text), parses(text), begins(text)) == (token, tree, beginning)


def test_a_null_character_is_not_python():
    assert not parses("a\0b")


def test_shares_are_counted():
    found = accepted(["x = 1\n", "x = (", "x = = 1\n", "1\n"])
    assert found == {"samples": 4, "tokenize": 0.75, "parse": 0.5, "begins": 0.5}
    with pytest.raises(ValueError, match="0 texts"):
        accepted([])


def test_samples_stop_at_the_end_token():
    tokenizer = train_tokenizer(["ab ab ab ab cd cd"], 258)
    model = small(vocab=tokenizer.vocab)
    with torch.no_grad():
        model.embedding.weight.zero_()  # every token is as likely as any other
    texts = sample_sources(model, tokenizer, samples=64, length=31)
    assert len(texts) == 64 and "<|end|>" not in "".join(texts)
    assert min(map(len, texts)) < 31


def test_rounding_is_what_storing_in_bf16_does():
    model = small().float()
    stored = rounded(model)
    for name, value in model.named_parameters():
        assert torch.equal(stored.get_parameter(name), value.bfloat16().float())
    assert torch.equal(stored.cos, model.cos)  # positions are computed anew, not stored
    assert not torch.equal(stored(some_tokens()), model(some_tokens()))


def test_losses_are_averaged_in_groups():
    assert every([1.0, 3.0, 5.0], 2) == [2.0, 5.0]

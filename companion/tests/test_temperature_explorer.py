"""The temperature picture shows softmax(logits / T), and the explorer holds a default when dead."""

import math
import re
from html import unescape

import pytest
import torch
from ipywidgets import embed

from companion.explorers.temperature import (
    next_logits,
    soft_labels,
    temperature_explorer,
    temperature_figure,
)
from companion.pretrained import tiny, tiny_tokenizer

TEXTS = {"a method": "class Stack:\n    def __init__(self", "a module": "import"}
LOGITS = torch.tensor([4.0, 2.0, 0.0, -2.0] + [-6.0] * 8)


class Letters:
    """A tokenizer whose twelve tokens are signs, an odd one among them."""

    def decode(self, ids):
        return "$b\ndefghijkl"[ids[0]]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def explorer(tokenizer):
    return temperature_explorer(tiny(), tokenizer, TEXTS)


def test_soft_labels_are_a_softmax_with_its_entropy():
    by_hand = [math.exp(x / 2) for x in LOGITS.tolist()]
    by_hand = [x / sum(by_hand) for x in by_hand]
    labels = soft_labels(LOGITS, 2)
    assert labels.shares.tolist() == pytest.approx(by_hand)
    entropy = -sum(p * math.log(p) for p in by_hand)
    assert labels.entropy == pytest.approx(entropy)
    assert labels.choices == pytest.approx(math.exp(entropy))
    assert str(labels).startswith(f"T = 2: best {by_hand[0]:.1%}, entropy {entropy:.2f} nats")
    assert str(labels).endswith("T² = 4")


def test_the_limits_of_the_temperature():
    assert soft_labels(LOGITS, 1e6).entropy == pytest.approx(math.log(12))
    assert soft_labels(LOGITS, 1e-3).entropy == 0  # one certain token; no 0 x log 0 comes of it
    assert soft_labels(torch.zeros(5)).choices == pytest.approx(5)
    entropies = [soft_labels(LOGITS, t).entropy for t in (0.5, 1, 2, 4, 8)]
    assert entropies == sorted(entropies)


def test_the_figure_draws_both_temperatures_and_what_is_left():
    figure = temperature_figure(LOGITS, Letters(), 2.0, best=3)
    (axes,) = figure.axes
    drawn = torch.tensor([bar.get_width() for bar in axes.patches]).view(2, 4) / 100
    for row, temperature in zip(drawn, (1, 2), strict=True):
        shares = (LOGITS.double() / temperature).softmax(-1)
        expected = torch.cat([shares[:3], shares[3:].sum()[None]])
        assert torch.allclose(row, expected, atol=1e-6)
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == [r"'\$'", "'b'", r"'\n'", "other 9"]
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "T = 2" in figure.alt and "T² = 4" in figure.alt and "other 9" in figure.alt


@pytest.mark.parametrize(("change", "message"), [
    ({"temperature": 0}, "temperature is 0"), ({"temperature": math.nan}, "temperature is nan"),
    ({"best": 13}, "best is 13; there are 12"), ({"best": 0}, "best is 0"),
    ({"logits": LOGITS[None]}, r"shape \(1, 12\)"),
    ({"logits": LOGITS / 0}, "not finite"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused(change, message):
    given = {"logits": LOGITS, "temperature": 2.0, "best": 3} | change
    with pytest.raises(ValueError, match=message):
        temperature_figure(given.pop("logits"), Letters(), **given)


def test_the_logits_are_those_of_the_last_position(tokenizer):
    model = tiny()
    ids = torch.tensor([[tokenizer.end, *tokenizer.encode("import")]])
    assert torch.equal(next_logits(model, tokenizer, "import"), model(ids)[0, -1].detach())


def test_the_default_is_on_show_even_without_a_kernel(explorer, tokenizer):
    logits = next_logits(tiny(), tokenizer, TEXTS["a method"])
    expected = temperature_figure(logits, tokenizer, 2.0)._repr_html_()
    assert explorer.result.value == expected
    state = embed.embed_data(views=[explorer])["manager_state"]["state"]
    assert expected in [model["state"].get("value") for model in state.values()]


def test_the_explorer_follows_its_controls(tokenizer):
    explorer = temperature_explorer(tiny(), tokenizer, TEXTS)
    explorer.controls["temperature"].value = 4.0
    explorer.controls["text"].value = "a module"
    logits = next_logits(tiny(), tokenizer, TEXTS["a module"])
    text = unescape(explorer.result.value)
    assert str(soft_labels(logits, 4.0)) in text
    best = repr(tokenizer.decode([int(logits.argmax())]))
    assert re.search(rf"{re.escape(best)} [\d.]+ to [\d.]+ %", text)
    with pytest.raises(ValueError, match="0 texts"):
        temperature_explorer(tiny(), tokenizer, {})

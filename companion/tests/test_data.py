"""The split leaks nothing, batches repeat, and a passage predicts every byte once."""

import pytest
import torch

from companion import data
from companion.data import Batches, documents, is_held_out, join_tokens, manifest, passage
from companion.tokenization import train_tokenizer

TEXT = "def f(x):\n    return x + 1\n\n# 中文 é 👩‍👧 \t end\n" * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 270)


@pytest.mark.parametrize("kind", data.KINDS)
def test_a_text_is_in_one_split_and_shares_no_paragraph_with_the_other(kind):
    train, held_out = documents(kind, "train"), documents(kind, "validation")
    assert train and held_out and not train.keys() & held_out.keys()
    assert all(is_held_out(name) for name in held_out)
    leaks = {part for text in held_out.values() for part in data._paragraphs(text)}
    assert leaks and not any(part in leaks for t in train.values() for part in t.split("\n\n"))


def test_prose_would_leak_without_the_cut():
    raw = data._prose()
    held_out = [text for name, text in raw.items() if is_held_out(name)]
    rest = {p for n, t in raw.items() if not is_held_out(n) for p in data._paragraphs(t)}
    assert any(part in rest for text in held_out for part in data._paragraphs(text))


def test_sources_are_no_tests_and_belong_to_no_one_machine():
    names = [*documents("source", "train"), *documents("source", "validation")]
    assert "asyncio/base_events.py" in names
    assert not [name for name in names if "test" in name.split("/") or "_sysconfigdata" in name]
    assert not [name for name in names if name.startswith(("/", "site-packages", "encodings/"))]


def test_the_manifest_tells_a_changed_text(monkeypatch):
    before = manifest("prose", "validation")
    name = next(iter(before))
    changed = documents("prose", "validation") | {name: "other"}
    monkeypatch.setattr(data, "documents", lambda *_: changed)
    after = manifest("prose", "validation")
    assert [n for n in before if before[n] != after[n]] == [name]


def test_joined_texts_are_led_in_by_the_end_token(tokenizer):
    line = join_tokens(["ab", "", "c"], tokenizer)
    parts = [tokenizer.encode("ab"), [], tokenizer.encode("c")]
    expected = [x for part in parts for x in (tokenizer.end, *part)]
    assert line.tolist() == expected


def test_batches_depend_on_seed_and_step_alone():
    line = torch.arange(1000)
    first, other = (Batches(line, batch=4, context=16, seed=seed) for seed in (0, 1))
    assert torch.equal(first[7], Batches(line, batch=4, context=16, seed=0)[7])
    assert not torch.equal(first[7], first[8]) and not torch.equal(first[7], other[7])
    assert (first[7].diff(dim=1) == 1).all()
    assert torch.equal(next(iter(first)), first[0])


def test_batches_reach_both_ends():
    batches = Batches(torch.arange(20), batch=64, context=18, seed=0)
    assert batches[0].min() == 0 and batches[0].max() == 19


@pytest.mark.parametrize("window", [1, 7, 255, 10_000])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_passage_predicts_every_token_once(tokenizer, window, batch):
    text = passage(TEXT, tokenizer, window=window)
    batches = [*text.batches(batch)]
    assert all(1 <= len(rows) <= batch for rows in batches)  # no empty one before a short window
    rows = [row for rows in batches for row in rows]
    assert all(row[0] == tokenizer.end and len(row) <= window + 1 for row in rows)
    assert torch.cat([row[1:] for row in rows]).tolist() == tokenizer.encode(TEXT)
    assert text.bytes == len(TEXT.encode())


def test_validation_takes_from_many_texts(tokenizer):
    text = data.validation(tokenizer, kind="source", characters=20_000)
    assert len(text.text) == 20_000 and text.bytes == len(text.text.encode())
    assert text.text.count("import ") > 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: documents("poems", "train"), "kind is 'poems'; known are: prose, source"),
        (lambda t: documents("prose", "test"), "split is 'test'"),
        (lambda t: passage("", t), "text is ''"),
        (lambda t: passage("a", t, window=0), "window is 0"),
        (lambda t: data.validation(t, characters=0), "characters is 0"),
        (lambda t: join_tokens([], t), "0 texts"),
        (lambda t: Batches(torch.arange(9), batch=1, context=10), "9 tokens are fewer .* 10"),
        (lambda t: Batches(torch.arange(9), batch=0, context=3), "batch is 0"),
        (lambda t: Batches(torch.zeros(3, 3), batch=1, context=2), r"\(3, 3\)"),
        (lambda t: Batches(torch.arange(9), batch=1, context=3)[-1], "step is -1"),
        (lambda t: list(passage("ab", t).batches(0)), "batch is 0"),
    ],
)
def test_bad_input_names_the_value(tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(tokenizer)

"""Tokenizers against what they promise: no text is lost, none is special, training repeats."""

import inspect
import json
import sys
from itertools import pairwise
from subprocess import PIPE, run

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from companion import model, tokenization
from companion.tokenization import END, Tokenizer, train_tokenizer

TEXTS = [inspect.getsource(module) for module in (model, tokenization, json, json.decoder)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 600)


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("\n\t <|end>"))))
def test_no_text_is_lost(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= index < tokenizer.vocab for index in ids)
    assert tokenizer.end not in ids


@pytest.mark.parametrize("text", [END, f"a{END}b", f"{END}{END}\n{END}", f" {END} "])
def test_the_spelling_of_the_end_is_plain_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.end not in ids
    assert tokenizer.decode(ids) == text


def test_every_byte_and_the_end_are_tokens(tokenizer):
    assert tokenizer.vocab == 600
    assert tokenizer.end == 0
    assert tokenizer.decode([0]) == END
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert len(alphabet) == 256
    assert all(tokenizer.backend.token_to_id(letter) is not None for letter in alphabet)


def test_ids_are_those_of_merging_in_the_learned_order(tokenizer):
    """Byte-pair encoding the slow way: merge the earliest learned pair until none is left."""
    learned = json.loads(tokenizer.backend.to_str())["model"]
    rank = {tuple(pair): order for order, pair in enumerate(learned["merges"])}
    for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(TEXTS[0]):
        parts = list(piece)
        while pairs := [pair for pair in pairwise(parts) if pair in rank]:
            best = min(pairs, key=rank.__getitem__)
            at = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == best)
            parts[at : at + 2] = ["".join(best)]
        expected = [learned["vocab"][part] for part in parts]
        assert [token.id for token in tokenizer.backend.model.tokenize(piece)] == expected


def test_a_line_break_takes_its_indentation_along_and_digits_stand_alone(tokenizer):
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str("if x:\n    y = 12\n\nz  \n\t#!")
    text = "if x:\n    y = 12\n\nz  \n\t#!"
    cuts = [text[start:stop] for _, (start, stop) in pieces]
    assert cuts == [
        "if",
        " x",
        ":",
        "\n    ",
        "y",
        " =",
        " 1",
        "2",
        "\n\n",
        "z",
        "  ",
        "\n\t",
        "#!",
    ]
    assert len(tokenizer.encode("\n    ")) == 1


def test_the_same_texts_give_the_same_tokenizer_in_another_process(tokenizer):
    code = (
        "import json, sys; from companion.tokenization import train_tokenizer\n"
        "print(train_tokenizer(json.load(sys.stdin), 600).backend.to_str())"
    )
    child = run(
        [sys.executable, "-c", code], input=json.dumps(TEXTS), stdout=PIPE, text=True, check=True
    )
    assert child.stdout.strip() == tokenizer.backend.to_str()


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(path)
    assert loaded.backend.to_str() == tokenizer.backend.to_str()
    assert (loaded.vocab, loaded.end) == (tokenizer.vocab, tokenizer.end)
    assert loaded.encode(f"a{END}b") == tokenizer.encode(f"a{END}b")  # this is not in the file
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_files_that_hold_no_tokenizer(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "none.json")
    path = tokenizer.save(tmp_path / "tokenizer.json")
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"{}", b"\xff\xfe"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
            Tokenizer.load(path)
    two = json.loads(whole)
    two["added_tokens"].append(two["added_tokens"][0] | {"id": 600, "content": "<|two|>"})
    path.write_text(json.dumps(two))
    with pytest.raises(ValueError, match="2 special tokens"):
        Tokenizer.load(path)


def test_bad_input_is_named(tokenizer):
    for text in (b"bytes", None, 3, ["list"]):
        with pytest.raises(ValueError, match=type(text).__name__):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match="no UTF-8 spelling at character 2"):
        tokenizer.encode("ab\ud800")
    for index in (-1, 600):
        with pytest.raises(ValueError, match=rf"\[{index}\] are outside 0 to 599"):
            tokenizer.decode([5, index])
    for vocab in (256, 0, 300.0, True):
        with pytest.raises(ValueError, match="vocab is"):
            train_tokenizer(TEXTS, vocab)
    with pytest.raises(ValueError, match="give only 259 tokens"):
        train_tokenizer(["abab"], 300)
    with pytest.raises(ValueError, match="int"):
        train_tokenizer(["a", 3], 300)
    with pytest.raises(ValueError, match="one str"):
        train_tokenizer("abc", 300)


def test_bytes_that_are_no_character_become_replacements(tokenizer):
    first, *_ = tokenizer.encode("\U0001f600")
    assert tokenizer.decode([first]) == "\N{REPLACEMENT CHARACTER}"

"""The shipped model is the one its recipe describes; anything else is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from companion import pretraining
from companion.data import documents, join_tokens, manifest, passage
from companion.pretrained import FOLDER, overlap, tiny, tiny_recipe, tiny_tokenizer
from companion.pretraining import Recipe, pretrain
from companion.quality import judge
from companion.tokenization import train_tokenizer

NAMES = ("tiny.safetensors", "tiny_tokenizer.json", "tiny.json")


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        shutil.copy(FOLDER / name, tmp_path)
    return tmp_path


def test_the_recipe_says_what_was_shipped():
    recipe, model = tiny_recipe(), tiny()
    expected = Recipe(**recipe["recipe"] | {"cycles": tuple(recipe["recipe"]["cycles"])})
    assert expected.config == model.config and tiny_tokenizer().vocab == model.config.vocab
    assert 4e6 < sum(p.numel() for p in model.parameters()) < 6e6
    assert (FOLDER / NAMES[0]).stat().st_size < 12e6
    assert expected == Recipe(), "the defaults make another model than the shipped one"
    assert len(recipe["losses"]) == -(-expected.steps // 20)
    assert recipe["losses"][-1] < recipe["losses"][0]
    assert all(
        p.dtype == torch.float32 and p.equal(p.bfloat16().float()) for p in model.parameters()
    )


def test_quality_is_what_the_recipe_says():
    """Every sixteenth window of the held-out sources is a fair sample of them."""
    text = passage(
        "\n\n".join(documents("source", "validation").values()), tiny_tokenizer(), window=511
    )
    rows = text.tokens[: len(text.tokens) // 511 * 511].view(-1, 511)[::16].flatten()
    counts = text.byte_counts[: len(text.tokens) // 511 * 511].view(-1, 511)[::16].flatten()
    sample = replace(text, tokens=rows, byte_counts=counts)
    bits = judge(sample, {"tiny": tiny()})["tiny"].bits_per_byte()
    assert bits.contains(tiny_recipe()["quality"]["source"]["bits_per_byte"])


def test_overlap_is_whole_here_or_said(monkeypatch):
    recipe = tiny_recipe()
    own = {"manifest": {"prose": {"train": manifest("prose", "train")}}}
    assert overlap(own, "prose", "train") == 1
    name, text = next(iter(documents("prose", "train").items()))
    own["manifest"]["prose"]["train"][name] = "other"
    share = 1 - len(text) / sum(map(len, documents("prose", "train").values()))
    assert overlap(own, "prose", "train") == pytest.approx(share)
    assert 0 <= overlap(recipe, "source", "validation") <= 1


@pytest.mark.parametrize("name", NAMES[:2])
def test_damaged_files_are_refused(folder, name):
    load = {NAMES[0]: tiny, NAMES[1]: tiny_tokenizer}[name]
    load(folder=folder)
    data = bytearray((folder / name).read_bytes())
    for changed in (data[:-10], data[:500] + bytes([data[500] ^ 1]) + data[501:]):
        (folder / name).write_bytes(changed)
        with pytest.raises(ValueError, match="truncated or altered; restore it"):
            load(folder=folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        load(folder=folder)


def test_a_missing_or_damaged_recipe_is_refused(folder):
    (folder / "tiny.json").write_text("{")
    with pytest.raises(ValueError, match=r"tiny\.json is damaged"):
        tiny(folder=folder)
    (folder / "tiny.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tiny\.json is missing"):
        tiny_tokenizer(folder=folder)


SMALL = Recipe(
    vocab=270, context=16, layers=1, heads=2, kv_heads=1, width=16, hidden=24, cycles=(60,),
    batch=2, warmup=2,
)  # fmt: skip


def some_tokens():
    text = "def f(x):\n    return x + 1\n" * 40
    return join_tokens([text], train_tokenizer([text], 270))


def test_an_interrupted_pretraining_goes_on_without_loss(tmp_path, monkeypatch):
    tokens = some_tokens()
    whole, kept = pretrain(SMALL, tokens, tmp_path / "whole.safetensors")
    path = tmp_path / "part.safetensors"

    saved = pretraining.save_checkpoint
    with monkeypatch.context() as patch:
        calls = []

        def save_then_stop(*args, **options):
            saved(*args, **options)
            calls.append(options["step"])
            raise KeyboardInterrupt

        patch.setattr(pretraining, "save_checkpoint", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(SMALL, tokens, path)
    assert calls == [pretraining.SAVE_EVERY]
    again, kept_again = pretrain(SMALL, tokens, path)
    assert kept["losses"] == kept_again["losses"] and len(kept["losses"]) == 60
    pairs = zip(whole.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_one_more_cycle_goes_on_from_the_earlier_ones(tmp_path):
    tokens, longer = some_tokens(), replace(SMALL, cycles=(60, 30))
    whole, kept = pretrain(longer, tokens, tmp_path / "whole.safetensors")
    path = tmp_path / "part.safetensors"
    pretrain(SMALL, tokens, path)
    again, kept_again = pretrain(longer, tokens, path)
    assert kept["losses"] == kept_again["losses"] and len(kept["losses"]) == 90
    assert kept_again["recipe"] == kept["recipe"] and kept["recipe"]["cycles"] == [60, 30]
    pairs = zip(whole.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("other", [{"rate": 2e-2}, {"cycles": (61,)}, {"cycles": (30, 30)}])
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path, other):
    path = tmp_path / "x.safetensors"
    pretrain(SMALL, some_tokens(), path)
    with pytest.raises(ValueError, match="another recipe"):
        pretrain(replace(SMALL, **other), some_tokens(), path)


def test_the_recipe_is_readable_json():
    plain = json.loads((FOLDER / "tiny.json").read_text())
    assert {"quality", "versions", "manifest", "machine", "tokens"} <= plain.keys()

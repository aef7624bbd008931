"""What ready models are judged on: windows of their own for each seed, of text held out."""

import pytest
import torch

from companion.data import documents
from companion.pretrained import tiny, tiny_tokenizer
from companion.quality import judge
from companion.quantization import quantize
from companion.studies.texts import calibration, excess, first_tokens, held_out

OPTIONS = {"kind": "prose", "windows": 2, "length": 100}


def test_each_seed_has_windows_of_its_own():
    one, two = (held_out(tiny_tokenizer(), seed=seed, **OPTIONS) for seed in (0, 1))
    assert len(one.tokens) == len(two.tokens) == 200 and one.window == 100
    whole = "\n\n".join(documents("prose", "validation").values())
    ids = tiny_tokenizer().encode(whole[:4000])
    assert one.tokens.tolist() + two.tokens.tolist() == ids[:400]
    assert one.bytes == sum(tiny_tokenizer().byte_length(i) for i in one.tokens.tolist())


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="seed 900 needs 180200"):
        held_out(tiny_tokenizer(), seed=900, **OPTIONS)


def test_calibration_reads_training_text():
    windows = calibration(tiny_tokenizer(), seed=3, **OPTIONS)
    assert [w.shape for w in windows] == [(1, 100)] * 2
    assert not torch.equal(*windows)
    other = calibration(tiny_tokenizer(), seed=4, **OPTIONS)
    assert not any(torch.equal(a, b) for a in windows for b in other)
    again = calibration(tiny_tokenizer(), seed=3, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(windows, again, strict=True))


def test_excess_is_paired_window_by_window():
    text, model = held_out(tiny_tokenizer(), seed=0, **OPTIONS), tiny()
    found = judge(text, {"plain": model, "two": quantize(model, 2, head=None)})
    more = excess(found["two"], found["plain"])
    alone = judge(first_tokens(text), {"plain": model, "two": quantize(model, 2, head=None)})
    assert more["first window"] == pytest.approx(excess(alone["two"], alone["plain"])["nats"])
    assert more["nats"] == pytest.approx(sum(more["windows"]) / 2, abs=1e-4)  # windows are alike
    assert excess(found["plain"], found["plain"])["nats"] == 0


def shared_runs(one, other, length=13):
    """Share of the runs of `length` tokens in `one` that `other` holds too."""
    known = {tuple(run) for run in other.unfold(0, length, 1).tolist()}
    runs = one.unfold(0, length, 1).tolist()
    return sum(tuple(run) in known for run in runs) / len(runs)


def test_calibration_and_judging_share_few_runs_of_tokens():
    """Pages of one manual repeat their turns of phrase; whole windows must not come back."""
    text = held_out(tiny_tokenizer(), kind="prose", seed=0, windows=8, length=511)
    line = torch.cat([w[0] for w in calibration(
        tiny_tokenizer(), kind="prose", seed=0, windows=8, length=511)])  # fmt: skip
    assert shared_runs(line, line) == 1
    assert shared_runs(text.tokens, line) < 0.05

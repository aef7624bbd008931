"""Quality against sums written out, and its intervals against simulation."""

import math

import pytest
import torch
from torch import nn

from companion.baselines import NGram
from companion.data import Passage
from companion.quality import judge, ratio_of_sums
from companion.tests.test_model import small


def some_passage(tokens=70, window=16):
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 50, (tokens,), generator=random)
    counts = torch.randint(1, 5, (tokens,), generator=random)
    return Passage("", ids, counts, window, end=0)


def test_quality_is_the_sum_written_out():
    text, model, other = some_passage(), small(), small(kv_heads=4)
    found = judge(text, {"first": model, "second": other})
    nats = divergence = agreed = 0.0
    for start in range(0, 70, 16):
        window = text.tokens[start : start + 16]
        ids = torch.cat([torch.tensor([0]), window])[None]
        ours, theirs = model(ids)[0].log_softmax(-1), other(ids)[0].log_softmax(-1)
        for t, token in enumerate(window):
            nats -= theirs[t, token].item()
            divergence += (ours[t].exp() * (ours[t] - theirs[t])).sum().item()
            agreed += ours[t].argmax().item() == theirs[t].argmax().item()
    second = found["second"]
    bits = nats / math.log(2) / text.byte_counts.sum().item()
    assert second.bits_per_byte().estimate == pytest.approx(bits, rel=1e-9)
    assert second.perplexity().estimate == pytest.approx(math.exp(nats / 70), rel=1e-9)
    assert second.divergence().estimate == pytest.approx(divergence / 70, rel=1e-6)
    assert second.agreement().estimate == pytest.approx(agreed / 70)
    assert found["first"].divergence().estimate == 0 and found["first"].agreement().estimate == 1
    excess = second.excess(found["first"]).estimate
    first = found["first"].bits_per_byte().estimate
    assert excess == pytest.approx(bits - first, rel=1e-6)


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary():
    class Uniform(nn.Module):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, 50)

    found = judge(some_passage(), {"uniform": Uniform()})["uniform"]
    assert found.perplexity().estimate == pytest.approx(50, rel=1e-6)
    assert found.nats_per_token().high - found.nats_per_token().low < 1e-6


def test_counting_models_are_judged_too():
    text = some_passage()
    found = judge(text, {"counts": NGram(text.tokens, order=2, vocab=50)})["counts"]
    assert found.perplexity().estimate < 50


def test_paired_differences_are_narrower_than_either():
    random = torch.Generator().manual_seed(0)
    sizes = 100 + 20 * torch.rand(40, generator=random, dtype=torch.float64)
    hard = sizes * (1 + torch.rand(40, generator=random, dtype=torch.float64))
    worse = hard + 0.01 * sizes * (1 + 0.1 * torch.randn(40, generator=random).double())
    alone, paired = ratio_of_sums(hard, sizes), ratio_of_sums(worse - hard, sizes)
    assert (alone.high - alone.low) > 50 * (paired.high - paired.low)
    assert paired.low > 0


@pytest.mark.parametrize("windows", [8, 60])
def test_intervals_hold_the_truth_as_often_as_they_say(windows):
    random = torch.Generator().manual_seed(windows)
    held = 0
    for _ in range(400):
        sizes = 50 + 100 * torch.rand(windows, generator=random, dtype=torch.float64)
        rates = 2 + 0.5 * torch.randn(windows, generator=random, dtype=torch.float64)
        held += ratio_of_sums(sizes * rates, sizes).contains(2.0)
    assert 0.91 <= held / 400 <= 0.98


def test_one_window_has_no_spread():
    found = ratio_of_sums(torch.ones(1), torch.ones(1))
    assert found.estimate == 1 and math.isinf(found.high)


def test_no_models_and_other_windows_are_refused():
    with pytest.raises(ValueError, match="0 models"):
        judge(some_passage(), {})
    one, two = (judge(some_passage(n), {"m": small()})["m"] for n in (70, 69))
    with pytest.raises(ValueError, match="different windows"):
        one.excess(two)

"""Adjusted and chunked losses against torch's, and what Huber's loss does to chances."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, smooth_l1_loss

from companion import cost
from companion.accumulation import accumulate
from companion.kept import kept_bytes
from companion.losses import next_token_loss, token_losses
from companion.memory import LiveBytes
from companion.model import LanguageModel, ModelConfig
from companion.recomputation import recomputed
from companion.surgery import copied
from companion.tests.equalities import far, gradients, some_batches
from companion.tests.test_model import small
from companion.token_losses import (
    adjusted_losses,
    chunked_losses,
    chunked_peak_bytes,
    huber_losses,
    saved_bytes,
    z_losses,
)


def logits_and_tokens(batch=2, time=5, vocab=7):
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(batch, time, vocab, generator=random, dtype=torch.float64)
    return logits, torch.randint(vocab, (batch, time), generator=random)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothing_is_torchs_and_that_of_the_formula(smoothing):
    logits, tokens = logits_and_tokens()
    ours = adjusted_losses(logits, tokens, smoothing=smoothing)
    flat, targets = logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    theirs = cross_entropy(flat, targets, label_smoothing=smoothing)
    assert ours.shape == (2, 4) and ours.mean().item() == pytest.approx(theirs.item(), rel=1e-12)
    for row in range(2):
        for t in range(4):
            surprise = -logits[row, t].log_softmax(-1)
            label = surprise[tokens[row, t + 1]]
            expected = (1 - smoothing) * label + smoothing * surprise.mean()
            assert ours[row, t].item() == pytest.approx(expected.item(), rel=1e-12)


def test_z_loss_by_hand():
    logits, tokens = logits_and_tokens()
    by_hand = [[math.log(sum(math.exp(z) for z in place)) ** 2 for place in row]
               for row in logits.tolist()]  # fmt: skip
    assert z_losses(logits).tolist() == [pytest.approx(row, rel=1e-12) for row in by_hand]
    more = adjusted_losses(logits, tokens, z_weight=0.5) - token_losses(logits, tokens)
    torch.testing.assert_close(more, 0.5 * torch.tensor(by_hand).double()[:, :-1])


def test_z_loss_sees_a_shift_that_cross_entropy_does_not():
    logits, tokens = logits_and_tokens()
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for weight in (0.0, 0.25):
        loss = adjusted_losses(logits + shift, tokens, z_weight=weight).sum()
        (slope,) = torch.autograd.grad(loss, shift)
        expected = weight * 2 * torch.logsumexp(logits[:, :-1], -1).sum()
        assert slope.item() == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize("extra", [{}, {"smoothing": 0.1, "z_weight": 1e-2}])
@pytest.mark.parametrize("positions", [1, 3, 8, 100])
@pytest.mark.parametrize("make", [copied, recomputed])
def test_chunks_give_the_loss_and_the_gradient(make, positions, extra):
    one, tokens = small(), some_batches()[0]
    other = make(one)
    ours = chunked_losses(other, tokens, positions=positions, **extra)
    theirs = adjusted_losses(one(tokens), tokens, **extra)
    assert (ours - theirs).abs().max() < 1e-12
    weights = torch.linspace(0.5, 1.5, ours.numel(), dtype=torch.float64).view(ours.shape)
    for losses in (ours, theirs):
        (losses * weights).mean().backward()
    assert far(gradients(one), gradients(other)) < 1e-12
    assert isinstance(other.head, torch.nn.Linear)


def test_chunks_within_microbatches():
    one, other, tokens = small(), small(), some_batches()[0]
    chunked = lambda model, part: chunked_losses(model, part, positions=3)  # noqa: E731
    loss = accumulate(other, tokens, 4, losses=chunked)
    expected = next_token_loss(one(tokens), tokens)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert far(gradients(one), gradients(other)) < 1e-12


WIDE = ModelConfig(vocab=4096, context=32, layers=2, heads=4, kv_heads=2, width=32, hidden=48)


@pytest.mark.parametrize("positions", [2, 9, 31])
@pytest.mark.parametrize(("batch", "length"), [(4, 32), (1, 32), (3, 2)])
def test_kept_bytes_are_as_predicted(batch, length, positions):
    model, tokens = LanguageModel(WIDE), torch.randint(4096, (batch, length))
    held = []  # or nothing would be kept
    found = kept_bytes(
        model, lambda: held.append(chunked_losses(model, tokens, positions=positions))
    )
    whole = cost.activation_bytes(WIDE, length, batch=batch)
    assert found == whole - saved_bytes(4096, length, batch=batch)
    assert found < whole / 2


@pytest.mark.parametrize("chunk", [None, 1, 4, 10, 31])
@pytest.mark.parametrize("change", [{}, {"width": 64}, {"tied": False}])
def test_the_peak_is_as_predicted_within_two_percent(change, chunk):
    config = replace(WIDE, **change)
    model, tokens = LanguageModel(config), torch.randint(4096, (4, 32))
    with LiveBytes() as live:
        if chunk is None:
            loss = next_token_loss(model(tokens), tokens)
        else:
            loss = chunked_losses(model, tokens, positions=chunk).mean()
        loss.backward()
    predicted = chunked_peak_bytes(config, 32, batch=4, chunk=chunk)
    assert live.peak == pytest.approx(predicted, rel=0.02)


def test_the_head_comes_back_after_an_error():
    model = small()
    with pytest.raises(ValueError, match="exceed the context"):
        chunked_losses(model, torch.zeros(1, 99, dtype=torch.int64), positions=4)
    assert isinstance(model.head, torch.nn.Linear) and list(model.state_dict()) == [
        *small().state_dict()
    ]


def test_huber_is_half_the_squared_error_and_torchs_smooth_l1():
    logits, tokens = logits_and_tokens()
    chances = logits[:, :-1].softmax(-1)
    labels = torch.nn.functional.one_hot(tokens[:, 1:], 7).double()
    half = (chances - labels).square().sum(-1) / 2
    torch.testing.assert_close(huber_losses(logits, tokens), half, rtol=1e-12, atol=1e-12)
    smooth = smooth_l1_loss(chances, labels, reduction="none", beta=0.1).sum(-1)
    ours = huber_losses(logits, tokens, threshold=0.1) / 0.1
    torch.testing.assert_close(ours, smooth, rtol=1e-12, atol=1e-12)


def test_hubers_gradient_fades_where_the_model_is_most_wrong():
    for gap in (2.0, 10.0, 20.0):  # logits of the wrong token above the right one
        logits = torch.tensor([[[gap, 0.0], [0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
        tokens = torch.tensor([[0, 1]])
        slopes = [torch.autograd.grad(loss(logits, tokens).sum(), logits)[0][0, 0, 1].item()
                  for loss in (token_losses, huber_losses)]  # fmt: skip
        chance = 1 / (1 + math.exp(gap))
        assert slopes[0] == pytest.approx(-(1 - chance))
        assert slopes[1] == pytest.approx(-2 * chance * (1 - chance) ** 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, t: adjusted_losses(z, t, smoothing=1.0), "smoothing is 1.0"),
        (lambda z, t: adjusted_losses(z, t, smoothing=-0.1), "smoothing is -0.1"),
        (lambda z, t: adjusted_losses(z, t, z_weight=-1.0), "z_weight is -1.0"),
        (lambda z, t: adjusted_losses(z[:, :3], t), r"\(2, 3\) and tokens \(2, 5\)"),
        (lambda z, t: adjusted_losses(z[:, :1], t[:, :1]), "1 position"),
        (lambda z, t: adjusted_losses(z[..., 0], t), r"at \(2,\) and tokens \(2, 5\)"),
        (lambda z, t: huber_losses(z, t, threshold=0), "threshold is 0"),
        (lambda z, t: chunked_losses(small(), t, positions=0), "positions is 0"),
        (lambda z, t: chunked_losses(small(), t[0], positions=2), r"tokens \(5,\)"),
        (lambda z, t: saved_bytes(0, 5), "vocab is 0"),
        (lambda z, t: chunked_peak_bytes(WIDE, 32, chunk=0), "chunk is 0"),
    ],
)
def test_bad_input_names_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(*logits_and_tokens())

"""Losses against torch's and against sums written out."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from companion.losses import imitation_loss, next_token_loss, token_divergences, token_losses


def logits_and_tokens(batch=2, time=5, vocab=7):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, time, vocab, generator=random)
    return logits, torch.randint(vocab, (batch, time), generator=random)


def test_position_t_predicts_token_t_plus_one():
    logits, tokens = logits_and_tokens()
    losses = token_losses(logits, tokens)
    for row in range(2):
        for t in range(4):
            chance = logits[row, t].softmax(-1)[tokens[row, t + 1]]
            assert losses[row, t].item() == pytest.approx(-chance.log().item(), rel=1e-5)


def test_next_token_loss_is_torch_cross_entropy():
    logits, tokens = logits_and_tokens()
    expected = cross_entropy(logits[:, :-1].reshape(-1, 7), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(next_token_loss(logits, tokens), expected)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_is_torch_kl_summed_over_the_vocabulary(temperature):
    student, teacher = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    ours, theirs = (log_softmax(x / temperature, -1) for x in (student, teacher))
    expected = kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(token_divergences(student, teacher, temperature), expected)
    mean = expected.mean() * temperature**2
    torch.testing.assert_close(imitation_loss(student, teacher, temperature), mean)


def test_divergence_stays_finite_where_softmax_log_does_not():
    teacher = torch.tensor([[[0.0, 200.0]]])
    student = torch.tensor([[[200.0, 0.0]]])
    assert student.softmax(-1).log().isinf().any()
    assert token_divergences(student, teacher).item() == pytest.approx(200)


def test_no_gradient_reaches_the_teacher():
    student, teacher = torch.randn(2, 1, 2, 3).requires_grad_().unbind(0)
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    imitation_loss(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize(
    ("logits", "tokens", "message"),
    [
        ((2, 5, 7), (2, 4), r"\(2, 5, 7\) and tokens \(2, 4\)"),
        ((2, 7), (2, 5), r"\(2, 7\)"),
        ((2, 1, 7), (2, 1), "1 position"),
    ],
)
def test_shapes_that_do_not_match_are_named(logits, tokens, message):
    with pytest.raises(ValueError, match=message):
        next_token_loss(torch.zeros(logits), torch.zeros(tokens, dtype=torch.int64))


def test_bad_temperature_and_shapes_of_two_models():
    with pytest.raises(ValueError, match="temperature is 0"):
        imitation_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), temperature=0)
    with pytest.raises(ValueError, match=r"\(1, 2, 3\).*\(1, 2, 4\)"):
        imitation_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))

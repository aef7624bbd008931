"""The upper rungs: SwiGLU by rows, halves of a batch, all of them; the same training each time."""

import numpy as np
import pytest
import torch

from companion import fastest_training
from companion.backward_passes import SwiGLU
from companion.faster_training import as_parts, faster, fused_adamw, separated
from companion.fastest_training import (
    SwiGLUByRows,
    by_rows,
    fastest,
    fastest_step,
    losses_ahead,
    page_faults,
)
from companion.losses import next_token_loss, token_losses
from companion.tests.equalities import far, gradients, weights
from companion.tests.test_model import small, some_tokens
from companion.training import adamw, plain_step, train


@pytest.mark.parametrize("rows", [1, 5, 128])
@pytest.mark.parametrize("turned", [False, True])
def test_swiglu_by_rows_is_swiglu(rows, turned, monkeypatch):
    """Also where the rows of input and gradient do not lie one after another."""
    monkeypatch.setattr(fastest_training, "ROWS", rows)
    random = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(7, 3, width, generator=random, dtype=torch.float64).transpose(0, 1)
        for width in (12, 6)
    )
    x, grad = (x, grad) if turned else (x.contiguous(), grad.contiguous())
    x.requires_grad_()
    ours, plain = SwiGLUByRows.apply(x), SwiGLU.apply(x)
    assert (ours - plain).abs().max() < 1e-12
    found, expected = (torch.autograd.grad(y, x, grad)[0] for y in (ours, plain))
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("make", [lambda model: by_rows(faster(model)), fastest])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_plain_model(make, tied):
    model, tokens = small(tied=tied), some_tokens(3, 17)
    fast, found = make(model), []
    for one in (model, fast):
        loss = next_token_loss(one(tokens), tokens)
        loss.backward()
        found.append((loss.item(), gradients(one)))
    (loss, plain), (other, ours) = found
    assert abs(loss - other) < 1e-12 and far(plain, as_parts(fast, ours)) < 1e-12
    assert far(weights(separated(fast)), weights(model)) == 0
    assert (fast.head.weight is fast.embedding.weight) == tied


@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_training(microbatches, dtype):
    batches, ends = [some_tokens(4, 17)] * 6, []
    for model, make, step in (
        (small().to(dtype), adamw, plain_step),
        (fastest(small().to(dtype)), fused_adamw, fastest_step(microbatches)),
    ):
        options = {"optimizer": make(model, 1e-2), "step": step, "progress": False}
        ends.append(train(model, batches, steps=6, **options))
    near = 1e-4 if dtype == torch.float32 else 1e-10
    assert max(abs(a - b) for a, b in zip(*ends, strict=True)) < near
    assert ends[1][-1] < ends[1][0] - 0.5


def test_losses_that_leave_out_the_last_position():
    model, tokens = small(), some_tokens(3, 9)
    expected = token_losses(model(tokens), tokens)
    assert (losses_ahead(model, tokens) - expected).abs().max() < 1e-12


def test_a_model_that_is_not_faster_is_refused():
    with pytest.raises(ValueError, match="no module is chosen"):
        by_rows(small())


@pytest.mark.skipif(fastest_training.resource is None, reason="Windows does not count them")
def test_new_pages_are_counted():
    """64 MB are more than a program keeps back, and come in pages of 2 MB at most."""
    assert page_faults(lambda: np.ones(2**23)) >= 30 > page_faults(lambda: None) >= 0


def test_without_a_count_the_call_is_made(monkeypatch):
    monkeypatch.setattr(fastest_training, "resource", None)
    made = []
    assert page_faults(lambda: made.append(1)) is None and made == [1]

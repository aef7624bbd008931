"""Products by oneDNN: what torch computes, forwards and backwards, and the same training."""

import pytest
import torch
from torch import nn

from companion import onednn_products
from companion.faster_training import as_parts, faster, faster_step, fused_adamw, separated
from companion.losses import next_token_loss
from companion.onednn_products import (
    OneDnnLinear,
    Product,
    libraries_raced,
    on_onednn,
    outer,
    times,
    why_not_onednn,
)
from companion.tests.equalities import far, gradients, weights
from companion.tests.test_model import small, some_tokens
from companion.training import adamw, plain_step, train


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_three_products_are_torchs(inputs, outputs, dtype):
    x, weight = numbers(5, 7, inputs, dtype=dtype), numbers(outputs, inputs, dtype=dtype)
    grad = numbers(5, 7, outputs, dtype=dtype)
    near = 1e-5 if dtype == torch.float32 else 1e-12
    x.requires_grad_(), weight.requires_grad_()
    ours, plain = Product.apply(x, weight), x @ weight.mT
    assert ours.dtype == dtype and (ours - plain).abs().max() <= near * plain.abs().max()
    found, expected = (torch.autograd.grad(y, (x, weight), grad) for y in (ours, plain))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= near * other.abs().max()


def test_the_wider_factor_is_not_copied():
    """The first factor must have its rows one after another; the narrower one is turned for it."""
    for outputs, inputs in ((3, 8), (8, 3)):
        found = outer(numbers(20, outputs), numbers(20, inputs))
        assert found.shape == (outputs, inputs)
        assert found.is_contiguous() == (outputs < inputs)  # computed as (O, I), or turned


def test_only_the_gradients_that_are_asked_for():
    x, weight = numbers(4, 6), numbers(5, 6).requires_grad_()
    Product.apply(x, weight).sum().backward()
    assert x.grad is None and (weight.grad - x.sum(0)).abs().max() < 1e-5
    x.requires_grad_(), weight.requires_grad_(False)
    Product.apply(x, weight).sum().backward()
    assert (x.grad - weight.sum(0)).abs().max() < 1e-5


def test_without_onednn_torch_computes(monkeypatch):
    x, weight = numbers(4, 6), numbers(5, 6)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "without oneDNN" in why_not_onednn()
    assert torch.equal(times(x, weight), x @ weight.mT)
    monkeypatch.undo()
    monkeypatch.setattr(onednn_products, "hasattr", lambda *_: False, raising=False)
    assert "no operation" in why_not_onednn()


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_of_a_model(tied):
    model, tokens = small(tied=tied), some_tokens(3, 17)
    fast, found = on_onednn(faster(model)), []
    for one in (model, fast):
        loss = next_token_loss(one(tokens), tokens)
        loss.backward()
        found.append((loss.item(), gradients(one)))
    (loss, plain), (other, ours) = found
    assert abs(loss - other) < 1e-12 and far(plain, as_parts(fast, ours)) < 1e-12
    assert (fast.head.weight is fast.embedding.weight) == tied
    assert far(weights(separated(fast)), weights(model)) == 0
    assert not any(type(module) is nn.Linear for module in fast.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_training(dtype):
    """In FP32 by oneDNN where there is one; the same losses as the plain step's all along."""
    batches, curves = [some_tokens(4, 17)] * 6, []
    for model, make, step in (
        (small().to(dtype), adamw, plain_step),
        (on_onednn(faster(small().to(dtype))), fused_adamw, faster_step),
    ):
        options = {"optimizer": make(model, 1e-2), "step": step, "progress": False}
        curves.append(train(model, batches, steps=6, **options))
    near = 1e-4 if dtype == torch.float32 else 1e-10
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < near
    assert curves[1][-1] < curves[1][0] - 0.5


def test_a_bias_stays_where_it_is_and_nothing_to_do_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    found = on_onednn(model)
    assert type(found[0]) is nn.Linear and type(found[1]) is OneDnnLinear
    with pytest.raises(ValueError, match="no module is chosen"):
        on_onednn(nn.Sequential(nn.Linear(4, 4)))


def test_the_libraries_can_be_raced():
    result = libraries_raced(16, 8, 24)
    assert set(result.seconds) == {"torch", "oneDNN"}

"""What is trained for is what `quantize` gives, and gradients pass rounding untouched."""

import pytest
import torch

from companion.losses import next_token_loss
from companion.quantization import minimum, quantize
from companion.quantization.aware import Aware, aware_step, straight_through
from companion.quantization.replacing import Coding, codings, nearest
from companion.surgery import copied
from companion.tests.test_replacing import small, tokens
from companion.training import adamw, train

OPTIONS = [
    {"bits": 2, "group": 16},
    {"bits": 4, "mapping": minimum, "head": None},
    {"bits": "nf4", "group": 8, "head": 4},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_model_trained_for_is_the_one_that_quantize_gives(options, tied):
    model = small(tied=tied)
    seen = Aware(model, codings(model, **options))(tokens())
    assert torch.equal(quantize(model, **options)(tokens()), seen)
    train(model, [tokens()] * 3, steps=3, optimizer=adamw(model, 1e-2),
          step=aware_step(**options), progress=False)  # fmt: skip
    seen = Aware(model, codings(model, **options))(tokens())
    assert torch.equal(quantize(model, **options)(tokens()), seen)


def test_the_gradient_is_that_at_the_rounded_weights():
    """Straight through: d loss / d weight is taken at the rounded weight, and not changed."""
    model = small()
    options = {"bits": 3, "group": 16, "head": None}
    plan = codings(model, **options)
    next_token_loss(Aware(model, plan)(tokens()), tokens()).backward()
    slow = copied(small())
    with torch.no_grad():
        for name, coding in plan.items():
            weight = slow.get_submodule(name).weight
            weight.copy_(nearest("", weight, coding).numbers(weight.shape[1]))
    next_token_loss(slow(tokens()), tokens()).backward()
    pairs = zip(model.parameters(), slow.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7) for a, b in pairs)


def test_rounding_forward_identity_backward():
    weight = torch.randn(4, 8, requires_grad=True)
    out = straight_through(weight, Coding(bits=2))
    assert torch.equal(out, nearest("", weight.detach(), Coding(bits=2)).numbers(8))
    (out * torch.arange(8.0)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(8.0).expand(4, 8))


def test_training_through_rounded_weights_beats_rounding_afterwards():
    """On one text learned by heart, at two bits: the loss after QAT is below that of the plain."""
    text, options = tokens(), {"bits": 2, "group": 16, "head": None}
    plain, aware = small(), small()
    for model, step in ((plain, {}), (aware, {"step": aware_step(**options)})):
        train(model, [text] * 60, steps=60, optimizer=adamw(model, 5e-3), progress=False, **step)
    losses = [next_token_loss(quantize(m, **options)(text), text).item() for m in (plain, aware)]
    assert losses[1] < 0.7 * losses[0]


def test_bad_options_are_refused_at_the_first_step():
    model = small()
    with pytest.raises(ValueError, match="bits is 1"):
        aware_step(1)(model, adamw(model), tokens())
    with pytest.raises(ValueError, match="quantized already"):
        aware_step(4)(quantize(model), adamw(model), tokens())

"""Emulated formats against native ones, to the last bit where the order of sums cannot matter."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from companion.losses import next_token_loss
from companion.model import LanguageModel, ModelConfig
from companion.precision.emulation import Emulation, Lost, emulated, to_format
from companion.precision.formats import FORMATS
from companion.precision.mixed import mixed_step
from companion.precision.policy import Policy
from companion.precision.scaling import LossScale
from companion.tests.test_precision_mixed import HERE, batches, gradients, same, small
from companion.training import train

CASTS = {"FP16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(autouse=True)
def sums_in_fp32(monkeypatch):
    """By default torch lets a GPU cut a sum of BF16 products and add the parts in BF16."""
    if HERE.type == "cuda":
        name = "allow_bf16_reduced_precision_reduction"
        monkeypatch.setattr(torch.backends.cuda.matmul, name, False)


def grid(*shape, steps, seed=0):
    """Numbers k / steps with |k| < steps: their products and short sums are exact in FP32."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randint(1 - steps, steps, shape, generator=draw) / steps).to(HERE)


def both(policy, operation, operands):
    """Result and gradients, in FP32, of an operation under a policy."""
    leaves = [x.clone().requires_grad_() for x in operands]
    with policy:
        result = operation(*leaves)
    slopes = torch.autograd.grad(result, leaves, grid(*result.shape, steps=8).to(result.dtype))
    return [x.detach().float() for x in (result, *slopes)]


OPERATIONS = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: x @ w.T,
    "batched": lambda x, w: torch.bmm(x[None], w.T[None]),
    "sum of products": lambda x, w: F.linear(x, w) + F.linear(x, w),
    "products multiplied": lambda x, w: F.linear(x, w) * F.linear(x, w),
    "relu": lambda x, w: F.relu(F.linear(x, w)),
    "silu": lambda x, w: F.silu(F.linear(x, w)),
    "halves": lambda x, w: torch.cat([-F.linear(x, w).chunk(2, -1)[1], F.linear(x, w)], -1),
    "promoted": lambda x, w: F.linear(x, w) * x[:, :1],
    "norm": lambda x, w: F.rms_norm(F.linear(x, w), (12,)),
    "softmax": lambda x, w: F.softmax(F.linear(x, w), -1),
    "used twice": lambda x, w: (lambda y: y * 3 + y.exp())(F.linear(x, w)),
}


@pytest.mark.parametrize("format", CASTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_native_ones_bit_for_bit(name, format):
    operands = grid(9, 16, steps=64), grid(12, 16, steps=64, seed=1)
    native = both(Policy(CASTS[format]), OPERATIONS[name], operands)
    ours = both(Emulation(format), OPERATIONS[name], operands)
    plain = both(Emulation("FP32"), OPERATIONS[name], operands)
    for a, b in zip(ours, native, strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("format", CASTS)
def test_native_products_add_up_in_fp32(format):
    ones = torch.ones(1, 4096, device=HERE, dtype=CASTS[format])
    with Emulation(format):
        ours = F.linear(ones.float(), ones.float())
    assert F.linear(ones, ones).item() == ours.item() == 4096
    stalled = torch.zeros((), dtype=CASTS[format])
    for _ in range(4096):
        stalled += 1
    assert stalled.item() == {"FP16": 2048, "BF16": 256}[format]


@pytest.mark.parametrize("format", CASTS)
def test_a_network_equals_autocast_bit_for_bit(format):
    net = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8)).to(HERE)
    with torch.no_grad():
        for seed, parameter in enumerate(net.parameters()):
            parameter.copy_(grid(*parameter.shape, steps=8, seed=seed))
    x, slope = grid(9, 16, steps=16), grid(9, 8, steps=8, seed=3)
    ours = emulated(net, format)(x)
    with torch.autocast(HERE.type, CASTS[format]):
        native = net(x)
    assert torch.equal(ours, native.float()) and native.dtype == CASTS[format]
    expected = torch.autograd.grad(native, list(net.parameters()), slope.to(native.dtype))
    copy = emulated(net, format)
    found = torch.autograd.grad(copy(x), list(copy.parameters()), slope)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("format", "bound"), [("BF16", 0.04), ("FP16", 0.005)])
def test_a_language_model_equals_autocast(format, bound):
    torch.manual_seed(0)
    shape = {"layers": 2, "heads": 4, "kv_heads": 2, "width": 16, "hidden": 16}
    model = LanguageModel(ModelConfig(vocab=50, context=16, **shape)).to(HERE)
    tokens, copy = batches()[0].to(HERE), emulated(model, format)
    with sdpa_kernel(SDPBackend.MATH):  # the fast kernels round inside attention once more
        with torch.autocast(HERE.type, CASTS[format]):
            logits = model(tokens)
        ours = copy(tokens)
        loss, native = next_token_loss(ours, tokens), next_token_loss(logits, tokens)
        found, expected = gradients(copy, 1024 * loss), gradients(model, 1024 * native)
    for a, b in zip((ours, *found), (logits.float(), *expected), strict=True):
        assert (a - b).norm() <= bound * b.norm()  # sums of another order turn some roundings
        if HERE.type == "cpu" and format == "BF16":
            assert torch.equal(a, b)


def test_the_fast_attention_differs_by_little_more():
    model, tokens = small(), batches()[0].to(HERE)
    ours = emulated(model, "FP16")(tokens)
    with torch.autocast(HERE.type, torch.float16):
        native = model(tokens).float()
    assert (ours - native).norm() <= 0.005 * native.norm()


@pytest.mark.parametrize("format", [name for name, found in FORMATS.items() if found.dtype])
def test_rounds_as_torch_casts(format):
    x = torch.cat([torch.randn(500) * 2.0**k for k in range(-30, 20, 5)]).to(HERE)
    assert torch.equal(
        to_format(format)(x).nan_to_num(), x.to(FORMATS[format].dtype).float().nan_to_num()
    )


def test_a_format_that_torch_lacks():
    x = torch.randn(9, 16, device=HERE)
    with Emulation("TF32"):
        y = F.linear(x, x)
    short = to_format("TF32")(x)
    assert torch.equal(y, to_format("TF32")(F.linear(short, short)))
    assert ((short - x).abs() <= x.abs() * 2.0**-11).all() and not torch.equal(short, x)


def test_fp32_is_the_model_itself():
    model, tokens = small(), batches()[0].to(HERE)
    copy = emulated(model, "FP32")
    assert torch.equal(copy(tokens), model(tokens))
    loss, other = next_token_loss(copy(tokens), tokens), next_token_loss(model(tokens), tokens)
    pairs = zip(gradients(copy, loss), gradients(model, other), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match=r"format is 'FP12'; known are: FP32.*BF16"):
        emulated(small(), "FP12")


def test_counts_what_gradients_lose():
    lost, x = Lost(), grid(4, 8, steps=8)
    weight = nn.Linear(8, 3, bias=False).to(HERE)
    slope = torch.full((4, 3), 1.0, device=HERE)
    slope[0, 0], slope[1, 1], slope[2, 2] = 2.0**-26, 2.0**17, 0.0  # one too small, one too large
    y = emulated(weight, "FP16", lost=lost)(x)
    (y * slope).sum().backward()  # the gradient arrives at y first
    arrived = to_format("FP16")(slope).T @ x
    assert lost.values == 11 + (arrived != 0).sum().item()  # at y, then at the weight
    assert lost.underflowed == 1 and lost.overflowed == 1


def test_a_gradient_below_the_range_vanishes_and_a_scale_brings_it_back():
    x, weight = torch.ones(1, 4, device=HERE), nn.Linear(4, 2, bias=False).to(HERE)
    tiny, scale = 2.0**-30, 2.0**16
    slopes = {}
    for factor in (1.0, scale):
        layer = emulated(weight, "FP16")
        (layer(x) * (tiny * factor)).sum().backward()
        slopes[factor] = layer.weight.grad / factor
    assert (slopes[1.0] == 0).all() and (slopes[scale] == tiny).all()


def test_trains_with_a_dynamic_scale_and_skips_what_overflows():
    start = small()
    model, scale = emulated(start), LossScale(2.0**24)
    losses = train(model, batches(), steps=16, step=mixed_step(scale), progress=False)
    assert scale.skipped >= 3 and scale.good > 5 and scale.value < 2.0**24
    assert losses[-1] < losses[0] - 0.1
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert same(start, small())
    halves = next(model.parameters())
    assert not torch.equal(halves, to_format("FP16")(halves))  # masters keep what FP16 cannot


def test_infinite_activations_are_a_loss_that_is_not_finite():
    model = small()
    with torch.no_grad():
        model.blocks[0].mlp.gate.weight.mul_(1e6)
        model.blocks[0].mlp.up.weight.mul_(1e6)
    batch = batches()[0].to(HERE)
    assert next_token_loss(model(batch), batch).isfinite()
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0, loss scale 65536"):
        train(emulated(model), batches(), steps=2, step=mixed_step(LossScale()), progress=False)

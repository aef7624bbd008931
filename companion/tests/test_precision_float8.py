"""FP8 against torchao's scaling and casts, torch._scaled_mm, and products written out."""

import logging
import warnings

import pytest
import torch

from companion.kept import kept_bytes
from companion.memory import stored_bytes
from companion.precision.float8 import (
    BACKWARD,
    FORWARD,
    DelayedScale,
    Float8Linear,
    Scaled,
    emulated_product,
    float8,
    has_float8,
    native_product,
    product,
    scaled,
)
from companion.precision.rounding import rounded
from companion.surgery import copied
from companion.tests.equalities import far, refusals, some_batches, weights
from companion.tests.test_model import small, some_tokens
from companion.training import adamw, load_checkpoint, save_checkpoint, train

NAMES = {FORWARD: "E4M3", BACKWARD: "E5M2"}
on_float8 = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_float8(torch.device("cuda"))),
    reason="no GPU with FP8 units here",
)


def wide(*shape, seed=0):
    """Numbers over several powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(2 * torch.randn(shape, generator=generator))
    return torch.randn(shape, generator=generator) * size


def backs(x, weight, slope, multiply):
    """Output and both gradients of a linear layer, whose products `multiply` computes."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = multiply(x, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), slope)


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_scales_and_codes_are_torchaos(dtype, source):
    logging.getLogger("torchao").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao = pytest.importorskip("torchao.float8.float8_scaling_utils")
    for numbers in (wide(30, 40), 1e-6 * wide(3, 5, seed=1), torch.zeros(4, 4)):
        numbers = numbers.to(source)
        theirs = torchao.hp_tensor_to_float8_dynamic(numbers, dtype, None)
        ours = scaled(numbers, dtype)
        assert ours.codes.dtype == dtype and torch.equal(ours.scale, theirs._scale)
        assert torch.equal(ours.codes.view(torch.uint8), theirs._data.view(torch.uint8))


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_a_scaled_tensor_reaches_the_top_and_no_further(dtype):
    numbers, top = wide(50, 50), torch.finfo(dtype).max
    found = scaled(numbers, dtype)
    assert found.codes.float().abs().max() == top
    assert torch.equal(found.codes.float(), rounded(numbers * found.scale, NAMES[dtype]))
    far_off = scaled(numbers, dtype, found.scale * 100)  # clipped, neither nan nor inf
    assert far_off.codes.float().isfinite().all() and far_off.codes.float().abs().max() == top


def test_a_product_is_that_of_the_numbers():
    a, b = scaled(wide(20, 30), BACKWARD), scaled(wide(30, 10, seed=1))
    exact = (a.codes.double() / a.scale.double()) @ (b.codes.double() / b.scale.double())
    size = (a.numbers().abs() @ b.numbers().abs()).double()
    for dtype, digits in ((torch.float32, 2**-18), (torch.bfloat16, 2**-8)):
        found = product(a, b, dtype)
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= digits * size).all()
    assert torch.equal(b.turned().numbers(), b.numbers().T)


def test_a_layer_is_three_products_of_rounded_operands():
    x, weight, slope = wide(2, 5, 24), wide(12, 24, seed=1), 1e-5 * wide(2, 5, 12, seed=2)
    linear = torch.nn.Linear(24, 12, bias=False)
    linear.weight.data = weight
    layer = Float8Linear(linear, "current", 1)
    y, to_x, to_weight = backs(x, weight, slope, lambda x, w: layer_with(layer, w)(x))
    x8, w8 = (scaled(t, FORWARD).numbers() for t in (x, weight))
    slope8 = scaled(slope, BACKWARD).numbers()
    expected = x8 @ w8.T, slope8 @ w8, slope8.flatten(0, 1).T @ x8.flatten(0, 1)
    for found, known in zip((y, to_x, to_weight), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-6 * known.abs().max().item())
    plain = backs(x, weight, slope, torch.nn.functional.linear)
    for found, known in zip((y, to_x, to_weight), plain, strict=True):
        assert 0.005 < (found - known).norm() / known.norm() < 0.2  # it did round


def layer_with(layer, weight):
    """The layer with another tensor as its weight, which autograd may look at."""
    del layer.weight
    layer.weight = weight
    return layer


def test_only_the_layers_inside_the_blocks_change():
    model = small()
    eight = float8(model)
    kinds = [name for name, m in eight.named_modules() if isinstance(m, Float8Linear)]
    assert len(kinds) == 7 * 2 and all(name.startswith("blocks.") for name in kinds)
    assert stored_bytes(eight) == stored_bytes(model)
    assert eight.head.weight is eight.embedding.weight
    before = weights(model)
    train(eight, some_batches(), steps=1, progress=False)
    assert far(before, weights(model)) == 0
    assert (eight(some_tokens()) - model(some_tokens())).abs().max() > 1e-3


def test_what_the_forward_pass_keeps():
    def kept(model):
        return kept_bytes(model, lambda: model(some_tokens(4, 32)))

    plain, tokens = small().float(), 4 * 32
    # FP32 inputs of a block, once each; that of `out` is kept by attention in any case
    inputs = tokens * 4 * (32 + 32 + 48)
    # a code a number: query, key, value, out, gate, up and down have their own; so do weights
    codes = tokens * (6 * 32 + 48) + (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    scales = 7 * 2 * 4
    assert kept(plain) - kept(float8(plain)) == 2 * (inputs - codes - scales)


@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_a_training_in_fp8_stays_near_fp32(scaling):
    plain = small().float()
    model = float8(plain, scaling)
    data = some_batches() * 4
    ours = train(model, data, steps=20, optimizer=adamw(model, 3e-3), progress=False)
    theirs = train(plain, data, steps=20, optimizer=adamw(plain, 3e-3), progress=False)
    gap = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert 0 < gap < 0.15 and theirs[0] - theirs[-1] > 1  # nats


def test_without_scaling_small_gradients_vanish():
    for scaling, share in (("none", 1.0), ("current", 0.0)):
        model = float8(small().float(), scaling)
        logits = model(some_tokens())
        logits.backward(torch.full_like(logits, 1e-7))  # E5M2 ends at 2^-16 = 1.5e-5
        slopes = model.blocks[0].mlp.down.weight.grad
        assert (slopes == 0).float().mean() == pytest.approx(share, abs=0.05)


def test_delayed_scales_are_those_of_the_past():
    delayed, tops = DelayedScale(2), []
    for size in (1.0, 4.0, 2.0, 0.5, 0.25):
        found = delayed(torch.tensor([size, -size / 8]), FORWARD, True)
        tops.append((found.scale.item() / 448, found.numbers()[0].item()))
    # the first by itself; then by the larger of the last two: 1, 4, 4, 2
    assert tops == [(1, 1.0), (1, 1.0), (1 / 4, 2.0), (1 / 4, 0.5), (1 / 2, 0.25)]
    assert delayed.history.tolist() == [0.25, 0.5]
    delayed(torch.tensor([9.0]), FORWARD, False)
    assert delayed.history.tolist() == [0.25, 0.5]


def test_the_history_is_written_in_training_and_saved(tmp_path):
    model = float8(small().float(), "delayed", calls=3)
    history = model.blocks[0].mlp.up.input_scale.history
    model.eval()(some_tokens())
    assert (history == 0).all()
    optimizer = adamw(model)
    train(model, some_batches(), steps=2, optimizer=optimizer, progress=False)
    assert (history > 0).tolist() == [True, True, False]
    slope_history = model.blocks[0].mlp.up.slope_scale.history
    assert (slope_history > 0).tolist() == [True, True, False]
    save_checkpoint(tmp_path / "x.safetensors", model, optimizer, step=2)
    again = float8(small().float(), "delayed", calls=3)
    load_checkpoint(tmp_path / "x.safetensors", again, adamw(again))
    assert torch.equal(again.blocks[0].mlp.up.input_scale.history, history)


def odd_and_even():
    """Pairs of codes whose axes are and are not multiples of 16, E5M2 on the left of one."""
    for rows, inner, columns in ((32, 64, 48), (5, 24, 50)):
        for left in (FORWARD, BACKWARD):
            yield scaled(wide(rows, inner), left), scaled(wide(columns, inner, seed=1)).turned()


def test_the_native_product_is_the_emulated_one():
    for a, b in odd_and_even():
        try:
            found = native_product(a, b, torch.float32)
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"torch._scaled_mm does not run here: {error}")
        size = a.numbers().abs() @ b.numbers().abs()
        assert ((found - emulated_product(a, b, torch.float32)).abs() <= 2**-20 * size).all()


@on_float8
def test_the_fp8_units_give_the_emulated_product():
    for a, b in odd_and_even():
        a, b = (Scaled(t.codes.cuda(), t.scale.cuda()) for t in (a, b))
        size = a.numbers().abs() @ b.numbers().abs()
        gap = (product(a, b) - emulated_product(a, b, torch.float32)).abs()
        # the units align 32 products and keep about 14 bits of each, less than FP32's 24
        assert (gap <= 2**-7 * size * a.codes.shape[1] / 32).all()
        assert gap.norm() < 2**-9 * size.norm()
        assert product(a, b, torch.bfloat16).dtype == torch.bfloat16


@on_float8
def test_a_step_on_the_fp8_units_is_the_emulated_step(monkeypatch):
    tokens = some_tokens(4, 16).cuda()

    def slopes(change=float8):
        model = change(small().float()).cuda()
        model(tokens).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    native, exact = slopes(), slopes(copied)
    monkeypatch.setattr("companion.precision.float8.has_float8", lambda device: False)
    emulated = slopes()
    gaps = [(found - exact).norm() / exact.norm() for found in (native, emulated)]
    assert gaps[0] < 1.2 * gaps[1] and 0.01 < gaps[1] < 0.4
    # a sum that differs in its last bits may be rounded to another code in the next layer
    assert (native - emulated).norm() / exact.norm() < gaps[1]


def test_bad_input():
    found = refusals(
        [
            lambda: float8(small(), "block"),
            lambda: float8(small(), "delayed", calls=0),
            lambda: float8(float8(small())),  # no linear layer is left to choose
        ]
    )
    for message, words in zip(found, ("current, delayed", "calls is 0", "no module"), strict=True):
        assert words in message


def test_under_autocast_a_layer_takes_and_gives_its_type():
    torch.manual_seed(0)
    layer = float8(small()).blocks[0].mlp.up
    x = torch.randn(3, layer.weight.shape[1])
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, layer(x.bfloat16()))
    found.float().sum().backward()
    assert layer.weight.grad.dtype == layer.weight.dtype

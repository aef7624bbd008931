"""The fused model computes what the readable one does with the same codes."""

import pytest
import torch

from companion.decoding import cache_for, generate
from companion.quantization import affine, minimum, quantize, symmetric
from companion.quantization.compiled_kernels import Compiled
from companion.quantization.decoders import on_kernel
from companion.quantization.fused import fused, joined
from companion.quantization.kernels import KERNELS, available
from companion.quantization.layers import QuantizedLinear
from companion.tests.test_replacing import small, tokens

WIDE = {"width": 64, "hidden": 96, "vocab": 64}  # what the four-bit kernel can take


def quantized(bits=8, **options):
    return quantize(small(**WIDE), bits, mapping=symmetric, **options)


def plain_kernels(monkeypatch):
    """Plain layers in place of kernels: what is left to differ is the rewriting itself."""
    monkeypatch.setattr("companion.quantization.fused.kernel", lambda linear, name: linear)
    monkeypatch.setattr("companion.quantization.fused.available", lambda name: True)


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group": 32}, {"bits": 3, "group": 16}])
def test_rewriting_changes_nothing(monkeypatch, options):
    plain_kernels(monkeypatch)
    model = quantized(**options)
    new, text = fused(model, "Int8Weights"), tokens()
    assert torch.allclose(new(text), model(text), rtol=1e-5, atol=1e-5)
    cache, parts = cache_for(new, batch=2), []
    for part in (text[:, :9], text[:, 9:10], text[:, 10:]):
        parts.append(new(part, cache))
    assert torch.allclose(torch.cat(parts, dim=1), model(text), rtol=1e-4, atol=1e-5)


def test_rewriting_an_affine_or_untied_model_changes_nothing(monkeypatch):
    plain_kernels(monkeypatch)
    for mapping in (minimum, affine, symmetric):
        model = quantize(small(tied=False), 4, group=16, mapping=mapping)
        assert torch.allclose(fused(model, "Int4Weights")(tokens()), model(tokens()), atol=1e-5)


CASES = [("Int8Weights", {"bits": 8}), ("Int4Weights", {"bits": 4, "group": 32}),
         ("Int8Products", {"bits": 8}), ("Int4Compiled", {"bits": 4, "group": 32}),
         ("Int8Compiled", {"bits": 8})]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), CASES)
def test_kernels_stay_near(name, options):
    if not available(name):
        pytest.skip(f"torch has no {name} here")
    model = quantized(**options)
    new, text = fused(model, name), tokens()
    expected = model(text)
    cache = cache_for(new, batch=2)
    assert cache.keys.dtype == new.dtype
    steps = torch.cat([new(text[:, i : i + 1], cache) for i in range(20)], dim=1).float()
    assert (steps - expected).norm() < 0.05 * expected.norm()
    assert generate(new, text[:, :4], 5).shape == (2, 9)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_long_and_short_readings_follow_each_other(name, options):
    """Three tokens, then more than a kernel takes, then one: as the readable model reads them."""
    if not available(name):
        pytest.skip(f"torch has no {name} here")
    model = quantized(**options)
    new, text = fused(model, name), tokens(2, 30)
    cache, parts = cache_for(new, batch=2), []
    for part in (text[:, :3], text[:, 3:20], text[:, 20:21], text[:, 21:]):
        parts.append(new(part, cache).float())
    expected, found = model(text), torch.cat(parts, dim=1)
    assert (found - expected).norm() < 0.08 * expected.norm()
    assert new(text).dtype == torch.float32  # many positions at once


def test_the_model_given_survives():
    model = quantized()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if available("Int8Weights"):
        fused(model, "Int8Weights")
    now = model.state_dict()
    assert all(torch.equal(before[name], now[name]) and before[name].dtype == now[name].dtype
               for name in before)  # fmt: skip


def test_joined_layers_give_their_outputs_one_after_another():
    mlp = quantized(bits=4, group=16).blocks[0].mlp
    x = torch.randn(3, 64)
    both = joined([mlp.gate, mlp.up])
    assert isinstance(both, QuantizedLinear)
    assert torch.allclose(both(x), torch.cat([mlp.gate(x), mlp.up(x)], dim=-1), atol=1e-6)


def test_a_plain_model_can_be_put_on_a_kernel_at_once(monkeypatch):
    plain_kernels(monkeypatch)
    monkeypatch.setattr("companion.quantization.torch_kernels.products_bits", lambda: 7)
    most = {}
    for name in [name for name, kind in KERNELS.items() if not issubclass(kind, Compiled)]:
        new = on_kernel(small(**WIDE), name)
        both = (new.blocks[0].down, new.head)
        most[name] = [layer.matrix.unpacked().abs().max().item() for layer in both]
    assert most == {"Int4Weights": [8, 63], "Int8Weights": [127, 127], "Int8Products": [63, 63]}
    monkeypatch.setattr("companion.quantization.decoders.available", lambda n: False)
    assert on_kernel(small(**WIDE), "Int4Weights").head.matrix.unpacked().abs().max() == 127


def test_what_cannot_be_fused_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="not quantized from embedding to head"):
        fused(small(), "Int8Weights")
    with pytest.raises(ValueError, match="not quantized from embedding to head"):
        fused(quantize(small(), head=None), "Int8Weights")
    mixed = quantize(small(), {n: 8 if "up" in n else 4 for n in _layers()}, mapping=symmetric)
    some = quantize(small(), {n: 8 for n in _layers() if "down" in n}, mapping=symmetric)
    with pytest.raises(ValueError, match="not quantized from embedding to head"):
        fused(some, "Int8Weights")
    with pytest.raises(ValueError, match="only codes on a grid"):
        fused(quantize(small(), "nf4", group=16), "Int4Weights")
    if available("Int8Weights"):
        with pytest.raises(ValueError, match="a symmetric grid a row"):
            fused(quantize(small(**WIDE), 4, group=32), "Int4Weights")  # the head is affine too
    with pytest.raises(ValueError, match="not quantized alike"):
        joined([mixed.blocks[0].mlp.gate, mixed.blocks[0].mlp.up])
    with pytest.raises(ValueError, match="joined row by row"):
        joined([quantized(group="tensor").blocks[0].mlp.gate] * 2)
    monkeypatch.setattr("companion.quantization.fused.available", lambda name: False)
    with pytest.raises(ValueError, match="no kernel Int8Weights on this processor"):
        fused(quantized(), "Int8Weights")


def _layers():
    return [name for name, module in small().named_modules()
            if isinstance(module, torch.nn.Linear) and name.startswith("blocks.")]  # fmt: skip


def test_bad_tokens_are_refused(monkeypatch):
    plain_kernels(monkeypatch)
    model = fused(quantized(), "Int8Weights")
    with pytest.raises(ValueError, match="33 positions exceed the context of 32"):
        model(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match="ids run from 64 to 64, not 0 to 63"):
        model(torch.full((1, 3), 64))


def test_a_fused_model_keeps_its_number_formats():
    """Half of its tensors would be converted, and its kernels could not read them."""
    if not available("Int8Weights"):
        pytest.skip("torch has no such kernel here")
    model = fused(quantized(), "Int8Weights")
    assert model.to("cpu") is model and model.eval() is model
    with pytest.raises(ValueError, match=r"stays in its number formats .* torch.float16 on cpu"):
        model.half()
    with pytest.raises(ValueError, match=r"torch.float32 on meta"):
        model.to("meta")

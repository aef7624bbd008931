"""Compiled loops compute what torch does, and a token takes them where it can."""

import copy
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import rms_norm

from companion.decoding import Cache, cache_for, generate
from companion.model import attend, rotary_angles, rotate
from companion.quantization import compiled, minimum, quantize, symmetric
from companion.quantization.caches import QuantizedCache
from companion.quantization.compiled_kernels import Int4Compiled
from companion.quantization.compiled_model import PRODUCTS, CompiledModel
from companion.quantization.decoders import on_kernel
from companion.quantization.fused import fused
from companion.quantization.kernels import available
from companion.quantization.layers import QuantizedMatrix
from companion.quantization.replacing import Coding
from companion.tests.test_fused import WIDE
from companion.tests.test_kernels import linear
from companion.tests.test_replacing import small, tokens

NAMES = ("Int4Compiled", "Int8Compiled")


def vector(count, seed=0):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def read(rounded):
    codes, scales, _ = rounded
    return (codes.reshape(len(scales), -1) * scales[:, None]).ravel()


def test_compiled_kernels_run_here():
    assert all(available(name) for name in NAMES)


def test_vectors_are_rounded_to_seven_bits_in_groups():
    x = vector(96)
    x[40] = 1000  # its group of 32 suffers, the others do not
    codes, scales, sums = rounded = compiled.rounded(x)
    assert codes.dtype == np.int16 and np.abs(codes.reshape(3, -1)).max(1).tolist() == [63] * 3
    assert np.allclose(scales, np.abs(x.reshape(3, -1)).max(1) / 63)
    apart = np.abs(read(rounded) - x).reshape(3, -1).max(1)
    assert (apart <= scales * 0.5001).all()
    assert np.allclose(sums, read(rounded).reshape(3, -1).sum(1), atol=1e-4)


@pytest.mark.parametrize("size", [0, 1e-38])
def test_a_vector_of_next_to_nothing_becomes_zeros(size):
    """63 / 1e-38 is more than FP32 holds."""
    x = np.full(32, size, np.float32)
    x[5] = 0
    codes, scales, sums = compiled.rounded(x)
    assert not codes.any() and not sums.any() and np.isfinite(scales).all()


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_four_bits_are_the_products_of_the_rounded_vector(shares):
    """To FP32, whatever the number of threads: the whole numbers between are exact."""
    plain = linear(Coding(bits=4, group=64, mapping=minimum))
    x, out = vector(128), np.empty(48, np.float32)
    compiled.four_bits(Int4Compiled(plain.matrix).arrays, x, out, shares)
    expected = plain(torch.from_numpy(read(compiled.rounded(x)))).numpy()
    assert np.allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_products_fit_their_sixteen_bits(sign):
    codes = torch.full((16, 2, 32), 7, dtype=torch.int8)  # stored as 15
    scheme = minimum(torch.zeros(16, 2, 1), torch.ones(16, 2, 1), 4)
    matrix = QuantizedMatrix(codes, scheme, 64)
    out = np.empty(16, np.float32)
    compiled.four_bits(Int4Compiled(matrix).arrays, np.full(64, sign, np.float32), out, 1)
    assert np.allclose(out, sign * matrix.expand().sum(1).numpy(), rtol=1e-4)


def test_the_pieces_of_a_block_are_those_of_the_model():
    config = small(**WIDE).config
    cos, sin = rotary_angles(config)
    heads, width = config.heads, config.head_width

    def states(count):  # (1, count, 8 positions, D)
        return torch.from_numpy(vector(count * 8 * width, count)).view(1, count, 8, width)

    query, keys, values = states(heads), states(config.kv_heads), states(config.kv_heads)
    turned = query[0, :, 3].contiguous().numpy()
    expected = rotate(query[:, :, 3:4], cos[3:4], sin[3:4])[0, :, 0]
    compiled.turn(turned, cos[3, : width // 2].numpy(), sin[3, : width // 2].numpy())
    assert np.allclose(turned, expected, atol=1e-6)
    out = np.empty_like(turned)
    compiled.attend(turned, keys[0].numpy(), values[0].numpy(), 5, out)
    one = attend(torch.from_numpy(turned)[None, :, None], keys[:, :, :5], values[:, :, :5])
    assert np.allclose(out, one[0, :, 0], atol=1e-5)
    x, weight = vector(64), vector(64, 1)
    norm = rms_norm(torch.from_numpy(x), (64,), torch.from_numpy(weight), 1e-5)
    assert np.allclose(compiled.normed(x, weight, np.float32(1e-5)), norm, atol=1e-6)


def made(name):
    bits, group = (4, 32) if name == "Int4Compiled" else (8, "row")
    model = quantize(small(**WIDE), bits, group=group, mapping=symmetric,
                     head=Coding(bits=8, mapping=symmetric))  # fmt: skip
    return model, fused(model, name, head="Int8Compiled", kind=CompiledModel)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_in_one_call_is_the_readable_models(name, monkeypatch):
    model, new = made(name)
    calls, token = [], compiled.token
    monkeypatch.setattr(compiled, "token", lambda *given: calls.append(1) or token(*given))
    text, cache = tokens()[:1], cache_for(new)
    steps = [new(text[:, :9], cache)]
    steps += [new(one, cache) for one in text[:, 9:].split(1, dim=1)]
    assert len(calls) == text.shape[1] - 9 and cache.length == text.shape[1]
    expected, found = model(text), torch.cat(steps, dim=1)
    worst = 1e-5 if name == "Int8Compiled" else 0.05  # vectors in FP32; in 7 bits
    assert (found - expected).norm() < worst * expected.norm()


def test_an_8_bit_model_writes_what_the_readable_one_does():
    model, new = made("Int8Compiled")
    text = tokens()[:1, :5]
    assert torch.equal(generate(new, text, 20), generate(model, text, 20))


def test_the_number_of_threads_changes_nothing():
    _, new = made("Int4Compiled")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 64):  # more than there are
            torch.set_num_threads(threads)
            cache = cache_for(new)
            new(tokens()[:1, :9], cache)
            found.append(new(tokens()[:1, 9:10], cache))
    finally:
        torch.set_num_threads(before)
    assert all(torch.allclose(one, found[0], rtol=1e-3, atol=1e-4) for one in found)


def test_torch_keeps_its_number_of_threads():
    """As numba starts its own it sets torch's to all cores: two threads where one is timed."""
    code = """
import torch
torch.set_num_threads(1)
from companion.quantization.compiled_kernels import threads
assert threads() == 1 and torch.get_num_threads() == 1, torch.get_num_threads()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_batches_and_other_caches_take_the_other_way(monkeypatch):
    model, new = made("Int8Compiled")
    monkeypatch.setattr(compiled, "token", None)
    text = tokens(2)
    assert generate(new, text[:, :5], 3).shape == (2, 8)
    assert torch.allclose(new(text[:1, :1]), model(text[:1, :1]), atol=1e-4)  # no cache
    cache = QuantizedCache(new.config, bits=8)
    assert new(text[:1, :1], cache).shape == (1, 1, 64)
    double = Cache(new.config, dtype=torch.float64)
    assert new(text[:1, :1], double).shape == (1, 1, 64)


def test_a_cache_for_another_model_is_refused():
    """Compiled loops check no bounds."""
    _, new = made("Int8Compiled")
    one = tokens()[:1, :1]
    deeper = replace(new.config, layers=new.config.layers + 1)
    for cache in (Cache(new.config, batch=2), Cache(deeper)):
        with pytest.raises(ValueError, match="the cache is for"):
            new(one, cache)
        assert not cache.keys.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_norm_reaches_tokens_too(name):
    _, new = made(name)
    text, found = tokens()[:1], []
    for _ in range(2):
        cache = cache_for(new)
        new(text[:, :9], cache)
        found.append((new(text[:, 9:10], cache), new(text[:, :10])[:, 9:]))
        new.blocks[0].attention_norm.weight.mul_(2)
    whole, (after, changed) = found[0][1], found[1]
    assert (after - changed).norm() < 0.05 * changed.norm()
    assert (changed - whole).norm() > 0.05 * whole.norm()


def test_a_model_on_other_kernels_is_not_compiled():
    model = quantize(small(**WIDE), 8, mapping=symmetric)
    with pytest.raises(ValueError, match="Int8Compiled and Int8Weights are not both compiled"):
        fused(model, "Int8Compiled", kind=CompiledModel)


def test_a_full_cache_and_bad_tokens_are_refused_before_anything_is_written():
    _, new = made("Int8Compiled")
    cache = cache_for(new, capacity=3)
    new(tokens()[:1, :3], cache)
    held = cache.keys.clone()
    with pytest.raises(ValueError, match="4 positions exceed the cache's 3"):
        new(tokens()[:1, :1], cache)
    cache.rewind(2)
    with pytest.raises(ValueError, match="ids run from 64 to 64, not 0 to 63"):
        new(torch.tensor([[64]]), cache)
    assert torch.equal(cache.keys, held) and cache.length == 2


def test_weights_are_stored_once_and_copies_have_their_own():
    _, new = made("Int4Compiled")
    cache = cache_for(new)
    new(tokens()[:1, :3], cache)
    expected = new(tokens()[:1, 3:4], cache)
    for product in PRODUCTS:
        part = getattr(new.blocks[1], product)
        for name in part.names:
            whole = getattr(new, f"{product}_{name}")
            assert whole[1].data_ptr() == getattr(part, name).data_ptr()
    twin = copy.deepcopy(new)
    twin.blocks[0].down.codes.zero_()
    cache.rewind(3)
    assert torch.equal(new(tokens()[:1, 3:4], cache), expected)
    cache.rewind(3)
    assert not torch.equal(twin(tokens()[:1, 3:4], cache), expected)


def test_a_plain_model_is_put_on_compiled_kernels_at_once():
    for name, bytes_each in (("Int4Compiled", 0.5 + 2 * 4 / 32), ("Int8Compiled", 1)):
        new = on_kernel(small(**WIDE), name)
        down = new.blocks[0].down
        assert isinstance(new, CompiledModel) and type(down).__name__ == name
        assert type(new.head).__name__ == "Int8Compiled"
        size = sum(array.nbytes for array in down.arrays) - (name[3] == "8") * 64 * 4
        assert size == bytes_each * 64 * 96

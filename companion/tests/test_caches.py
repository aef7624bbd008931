"""A quantized cache holds rounded keys and values, in the bytes it says."""

import pytest
import torch

from companion.decoding import Cache
from companion.quantization import affine
from companion.quantization.caches import QuantizedCache
from companion.quantization.grids import fit
from companion.tests.test_replacing import small, tokens


def entries(positions, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, positions, 8, generator=random)


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_what_comes_back_is_what_was_put_in_rounded(bits):
    cache = QuantizedCache(small().config, bits=bits, batch=2)
    parts = [(entries(5, 1), entries(5, 2)), (entries(1, 3), entries(1, 4))]
    for key, value in parts:
        keys, values = cache.extend(1, key, value)
        cache.advance(key.shape[2])
    for found, given in ((keys, 0), (values, 1)):
        whole = torch.cat([part[given] for part in parts], dim=2)
        grid = fit(whole, bits, mapping=affine).stored_as(torch.float16)
        assert torch.allclose(found, grid.rounded(whole), atol=1e-6)


def test_bytes_are_those_of_codes_scales_and_zeros():
    config = small().config
    for bits in (8, 4, 2):
        cache = QuantizedCache(config, bits=bits, batch=3, capacity=10)
        vectors = 2 * config.layers * 3 * config.kv_heads * 10
        assert cache.bytes == vectors * (config.head_width * bits // 8 + 2 + 1)
    assert cache.bytes < Cache(config, batch=3, capacity=10).bytes / 4


def test_a_model_reads_from_it_and_eight_bits_change_little():
    model = small()
    text = tokens()
    expected = model(text)
    far = []
    for bits in (8, 4, 2):
        cache = QuantizedCache(model.config, bits=bits, batch=2)
        with torch.no_grad():
            parts = [model(part, cache) for part in (text[:, :9], text[:, 9:10], text[:, 10:])]
        assert cache.length == 20
        far.append((torch.cat(parts, dim=1) - expected).norm() / expected.norm())
    assert far[0] < 0.01 and far == sorted(far)


def test_rewinding_forgets():
    model, text = small(), tokens()
    cache = QuantizedCache(model.config, batch=2)
    with torch.no_grad():
        model(text[:, :8], cache)
        first = model(text[:, 8:10], cache)
        cache.rewind(8)
        assert torch.equal(model(text[:, 8:10], cache), first)
    with pytest.raises(ValueError, match="cannot rewind to 11; the cache holds 10"):
        cache.rewind(11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits is 1"),
        ({"batch": 0}, "batch is 0"),
        ({"capacity": 33}, "capacity 33 exceeds the model's context of 32"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizedCache(small().config, **options)


def test_too_many_positions_and_other_shapes_are_refused():
    cache = QuantizedCache(small().config, batch=2, capacity=4)
    with pytest.raises(ValueError, match="5 positions exceed the cache's 4"):
        cache.extend(0, entries(5), entries(5))
    with pytest.raises(ValueError, match=r"keys for \(batch, heads\) \(1, 2\) do not fit"):
        cache.extend(0, entries(2)[:1], entries(2)[:1])

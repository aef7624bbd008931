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


def channel_cache(bits=4, capacity=100):
    return QuantizedCache(long().config, bits=bits, keys_by="channel", batch=2, capacity=capacity)


def long():
    return small(context=128)


def test_keys_by_channel_are_rounded_group_by_group_and_the_latest_wait():
    """However the positions arrive, whole groups of 32 are rounded and the rest is kept in full."""
    whole = entries(75)
    grid_of = [whole[:, :, i : i + 32].transpose(-1, -2) for i in (0, 32)]
    expected = [fit(x, 4, mapping=affine).stored_as(torch.float16).rounded(x) for x in grid_of]
    expected = torch.cat([x.transpose(-1, -2) for x in expected] + [whole[:, :, 64:]], dim=2)
    for sizes in ((75,), (1,) * 75, (31, 1, 1, 42), (40, 35), (64, 11)):
        cache, start = channel_cache(), 0
        for size in sizes:
            part = whole[:, :, start : start + size]
            keys, _ = cache.extend(1, part, part)
            cache.advance(size)
            start += size
        assert torch.allclose(keys, expected, atol=1e-6), sizes


def test_a_large_channel_costs_keys_by_channel_nothing():
    keys = entries(64)
    keys[..., 3] += 40
    errors = {}
    for by in ("position", "channel"):
        cache = QuantizedCache(long().config, bits=4, keys_by=by, batch=2)
        found, _ = cache.extend(0, keys, keys)
        errors[by] = (found - keys)[..., :3].abs().mean()
    assert errors["channel"] < 0.2 * errors["position"]


@pytest.mark.parametrize("length", [70, 64, 50, 33, 32, 31, 5, 0])
def test_keys_by_channel_can_be_rewound(length):
    """Reading on after a rewind sees the kept positions: as they are, or as they were rounded."""
    cache, whole = channel_cache(), entries(75)
    for layer in range(2):
        before, _ = cache.extend(layer, whole, whole)
    cache.advance(75)
    cache.rewind(length)
    new = entries(1, seed=9)
    for layer in range(2):
        after, _ = cache.extend(layer, new, new)
        assert after.shape[2] == length + 1
        first = (
            length // 32 * 32 if (length + 1) % 32 == 0 else length
        )  # a group got whole: rounded
        assert torch.allclose(after[:, :, :first], before[:, :, :first], atol=1e-6)


def test_a_model_reads_keys_by_channel():
    model, text = long(), torch.randint(64, (2, 90), generator=torch.Generator().manual_seed(3))
    cache, expected = channel_cache(bits=8), model(text)
    with torch.no_grad():
        parts = [model(part, cache) for part in text.split([50, 1, 1, 38], dim=1)]
    assert (torch.cat(parts, dim=1) - expected).norm() < 0.02 * expected.norm()


def test_bytes_with_keys_by_channel():
    config = long().config
    vectors, width = config.layers * 2 * config.kv_heads, config.head_width
    cache = channel_cache(bits=4, capacity=100)
    values = vectors * 100 * (width // 2 + 3)
    keys = vectors * 3 * width * (32 // 2 + 3) + vectors * 32 * width * 4  # three groups, and rest
    assert cache.bytes == values + keys


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
    assert far[0] < 0.01 and far == sorted(far) and far[1] > 2 * far[0]


def test_vectors_next_to_nothing_are_held_too():
    cache = QuantizedCache(small().config, batch=2)
    keys, _ = cache.extend(0, entries(3) * 1e-8, entries(3))
    assert keys.isfinite().all() and keys.abs().max() < 1e-6


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
        ({"keys_by": "head"}, "keys_by is 'head'; known are: position, channel"),
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
    with pytest.raises(ValueError, match="differ in shape"):
        cache.extend(0, entries(2), entries(3))

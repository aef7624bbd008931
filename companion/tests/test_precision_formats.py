"""Formats and rounding agree with torch's casts and with a table of all numbers, bit for bit."""

import math
from contextlib import contextmanager

import pytest
import torch

from companion.hardware import best_device
from companion.precision.formats import FORMATS, Format, Parts, format_of
from companion.precision.rounding import rounded

CAST = [name for name, found in FORMATS.items() if found.dtype]
SMALL = [name for name in FORMATS if name != "FP32"]
NATIVE = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
ODD = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan]


def bits(x):
    return x.view(torch.int32)


def same(a, b):
    """Equal bits, or both NaN."""
    return bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())


def cast(x, name):
    """torch's cast there and back; up to torch 2.11, what E4M3 cannot hold became NaN."""
    found = FORMATS[name]
    result = x.to(found.dtype).float()
    if not found.has_infinity:
        lost = result.isnan() & ~x.isnan()
        assert (x[lost].abs() > found.largest).all()
        result = torch.where(lost, torch.full_like(x, found.largest).copysign(x), result)
    return result


def all_numbers(name):
    """All finite numbers from 0 up, in FP64, by the formula written out once more."""
    found = FORMATS[name]
    low, f = 2 - 2 ** (found.exponent_bits - 1), found.fraction_bits
    count = torch.arange(2 ** (found.exponent_bits + f))
    field, fraction = count >> f, (count & 2**f - 1).double() / 2**f
    normal = (1 + fraction) * 2.0 ** (field + low - 1).double()
    numbers = torch.where(field > 0, normal, fraction * 2.0**low)
    return numbers[numbers <= found.largest]


def edges(name):
    """Every number, every midpoint between two, its neighbours in FP32, and what lies beyond."""
    numbers = all_numbers(name)
    beyond = 2 * numbers[-1:] - numbers[-2:-1]  # where the next number would be
    middles = (numbers + torch.cat([numbers[1:], beyond])) / 2
    exact = torch.cat([numbers, middles, beyond]).float()
    around = [(bits(exact) + step).view(torch.float32) for step in (-1, 1)]
    x = torch.cat([exact, *around, torch.tensor(ODD)])
    return torch.cat([x, -x])


def random_patterns(count, seed=0):
    """FP32 numbers of all sizes: each pattern of 32 bits is equally likely."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=draw).int().view(torch.float32)


def nearest(x, name):
    """The slow way: the nearest of all numbers; of two equally near the one with an even code."""
    numbers = all_numbers(name)
    size = x.double().abs()
    above = torch.searchsorted(numbers, size).clamp(max=len(numbers) - 1)
    below = (above - 1).clamp(min=0)
    up, down = numbers[above] - size, size - numbers[below]
    take_up = (up < down) | ((up == down) & (above % 2 == 0))
    found = torch.where(take_up, numbers[above], numbers[below])
    over = 2 * numbers[-1] - numbers[-2]  # half-way to this one a format with infinity gives up
    if FORMATS[name].has_infinity:
        found = torch.where(size >= (numbers[-1] + over) / 2, math.inf, found)
    return torch.where(x.isnan(), x, found.float().copysign(x))


@contextmanager
def flushing():
    """Within it, the processor takes FP32 denormals for zero."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", ["FP16", "BF16", "E4M3", "E5M2"])
def test_every_pattern_is_decoded_as_torch_does(name):
    found = FORMATS[name]
    codes = torch.arange(2**found.bits)
    parts = found.split(codes)
    stored = codes.to(NATIVE[found.bits]).view(found.dtype)
    value, expected = found.value(parts), stored.double()
    assert len(codes) == 2**found.bits and torch.equal(value.isnan(), expected.isnan())
    there = ~value.isnan()
    assert torch.equal(value[there].view(torch.int64), expected[there].view(torch.int64))
    back = found.codes(value.float())
    assert torch.equal(back[there], codes[there])
    assert all(map(torch.equal, found.parts(value.float()[there]), (p[there] for p in parts)))


def test_a_number_taken_apart_by_hand():
    # 0.15625 = 1.25 x 2^-3: FP32 127 - 3 = 124 and a quarter of 2^23; FP16 15 - 3 = 12, of 2^10
    x = torch.tensor([-0.15625])
    assert FORMATS["FP32"].parts(x) == Parts(1, 124, 2**21)
    assert FORMATS["FP16"].parts(x) == Parts(1, 12, 256)
    assert FORMATS["E4M3"].parts(x) == Parts(1, 4, 2)
    assert FORMATS["E2M1"].parts(torch.tensor([0.5])) == Parts(0, 0, 1)
    assert FORMATS["E4M3"].codes(torch.tensor([448.0, math.nan])).tolist() == [0x7E, 0x7F]
    assert FORMATS["E5M2"].codes(torch.tensor([math.inf, -math.inf])).tolist() == [0x7C, 0xFC]


@pytest.mark.parametrize("name", CAST)
def test_ranges_are_those_of_torch(name):
    found, limits = FORMATS[name], torch.finfo(FORMATS[name].dtype)
    assert (found.largest, found.smallest_normal) == (limits.max, limits.smallest_normal)
    assert found.spacing(1.0) == limits.eps and found.bits == limits.bits


def test_ranges_where_torch_has_no_type():
    # NVIDIA gives TF32 the range of FP32 and the fraction of FP16; E2M1 has eight sizes
    assert all_numbers("E2M1").tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert FORMATS["E2M1"].bits == 4
    tf32 = FORMATS["TF32"]
    assert tf32.bits == 19 and tf32.spacing(1.0) == FORMATS["FP16"].spacing(1.0) == 2**-10
    assert tf32.smallest_normal == FORMATS["FP32"].smallest_normal
    assert FORMATS["FP16"].smallest_denormal == 2.0**-24


@pytest.mark.parametrize("name", SMALL)
def test_the_spacing_is_the_distance_to_the_next_number(name):
    numbers = all_numbers(name)
    assert torch.equal(FORMATS[name].spacing(-numbers)[:-1], numbers.diff())
    assert FORMATS[name].spacing(numbers * 1.01)[-1].isnan()
    assert torch.equal(FORMATS[name].spacing(numbers[1:-1].float()), numbers.diff()[1:])


@pytest.mark.parametrize("name", [*SMALL])
def test_every_number_and_every_midpoint_is_rounded_as_it_must_be(name):
    x = edges(name).to(best_device())
    found = rounded(x, name)
    assert same(found.cpu(), nearest(x.cpu(), name))
    if name in CAST:
        assert same(found, cast(x, name))


@pytest.mark.parametrize("name", FORMATS)
def test_millions_of_random_patterns_are_rounded_as_torch_casts_them(name):
    x = random_patterns(2_000_000).to(best_device())
    found = rounded(x, name)
    expected = cast(x, name) if name in CAST else nearest(x.cpu(), name).to(x.device)
    assert found.dtype == torch.float32 and same(found, expected)
    kept = found[~found.isnan()]
    assert same(rounded(kept, name), kept)
    value = FORMATS[name].value(FORMATS[name].parts(kept)).float()
    assert same(value, kept)  # of two ways to a number, whole-number codes and rounding


def test_sums_at_the_end_of_the_range_go_where_torch_sends_them():
    x = torch.tensor([65519.0, 65520.0, -65520.0, math.inf])
    assert rounded(x, "FP16").tolist() == [65504, math.inf, -math.inf, math.inf]
    assert rounded(x, "E4M3").tolist() == [448, 448, -448, 448]  # no infinity: the largest
    assert rounded(x, "E2M1").tolist() == [6, 6, -6, 6]
    assert rounded(torch.tensor([61439.9, 61440]), "E5M2").tolist() == [57344, math.inf]


@pytest.mark.parametrize("name", FORMATS)
def test_flushing_denormals_changes_neither_rounding_nor_fields(name):
    tiny = torch.arange(-(2**23), 2**23, 1237, dtype=torch.int32).view(torch.float32)
    low = torch.arange(0, 2**23, 1237, dtype=torch.int32).view(torch.float32)  # all denormals
    x = torch.cat([edges("BF16"), edges("E4M3"), tiny, low, -low])
    found = FORMATS[name]

    def everything():
        near = rounded(x, name)
        parts = found.parts(near[~near.isnan()])
        return bits(near), *parts, found.value(parts), found.spacing(low)

    plain = everything()
    with flushing():
        flushed = everything()
    assert all(map(torch.equal, plain[:-1], flushed[:-1]))
    assert torch.equal(plain[-1].nan_to_num(), flushed[-1].nan_to_num())


@pytest.mark.parametrize(("name", "survives"), [("BF16", False), ("FP16", True), ("FP32", False)])
def test_flushing_spares_the_denormals_of_fp16_only(name, survives):
    # FP16 is computed in FP32, where its denormals are normal numbers; those of BF16 are none
    stored = torch.tensor([FORMATS[name].smallest_denormal * 8]).to(FORMATS[name].dtype)
    with flushing():
        assert bool((stored + stored).double() != 0) == survives
        kept = stored.float().to(FORMATS[name].dtype)  # a cast alone works on bits and keeps them
        assert torch.equal(kept.view(torch.uint8), stored.view(torch.uint8))


def test_shapes_strides_and_gradients():
    x = torch.randn(6, 5).T.requires_grad_()
    found = rounded(x, FORMATS["FP16"])
    assert found.shape == (5, 6) and torch.equal(found, x.half().float())
    assert not found.requires_grad and rounded(torch.zeros(0), "FP16").shape == (0,)
    assert rounded(torch.tensor(0.1), "BF16").item() == torch.tensor(0.1).bfloat16().item()


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_given_is_not_changed(name):
    x = edges("E4M3")
    before = bits(x).clone()
    result = rounded(x, name)
    result.zero_()
    assert torch.equal(bits(x), before)


def test_bad_input_is_refused():
    x = torch.tensor([0.01])
    fp16 = FORMATS["FP16"]
    with pytest.raises(ValueError, match=r"FP16 does not hold \[0\.00999.*round to it first"):
        fp16.parts(x)
    for name, value in (("E4M3", 480.0), ("E4M3", math.inf), ("E2M1", math.nan), ("FP16", 7e4)):
        with pytest.raises(ValueError, match=f"{name} does not hold"):
            FORMATS[name].codes(torch.tensor([value]))
    for wrong in (x.double(), x.half()):
        with pytest.raises(ValueError, match=f"x is {wrong.dtype}"):
            rounded(wrong, "BF16")
    with pytest.raises(ValueError, match="format is 'FP8'; known are: FP32, TF32"):
        rounded(x, "FP8")
    with pytest.raises(ValueError, match="codes from 0 to 65,535"):
        fp16.split(torch.tensor([65536]))
    with pytest.raises(ValueError, match="9 bits of exponent"):
        Format("wide", 9, 7)
    with pytest.raises(ValueError, match="top is 'ieee'"):
        Format("E3M4", 3, 4, "ieee")
    assert format_of(fp16) is fp16 and format_of("FP16") is fp16

"""Kernels compute with the codes they are given, as far as their number formats reach."""

import copy

import pytest
import torch
from torch import nn

from companion.memory import stored_bytes
from companion.quantization import affine, kernels, minimum, symmetric
from companion.quantization.activations import IntegerLinear, PerTensor, PerToken
from companion.quantization.kernels import KERNELS, available, bits_of, kernel
from companion.quantization.layers import QuantizedLinear, QuantizedMatrix
from companion.quantization.replacing import Coding, nearest
from companion.quantization.torch_kernels import (
    Int4Weights,
    Int8Products,
    product_grid,
    products_bits,
)

CODINGS = {
    "Int4Weights": [Coding(bits=4, group=g, mapping=m) for g in (32, 64) for m in (affine, minimum,
                                                                                 symmetric)],
    "Int8Weights": [Coding(bits=8, mapping=symmetric)],
    "Int8Products": [Coding(bits=8, mapping=symmetric), Coding(bits=8, mapping=product_grid)],
    "Int4Compiled": [Coding(bits=4, group=g, mapping=m) for g in (32, 64, "row")
                     for m in (affine, minimum, symmetric)],
    "Int8Compiled": [Coding(bits=8, mapping=symmetric)],
}  # fmt: skip
CASES = [(name, coding) for name, codings in CODINGS.items() for coding in codings]


def linear(coding, outputs=48, inputs=128):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * 0.05
    found = nearest("w", weight, coding)
    return QuantizedLinear(QuantizedMatrix(found.codes, found.scheme, inputs))


def vectors(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "coding"), CASES)
@pytest.mark.parametrize("shape", [(1, 1, 128), (2, 5, 128), (2, 9, 128)])
def test_a_kernel_agrees_with_the_plain_layer(name, coding, shape):
    if not available(name):
        pytest.skip(f"no {name} here")
    plain, x = linear(coding), vectors(*shape)
    fast = kernel(plain, name)
    found, expected = fast(x.to(fast.dtype)), plain(x)
    assert isinstance(fast, KERNELS[name]) and found.shape == expected.shape
    assert found.dtype == fast.dtype
    worst = {"Int8Products": 0.03, "Int4Compiled": 0.03, "Int8Compiled": 1e-6}.get(name, 0.01)
    assert (found.float() - expected).norm() < worst * expected.norm()


def test_four_bits_with_scales_that_bf16_holds_leave_only_the_vectors_rounding():
    """With BF16 vectors and scales, the plain layer differs by the rounding of its result alone."""
    if not available("Int4Weights"):
        pytest.skip("torch has no such kernel here")
    plain = linear(Coding(bits=4, group=32, mapping=symmetric))
    plain.matrix.scale.copy_(plain.matrix.scale.bfloat16())
    x = vectors(4, 128).bfloat16()
    apart = (kernel(plain, "Int4Weights")(x).float() - plain(x.float())).abs()
    assert (apart <= 2**-8 * plain(x.float()).abs() + 1e-6).all()


def test_integer_products_are_those_of_the_plain_integers():
    if not available("Int8Products"):
        pytest.skip("torch has no such kernel here")
    plain, x = linear(Coding(bits=8, mapping=symmetric)), vectors(5, 128)
    fast = kernel(plain, "Int8Products")
    grid = PerTensor(7 if fast.seven_bits else 8)(x[:1])
    assert torch.allclose(fast(x[:1]), plain(grid.rounded(x[:1])), rtol=1e-3, atol=1e-4)
    grid = PerToken(7 if fast.seven_bits else 8)(x)  # of several vectors each has its own
    assert torch.allclose(fast(x), plain(grid.rounded(x)), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(fast(x), plain(x), rtol=1e-3, atol=1e-3)  # what rounding x costs


@pytest.mark.parametrize("mapping", [symmetric, product_grid])
def test_a_vector_with_one_spike_is_rounded_as_the_readable_layer_does(mapping):
    """As the first position of SmolLM2: one number ten thousand times as large as the others."""
    if not available("Int8Products"):
        pytest.skip("torch has no such kernel here")
    plain, x = linear(Coding(bits=8, mapping=mapping)), vectors(5, 128)
    x[0, 3] *= 10_000
    fast = kernel(plain, "Int8Products")
    expected = IntegerLinear(plain, PerToken(7 if fast.seven_bits else 8))(x)
    apart = (fast(x) - expected).norm(dim=1) / expected.norm(dim=1)
    assert (apart < 2e-3).all(), apart


@pytest.mark.parametrize(("name", "coding"), CASES)
def test_many_vectors_meet_the_expanded_weight(name, coding, monkeypatch):
    if not available(name) or name == "Int8Products":
        pytest.skip(f"torch has no {name} here, or it never expands")
    plain, fast = linear(coding), kernel(linear(coding), name)
    rounding = 2**-7 if fast.dtype == torch.bfloat16 else 1e-6  # of scale and lowest number
    reach = rounding * plain.matrix.expand().abs().max()
    assert (fast.expand() - plain.matrix.expand()).abs().max() <= reach
    monkeypatch.setattr(type(fast), "multiply", None)
    x = vectors(fast.many, 128).to(fast.dtype)
    expected = (x.float() @ fast.expand().T).to(fast.dtype)
    assert torch.equal(fast(x), expected)
    if fast.dtype != torch.float32:  # which is not for this kernel
        assert torch.equal(fast(x.float()), x.float() @ fast.expand().T)
    with pytest.raises(TypeError):
        fast(x[1:])  # one fewer, and the kernel is asked


def test_vectors_do_not_share_a_scale_of_integer_products():
    """A large vector would spoil the others, as the first token of a prompt does in SmolLM2."""
    if not available("Int8Products"):
        pytest.skip("torch has no such kernel here")
    plain, x = linear(Coding(bits=8, mapping=symmetric)), vectors(5, 128)
    fast, small = kernel(plain, "Int8Products"), x[1:].clone()
    x[0] *= 1000
    assert (fast(x)[1:] - plain(small)).norm() < 0.03 * plain(small).norm()
    raw = torch.ops.quantized.linear_dynamic(x, fast.packed, fast.seven_bits)
    assert (raw[1:] - plain(small)).norm() > plain(small).norm() / 2
    assert fast(torch.zeros(3, 128)).abs().max() < 1e-4  # 1e-5 with AVX2, twice that with VNNI


@pytest.mark.parametrize(("name", "expected"), [
    ("Int4Weights", 2 * 48 * 128 // 2 + 48 * 2 * 2 * 2),  # its codes, and in order
    ("Int8Weights", 48 * 128 + 48 * 2),
    ("Int8Products", 48 * 128 + 48 * 4),
    ("Int4Compiled", 48 * 128 // 2 + 48 * 2 * 2 * 4),
    ("Int8Compiled", 48 * 128 + 48 * 4),
])  # fmt: skip
def test_bytes_are_counted_and_copies_work(name, expected):
    if not available(name):
        pytest.skip(f"no {name} here")
    bits = bits_of(name)
    group = 64 if bits == 4 else "row"
    fast = kernel(linear(Coding(bits=bits, group=group, mapping=symmetric)), name)
    assert stored_bytes(nn.ModuleList([fast])) == expected
    x = vectors(1, 128).to(fast.dtype)
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))


def test_an_x86_processor_with_avx2_has_all_kernels():
    """So that the tests above cannot all be skipped where most readers are."""
    if not torch.cpu.get_capabilities().get("avx2", False):
        pytest.skip("another processor")
    assert all(available(name) for name in KERNELS)


def test_without_a_kernel_the_plain_layer_stays(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda name: False)
    plain = linear(Coding(bits=8, mapping=symmetric))
    assert kernel(plain, "Int8Weights") is plain


def test_a_kernel_that_fails_is_not_available(monkeypatch):
    class Broken(Int4Weights):
        def forward(self, x):
            raise RuntimeError("not compiled for this processor")

    monkeypatch.setitem(KERNELS, "Int4Weights", Broken)
    available.cache_clear()
    try:
        assert not available("Int4Weights")
    finally:
        available.cache_clear()


@pytest.mark.parametrize(("name", "coding", "message"), [
    ("Int4Weights", Coding(bits=8), "4-bit codes on a grid"),
    ("Int4Weights", Coding(bits=4, group=16), "48 rows in groups of 16 do not suit"),
    ("Int4Weights", Coding(bits=4, group="tensor"), "do not suit the kernel"),
    ("Int4Compiled", Coding(bits=4, group=16), "groups of 16 do not suit the kernel: groups by 32"),
    ("Int4Compiled", Coding(bits=4, group="tensor"), "scales for each row"),
    ("Int8Compiled", Coding(bits=8), "a symmetric grid a row"),
    ("Int8Weights", Coding(bits=8), "a symmetric grid a row"),
    ("Int8Products", Coding(bits=8, group=32, mapping=symmetric), "a symmetric grid a row"),
    ("Int8Products", Coding(bits="nf4", group=32), "8-bit codes on a grid"),
])  # fmt: skip
def test_codes_that_a_kernel_cannot_read_are_refused(name, coding, message):
    with pytest.raises(ValueError, match=message):
        KERNELS[name](linear(coding).matrix)


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="kernel is 'Int5'; known are: Int4Weights"):
        kernel(linear(Coding()), "Int5")


def test_seven_bits_are_what_keeps_a_processor_without_vnni_from_overflowing():
    """All weights and vectors at their largest: pairs of 8-bit products do not fit 16 bits."""
    if not available("Int8Products"):
        pytest.skip("torch has no such kernel here")
    plain = linear(Coding(bits=8, mapping=symmetric))
    plain.matrix.codes.fill_(127 + 128)  # unsigned in storage
    fast = Int8Products(plain.matrix)
    x = torch.ones(1, 128)
    assert torch.allclose(fast(x), plain(x), rtol=1e-2)


def test_seven_bits_of_weights_leave_eight_to_the_vectors():
    """The same, with 7-bit weights at their largest: no overflow, and vectors lose half as much."""
    if not available("Int8Products"):
        pytest.skip("torch has no such kernel here")
    plain, x = linear(Coding(bits=8, mapping=product_grid)), vectors(1, 128)
    most = 63 if products_bits() == 7 else 127
    codes = torch.full((48, 1, 128), most, dtype=torch.int8)
    largest = QuantizedMatrix(codes, plain.matrix.scheme, 128)
    ones = torch.ones(1, 128)
    assert torch.allclose(Int8Products(largest)(ones), QuantizedLinear(largest)(ones), rtol=1e-2)
    fast = kernel(plain, "Int8Products")
    assert not fast.seven_bits
    assert torch.allclose(fast(x), plain(PerTensor(8)(x).rounded(x)), rtol=1e-3, atol=1e-4)

"""MXFP4 has torchao's codes, scales and numbers, and a block that was worked out by hand."""

import logging
import math

import pytest
import torch

from companion.precision.blocks import BLOCK, mx_blocks, mx_rounded


@pytest.fixture(scope="module")
def to_mx():
    """torchao's conversion: (scales, codes, numbers) of a tensor."""
    logging.disable(logging.WARNING)  # of kernels that it does not find
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    from torchao.prototype.mx_formats.kernels import unpack_uint4

    logging.disable(logging.NOTSET)

    def convert(x):
        stored = mx.MXTensor.to_mx(x.contiguous(), torch.float4_e2m1fn_x2, BLOCK)
        scales = stored.scale.view(torch.uint8)
        codes = unpack_uint4(stored.qdata.view(torch.uint8).contiguous())
        return scales, codes.view(x.shape), stored.dequantize(torch.float32)

    return convert


def sized(low, high, count=4096, seed=0):
    """Normal numbers times powers of two that differ between blocks and between numbers."""
    draw = torch.Generator().manual_seed(seed)
    powers = torch.randint(low, high, (count, 1), generator=draw)
    inside = torch.randint(-4, 1, (count, BLOCK), generator=draw)
    numbers = torch.randn(count, BLOCK, generator=draw, dtype=torch.float64)
    return (numbers * torch.exp2((powers + inside).double())).float()


@pytest.mark.parametrize("x", [
    sized(0, 1), sized(-100, 100), torch.zeros(4, 64), sized(0, 1).view(64, 16, -1),
    sized(-20, 20).bfloat16().float(),
], ids=["normal", "all sizes", "zeros", "three axes", "of BF16"])  # fmt: skip
def test_codes_scales_and_numbers_are_those_of_torchao(to_mx, x):
    blocks = mx_blocks(x)
    scales, codes, numbers = to_mx(x)
    assert torch.equal(blocks.scales, scales) and torch.equal(blocks.codes, codes)
    found = mx_rounded(x)
    assert found.shape == x.shape and found.dtype == torch.float32
    assert torch.equal(found.view(torch.int32), numbers.view(torch.int32))


def test_every_tie_is_torchaos_and_even(to_mx):
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    near = torch.cat([torch.nextafter(ties, torch.tensor(to)) for to in (0.0, 9.0)])
    x = torch.cat([ties, near, -ties])[None]
    even = [0, 1, 1, 2, 2, 4, 4, 6]
    assert mx_rounded(x)[0, :8].tolist() == even
    assert torch.equal(mx_blocks(x).codes, to_mx(x)[1])


def test_a_block_by_hand():
    # the largest is 13: floor(log2) = 3, so the scale is 2^(3 - 2) = 2, stored as 1 + 127
    x = torch.zeros(BLOCK)
    x[:6] = torch.tensor([13.0, -12.0, 7.0, 1.0, 0.4, -3.0])
    blocks = mx_blocks(x)
    assert blocks.scales.tolist() == [128]
    # 6.5 is too large: 6; -6; 3.5 is between 3 and 4, even is 4; 0.5; 0.2 -> 0; -1.5
    assert blocks.numbers()[:6].tolist() == [12, -12, 8, 1, 0, -3]
    assert blocks.codes[:6].tolist() == [0b0111, 0b1111, 0b0110, 0b0001, 0, 0b1011]
    assert blocks.bytes == 17  # 4.25 bits a number


def test_the_error_has_its_bound():
    x = sized(-10, 10)
    blocks = mx_blocks(x)
    scale = torch.exp2(blocks.scales.double() - 127)
    error = (blocks.numbers() - x).abs().double()
    assert (error <= scale * 2).all()  # 7.99 becomes 6
    inside = x.abs() <= 6 * scale
    assert (error <= scale)[inside].all()  # half of the widest spacing, from 4 to 6
    assert torch.equal(mx_rounded(blocks.numbers()), blocks.numbers())


def test_the_ends_of_the_range():
    x = torch.zeros(3, BLOCK)
    x[0, 0], x[1, 0], x[2, :2] = 3.4e38, 2.0**-126, torch.tensor([2.0**-128, -(2.0**-129)])
    assert mx_blocks(x).scales.flatten().tolist() == [252, 0, 0]
    found = mx_rounded(x)
    assert found[0, 0] == 6 * 2.0**125 and found[1, 0] == 2.0**-126
    assert found[2, :2].tolist() == [2.0**-128, 0]  # half a scale of 2^-127, and a tie: even


def test_a_permuted_tensor_and_gradients():
    x = torch.randn(BLOCK, 3).T.requires_grad_()
    assert torch.equal(mx_rounded(x), mx_rounded(x.detach().contiguous()))
    assert not mx_rounded(x).requires_grad


@pytest.mark.parametrize(("x", "message"), [
    (torch.zeros(2, 33), r"shape \(2, 33\).*multiple of 32"), (torch.tensor(1.0), r"shape \(\)"),
    (torch.zeros(0), r"shape \(0,\)"), (torch.full((32,), math.nan), "32 of 32 numbers"),
    (torch.tensor([math.inf] + [0.0] * 31), "1 of 32 numbers"),
    (torch.zeros(32).double(), r"x is torch\.float64"),
])  # fmt: skip
def test_bad_input_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        mx_blocks(x)

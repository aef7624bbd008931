"""Packed codes come back as they were, and take the bytes they should."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.quantization.grids import code_range
from companion.quantization.packing import pack, together, unpack


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_pack_and_unpack_are_inverse(bits, rows, sets, seed):
    low, high = code_range(bits)
    count, size = together(bits)
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high + 1, (rows, sets * count), generator=random).to(torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, sets * size)
    assert packed.nbytes * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_ends_of_the_range_fit(bits):
    codes = torch.tensor([code_range(bits)] * 4, dtype=torch.int8).view(1, 8)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


def test_the_layout_is_lowest_first():
    assert pack(torch.tensor([[-8, 7]], dtype=torch.int8), 4).tolist() == [[0xF0]]
    assert pack(torch.tensor([[-2, -1, 0, 1]], dtype=torch.int8), 2).tolist() == [[0b11100100]]


def test_bytes_that_are_no_codes_are_refused():
    with pytest.raises(ValueError, match="4 bytes are no whole number of 3-bit codes"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 3)


def test_bad_codes_are_refused():
    with pytest.raises(ValueError, match="5 codes of 4 bits do not fill whole bytes"):
        pack(torch.zeros(2, 5, dtype=torch.int8), 4)
    with pytest.raises(ValueError, match="codes -9 to 0 need more than 4 bits"):
        pack(torch.tensor([[-9, 0]], dtype=torch.int8), 4)

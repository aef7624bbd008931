"""The GGUF reader against files written by the `gguf` package, and blocks expanded by hand."""

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from companion.gguf_file import read_gguf

FACTS = {"a.number": 7, "a.negative": -3, "a.text": "h\u00e9", "a.yes": True, "a.no": False}


@pytest.fixture
def numbers():
    return np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)


@pytest.fixture
def path(tmp_path, numbers):
    """A small file with each kind of value, and tensors in four formats."""
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_uint32("a.number", 7)
    writer.add_int64("a.negative", -3)
    writer.add_string("a.text", "h\u00e9")
    writer.add_bool("a.yes", True)
    writer.add_bool("a.no", False)
    writer.add_float32("a.real", 0.1)
    writer.add_array("a.texts", ["", "x", "\u4e2d"])
    writer.add_array("a.numbers", [3, 1, 2])
    writer.add_tensor("plain", numbers)
    writer.add_tensor("vector", numbers[0, :5].copy())
    writer.add_tensor("cube", numbers.reshape(2, 3, 64).astype(np.float16))
    for kind in (Kind.Q8_0, Kind.Q4_1):
        writer.add_tensor(kind.name, gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "small.gguf"


def test_metadata_are_those_of_the_gguf_package(path):
    fields = gguf.GGUFReader(path).fields
    ours = read_gguf(path).metadata
    theirs = {name: field.contents() for name, field in fields.items() if "GGUF." not in name}
    assert ours == theirs
    assert ours.items() >= FACTS.items()
    assert ours["a.yes"] is True
    assert ours["a.texts"] == ["", "x", "\u4e2d"]


def test_tensors_are_those_of_the_gguf_package(path):
    ours, theirs = read_gguf(path).tensors, gguf.GGUFReader(path).tensors
    assert list(ours) == [tensor.name for tensor in theirs]
    for tensor in theirs:
        assert ours[tensor.name].kind == tensor.tensor_type
        assert ours[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        assert ours[tensor.name].data.tobytes() == tensor.data.tobytes()


def test_plain_tensors_expand_to_what_was_written(path, numbers):
    tensors = read_gguf(path).tensors
    assert torch.equal(tensors["plain"].expand(), torch.from_numpy(numbers))
    assert torch.equal(tensors["vector"].expand(), torch.from_numpy(numbers[0, :5]))
    half = torch.from_numpy(numbers).half().float()
    assert torch.equal(tensors["cube"].expand(), half.reshape(2, 3, 64))


def test_an_expanded_tensor_may_be_written(path, numbers):
    stored = read_gguf(path).tensors["plain"]
    stored.expand().zero_()
    assert torch.equal(stored.expand(), torch.from_numpy(numbers))


def q8_by_hand(block: bytes) -> list[float]:
    """Scale (FP16), 32 signed bytes."""
    scale, *integers = struct.unpack("<e32b", block)
    return [np.float32(scale) * integer for integer in integers]


def q4_by_hand(block: bytes) -> list[float]:
    """Scale and offset (FP16), 16 bytes: low halves first, then high halves."""
    scale, offset, *pairs = struct.unpack("<ee16B", block)
    integers = [pair & 15 for pair in pairs] + [pair >> 4 for pair in pairs]
    return [np.float32(scale) * integer + np.float32(offset) for integer in integers]


@pytest.mark.parametrize(
    ("kind", "expand", "size"), [("Q8_0", q8_by_hand, 34), ("Q4_1", q4_by_hand, 20)]
)
def test_blocks_expand_as_by_hand(path, numbers, kind, expand, size):
    stored = read_gguf(path).tensors[kind]
    data = stored.data.tobytes()
    by_hand = [expand(data[start : start + size]) for start in range(0, len(data), size)]
    expected = torch.tensor(np.array(by_hand)).float().reshape(6, 64)
    torch.testing.assert_close(stored.expand(), expected, rtol=1e-6, atol=1e-6)
    assert (stored.expand() - torch.from_numpy(numbers)).abs().max() < 0.3


def test_a_file_cut_anywhere_is_refused(path, tmp_path):
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 7, 20, 60, 300, len(whole) // 2, len(whole) - 33):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf is"):
            read_gguf(cut)


def test_other_files_are_refused(path, tmp_path):
    other = tmp_path / "other.gguf"
    whole = path.read_bytes()
    for start in (b"GGML\x03\0\0\0", b"GGUF\x02\0\0\0", b"PK\x03\x04\0\0\0\0"):
        other.write_bytes(start + whole[8:])
        with pytest.raises(ValueError, match="no whole GGUF file of version 3: it starts with"):
            read_gguf(other)
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "none.gguf")


def test_damage_in_the_header_is_either_harmless_or_a_value_error(path, tmp_path):
    damaged = tmp_path / "damaged.gguf"
    whole = np.frombuffer(path.read_bytes()[:900], np.uint8)
    rest = path.read_bytes()[900:]
    random, refused = np.random.default_rng(0), 0
    for _ in range(400):
        header = whole.copy()
        header[random.integers(900, size=3)] = random.choice([0, 1, 8, 9, 255], size=3)
        damaged.write_bytes(header.tobytes() + rest)
        try:
            read_gguf(damaged)
        except ValueError as error:
            assert "damaged.gguf is no whole GGUF file" in str(error)
            refused += 1
    assert refused > 100

"""Files appear whole or not at all, and nothing but what was written is read back."""

import errno
import os

import pytest
import torch

from companion import storage
from companion.model import LanguageModel
from companion.tests.test_model import SMALL


def test_tensors_come_back_with_what_is_said_about_them(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.ones(2).bfloat16()}
    storage.save_tensors(tmp_path / "x.safetensors", tensors, {"step": 3})
    found, about = storage.load_tensors(tmp_path / "x.safetensors")
    assert about == {"step": 3} and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("save", ["json", "tensors"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, save):
    path = tmp_path / "kept"
    write = {
        "json": lambda value: storage.save_json(path, [value]),
        "tensors": lambda value: storage.save_tensors(path, {"t": torch.tensor([value])}),
    }[save]
    write(1)
    before = path.read_bytes()

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.os, "fsync", no_space)
    with pytest.raises(OSError, match=r"kept: No space left .*nothing was changed"):
        write(2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_an_interruption_leaves_the_old_file(tmp_path):
    path = storage.save_json(tmp_path / "x.json", 1)

    def interrupted(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_whole(path, interrupted)
    assert storage.load_json(path) == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("cut", [0, 7, 60, -1])
def test_a_truncated_file_is_refused(tmp_path, cut):
    path = storage.save_tensors(tmp_path / "x.safetensors", {"a": torch.randn(20)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"x\.safetensors is truncated or altered"):
        storage.load_tensors(path)


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FORMAT", "0")
    path = storage.save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"format '0'.*reads '1'"):
        storage.load_tensors(path)


def test_missing_and_damaged_files_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json is missing"):
        storage.load_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is damaged"):
        storage.load_json(tmp_path / "bad.json")
    with pytest.raises(OSError, match=r"cannot save .*nowhere"):
        storage.save_json(tmp_path / "nowhere" / "x.json", 1)


def test_a_pickle_is_not_read(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="truncated or altered"):
        storage.load_tensors(tmp_path / "x.safetensors")


def test_a_tied_head_is_stored_once():
    names = storage.distinct_tensors(LanguageModel(SMALL))
    assert "embedding.weight" in names and "head.weight" not in names

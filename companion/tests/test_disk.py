"""Reading brings every byte; evicting loses none."""

import os

import pytest

from companion.disk import PAGE, evict, read_all, touch_all


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(3 * 1024 * 1024 + 5))
    return path


def test_every_byte_is_read(file):
    assert read_all(file) == 3 * 1024 * 1024 + 5
    assert touch_all(file) == 3 * 1024 * 1024 // PAGE + 1


def test_evicting_changes_no_byte(file):
    before = file.read_bytes()
    assert evict(file) is hasattr(os, "posix_fadvise")
    assert file.read_bytes() == before


def test_without_the_call_nothing_is_claimed(file, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert evict(file) is False


def test_missing_files_say_so(tmp_path):
    for look in (evict, read_all, touch_all):
        with pytest.raises(FileNotFoundError):
            look(tmp_path / "none")

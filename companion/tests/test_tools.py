"""The set-up commands do nothing twice, and say in one message what is missing."""

from __future__ import annotations

import base64
import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from companion.tests.gate import ROOT
from tools import assets, install


def test_an_old_python_is_refused_by_name() -> None:
    install.check_python((3, 11, 0))
    with pytest.raises(install.SetupError, match=r"Python 3\.10 and the course needs 3\.11"):
        install.check_python((3, 10, 14))


def test_a_python_without_venv_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(install.SetupError, match="lacks its module ensurepip"):
        install.check_venv_module()


@pytest.mark.parametrize(
    ("errors", "advice"),
    [
        ("Failed to establish a new connection: [Errno -3]", "needs a network"),
        ("ERROR: No matching distribution found for torch==2.13.0", "needs a network"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("THESE PACKAGES DO NOT MATCH THE HASHES", "not the one that was pinned"),
        ("something else", "pip's own lines"),
    ],
)
def test_pip_failures_are_explained(errors: str, advice: str) -> None:
    assert advice in install.explain(errors)


def test_of_pips_output_large_downloads_are_shown() -> None:
    lines = [
        "  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (865.2 MB)",
        "  Downloading nvidia-1-py3-none-any.whl (1.2 GB)",
        "  Downloading zipp-4.1.2-py3-none-any.whl (10 kB)",
        "Installing collected packages: a, b",
        "Collecting torch",
    ]
    assert list(filter(None, map(install.news, lines))) == [
        "    downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (865 MB)",
        "    downloading nvidia-1-py3-none-any.whl (1 GB)",
        "    unpacking",
    ]


def test_pip_failing_stops_the_setup() -> None:
    venv = Path(sys.prefix)
    with pytest.raises(install.SetupError, match="needs a network"):
        install.pip(venv, "--no-index", "--find-links", "/nowhere", "no-such-package==1")


def test_a_stamp_saves_the_second_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "ROOT", tmp_path)
    needs = tmp_path / "needs.txt"
    needs.write_text("torch==1")
    calls = []
    for _ in range(2):
        install.ensure(tmp_path, "course", ["needs.txt"], calls.append)
    assert calls == [tmp_path]
    needs.write_text("torch==2")
    install.ensure(tmp_path, "course", ["needs.txt"], calls.append)
    assert len(calls) == 2


def test_a_failed_installation_leaves_no_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(venv: Path) -> None:
        raise install.SetupError("no")

    monkeypatch.setattr(install, "ROOT", tmp_path)
    (tmp_path / "needs.txt").write_text("torch==1")
    (tmp_path / "installed-course.txt").write_text("of an earlier installation")
    with pytest.raises(install.SetupError):
        install.ensure(tmp_path, "course", ["needs.txt"], fail)
    assert not (tmp_path / "installed-course.txt").exists()


def test_a_working_environment_is_told_from_a_broken_one(tmp_path: Path) -> None:
    assert install.works(Path(sys.prefix))
    assert not install.works(tmp_path)


def test_every_requirement_is_pinned() -> None:
    pins = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-test.txt").read_text()
    lines = [line for line in pins.splitlines() if line and line[0] not in "#-"]
    assert lines and all("==" in line for line in lines)


def archive_of(path: Path, files: dict[str, str]) -> Path:
    """Write a package's archive as npm packs it."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_only_wanted_files_are_unpacked(tmp_path: Path) -> None:
    files = {"package/dist/a.js": "a", "package/dist/a.js.map": "m", "package/src/b.js": "b"}
    files["package/dist/../../../outside.js"] = "o"
    archive = archive_of(tmp_path / "one.tgz", files)
    assets.unpack(archive, ("dist/*",), ("*.map",), tmp_path / "out")
    found = [path for path in tmp_path.rglob("*.*") if path.is_file()]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in found) == [
        "one.tgz",
        "out/dist/a.js",
    ]


def test_a_changed_archive_is_refused(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "one.tgz", {"package/a.js": "a"})
    right = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    assets.check_hash(archive, right)
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(assets.AssetError, match=r"one\.tgz has the SHA-512"):
        assets.check_hash(archive, right)


def test_without_npm_the_book_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assets.ensure(tmp_path / "vendor")
    assert "public networks" in capsys.readouterr().out
    assert not (tmp_path / "vendor").exists()


def test_npm_failing_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*arguments: object, **options: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(arguments, 1, "", "no network")

    monkeypatch.setattr(assets.subprocess, "run", fail)
    monkeypatch.setattr(assets.shutil, "which", lambda name: "npm")
    assets.ensure(tmp_path / "vendor")
    assert "npm could not fetch mathjax 3.2.2: no network" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []

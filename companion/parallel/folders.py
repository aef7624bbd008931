"""Folders that are whole or absent: the disk side of `companion.parallel.checkpoints`.

A folder is filled under a temporary name. When it is complete it gets a marker, which lists the
files with their digests, and its own name. What was interrupted keeps the temporary name, and what
was cut short or altered later no longer fits its marker.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from companion.checks import require
from companion.storage import load_json, save_json

FORMAT = 1  # of the marker; another number is refused
KEPT = 2  # checkpoints; the older is for the day on which the newer is damaged
MARKER = "marker.json"


class Damaged(ValueError):
    """A checkpoint that is not, or no longer, what was written."""


def checkpoints(folder: str | Path) -> list[Path]:
    """The finished checkpoints of a folder, oldest first."""
    return sorted(Path(folder).glob("step-" + "[0-9]" * 8))


def begin(folder: Path, step: int) -> Path:
    """Make an empty folder with a temporary name, for the checkpoint of a step."""
    partial = folder / f".step-{step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def finish(partial: Path, marker: dict) -> Path:
    """Mark a complete folder and give it its name, then remove what is older than the newest two.

    Checkpoints of later steps stay: they are damaged, or training would have gone on from them.
    """
    save_json(partial / MARKER, marker | {"format": FORMAT})
    path = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    if path.exists():
        shutil.rmtree(path)
    os.replace(partial, path)
    before = [other for other in checkpoints(path.parent) if other.name <= path.name]
    for other in before[:-KEPT]:
        shutil.rmtree(other)
    return path


def clear(folder: Path) -> None:
    """Remove what an interrupted training left unfinished."""
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial)


def marker_of(path: Path) -> dict:
    """The marker of a checkpoint. Raises Damaged if it has none, ValueError for another format."""
    try:
        marker = load_json(path / MARKER)
    except (FileNotFoundError, ValueError) as error:
        raise Damaged(f"{path} is no whole checkpoint: {error}") from error
    found = marker.get("format")
    require(found == FORMAT, f"{path} has format {found!r}; this version reads {FORMAT!r}")
    return marker


def digests(folder: Path, names: list[str]) -> dict[str, str]:
    """{file: SHA-256 of what it holds, in hexadecimal}."""
    found = {}
    for name in names:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def require_unchanged(folder: Path, expected: dict[str, str]) -> None:
    """Raise Damaged unless each file is there and has its expected digest."""
    for name, digest in expected.items():
        there = (folder / name).is_file()
        if not there or digests(folder, [name])[name] != digest:
            raise Damaged(f"{folder / name} is {'cut short or altered' if there else 'missing'}")

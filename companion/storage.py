"""Files that are whole or absent: safetensors for tensors, JSON for the rest, never pickles.

Everything is written to a temporary name in the same folder, flushed to the disk and renamed, so an
interruption or a full disk leaves the old file as it was.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = "1"  # of tensor files; another number is refused


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call `write(temporary)`, then rename the temporary file to `path`. Returns `path`.

    Raises OSError, naming `path`, if the disk is full or the folder is missing or read-only.
    """
    path = Path(path)
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(error.errno, f"cannot save {path}: {reason}; nothing was changed") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def save_json(path: str | Path, value: object) -> Path:
    """Write `value` as indented JSON with sorted keys."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    return write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_json(path: str | Path) -> object:
    """Read JSON. Raises FileNotFoundError, or ValueError where the file holds something else."""
    _must_exist(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore or rebuild it") from error


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: object = None) -> Path:
    """Write tensors as safetensors; `about` (anything JSON can hold) travels in the header."""
    header = {"format": FORMAT, "about": json.dumps(about)}
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, header)
    return write_whole(path, lambda temporary: temporary.write_bytes(data))


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], object]:
    """Read what `save_tensors` wrote: the tensors and `about`.

    Raises FileNotFoundError, and ValueError for a truncated file or another format.
    """
    _must_exist(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                found = header.get("format")
                raise ValueError(f"{path} has format {found!r}; this version reads {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or altered ({error}); restore it") from error
    return tensors, json.loads(header["about"])


def distinct_tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """State of a module with each shared tensor named once (a tied head is left out)."""
    seen: set[int] = set()
    found = {}
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            found[name] = tensor
    return found


def _must_exist(path: str | Path) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing; reinstall the package or rebuild the file")

"""What is sent to a rank beside its place: the function, its arguments, the source of cells."""

from __future__ import annotations

import inspect
import linecache
import os
from collections.abc import Callable
from typing import Any

import cloudpickle


def pickled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    """The call as bytes; ValueError names the argument, or the used name, that cannot be sent."""
    try:
        return cloudpickle.dumps((function, arguments))
    except Exception as error:
        culprit = _unpicklable(function, arguments)
        raise ValueError(f"{culprit} cannot be sent to a rank: {error}") from error


def _unpicklable(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """Name what cannot be pickled: an argument, or a name that the function uses."""
    name = getattr(function, "__name__", repr(function))
    parts = {f"argument {number} of {name}": one for number, one in enumerate(arguments, 1)}
    if inspect.isfunction(function):
        used = inspect.getclosurevars(function)
        for key, one in (used.globals | used.nonlocals).items():
            parts[f"{key!r}, which {name} uses"] = one
    for part, one in parts.items():
        try:
            cloudpickle.dumps(one)
        except Exception:
            return f"{part}, a {type(one).__name__},"
    return name


def cells() -> dict[str, list[str]]:
    """{name: lines} of the source that stands in no file, such as a notebook's cells."""
    cached = list(linecache.cache.items())
    return {name: one[2] for name, one in cached if len(one) == 4 and not os.path.exists(name)}

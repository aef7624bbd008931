"""torch.compile: can it run here, and after how many steps has it paid for itself?

Compiling reads the operations of a step once, joins small ones, and has a compiler write code for
what is left. That takes seconds to minutes, once for every new shape. With c seconds to compile, a
seconds a step before and b after, n steps take n a or c + n b, which are equal at

    n = c / (a - b)

Fewer steps than that are faster without it.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

from companion.checks import require, require_number, require_whole

COMPILERS = ("cl",) if sys.platform == "win32" else ("g++", "clang++", "c++")


def why_not_compiled(device: torch.device | str = "cpu") -> str:
    """Why torch.compile cannot run on this device here; empty if nothing is known against it.

    On a CPU it writes C++, and needs a compiler and Python's headers. On CUDA it writes Triton,
    which needs a C compiler too. Nothing is compiled to find out.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return f"torch.compile is tried here on cpu and cuda, not on {kind}"
    if kind == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    if kind == "cuda" and find_spec("triton") is None:
        return "the package triton is missing, in which kernels for CUDA are written"
    named = os.environ.get("CXX")
    tried = (named,) if named else COMPILERS
    if not any(shutil.which(name) for name in tried):
        return f"there is no C++ compiler (tried: {', '.join(tried)}); install one or set CXX"
    folder = sysconfig.get_path("include")
    if not (Path(folder) / "Python.h").is_file():
        return f"Python's headers are missing (no Python.h in {folder})"
    return ""


@dataclass(frozen=True)
class BreakEven:
    """Seconds to compile, and of a step before and after; `steps` until they are equal."""

    compiling: float
    before: float
    after: float

    def __post_init__(self) -> None:
        require_number("before", self.before, above=0)
        require_number("after", self.after, above=0)
        good = math.isfinite(self.compiling) and self.compiling >= 0
        require(good, f"compiling took {self.compiling!r} seconds; 0 or more are expected")

    @property
    def steps(self) -> float:
        """c / (a - b); infinite where a compiled step is not faster."""
        saved = self.before - self.after
        return self.compiling / saved if saved > 0 else math.inf

    def speedup(self, steps: int) -> float:
        """How many times as fast so many steps are, compiling included: n a / (c + n b)."""
        require_whole("steps", steps)
        return steps * self.before / (self.compiling + steps * self.after)

    def __str__(self) -> str:
        ratio = f"{self.before / self.after:.2f} x a step"
        enough = "no number of steps pays" if math.isinf(self.steps) else f"{self.steps:,.0f} steps"
        return f"{ratio}, {self.compiling:.1f} s to compile: {enough}"


def break_even(
    plain: Callable[[], object],
    compiled: Callable[[], object],
    *,
    calls: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> BreakEven:
    """Time one step both ways. `compiled` must not have been called yet: its first call compiles.

    What the first call took beyond a later one is the time to compile. Of the later ones, which
    take turns with `plain`, the median counts. Each call must wait for its device itself, as a
    `.item()` of the loss does.
    """
    require_whole("calls", calls)

    def seconds(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    plain()  # warms up
    first = seconds(compiled)
    pairs = [(seconds(plain), seconds(compiled)) for _ in range(calls)]
    before, after = (median(times) for times in zip(*pairs, strict=True))
    return BreakEven(max(0.0, first - after), before, after)

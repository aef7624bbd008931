"""What machine is this, and what can it do at best?

Speeds mean something beside a limit. A model's step does arithmetic and reads memory; these two
ceilings are measured here, at the current thread count, in a few seconds. Every table carries a
machine card, which names hardware and versions and nothing that identifies a person or a host.
"""

from __future__ import annotations

import ctypes
import html
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path

import torch

from companion.checks import require

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LONG_ENOUGH = 0.01  # seconds: a product that takes this long is large enough to show the peak
FEATURES = (  # units that matter to a model, by the names of torch.cpu.get_capabilities
    "avx2", "fma3", "f16c", "avx_vnni", "avx_vnni_int8", "avx512_f", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "avx10_1", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
    "neon", "fp16_arith", "dot", "bf16", "i8mm", "sve", "sve2", "sme", "sme2",
)  # fmt: skip


def devices() -> list[str]:
    """The kinds of device that torch can use here, the fastest first."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [*(kind for kind, available in here.items() if available), "cpu"]


def best_device() -> torch.device:
    """CUDA where there is one, then Apple's MPS, then the CPU."""
    return torch.device(devices()[0])


def synchronize() -> None:
    """Wait for all work queued on an accelerator that this process uses."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


def cpu_name() -> str:
    """The processor's name as it gives it itself."""
    known = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    return " ".join(str(known or platform.machine()).split())


def cpu_features() -> dict[str, bool]:
    """The arithmetic units that processors of this kind may have, and whether this one does."""
    found = torch.cpu.get_capabilities()
    return {name: bool(found[name]) for name in FEATURES if name in found}


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_memory() -> int:
    """Bytes of memory in the machine."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    status = (ctypes.c_uint64 * 8)(64)  # Windows' MEMORYSTATUSEX: its size first, the total second
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status[1])


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache; 128 MiB, more than most have, where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    texts = [
        p.read_text().strip() for p in Path("/sys/devices/system/cpu").glob("cpu0/cache/*/size")
    ]
    sizes = [int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units]
    return max(sizes, default=128 * 2**20)


@dataclass(frozen=True)
class Peaks:
    """The best this machine was seen to do: two ceilings over everything that runs on it."""

    device: str
    threads: int
    flops: Mapping[str, float]  # FLOP/s of a matrix product by dtype, such as "float32"
    bandwidth: float  # bytes/s read from memory

    def as_dict(self) -> dict:
        return asdict(self)

    def _rows(self) -> list[tuple[str, str]]:
        rates = [(name, f"{rate / 1e9:,.3g} GFLOP/s") for name, rate in self.flops.items()]
        return [*rates, ("memory", f"{self.bandwidth / 1e9:,.3g} GB/s")]

    def __str__(self) -> str:
        title = f"measured peaks: {self.device}, threads: {self.threads}"
        return "\n".join([title, *(f"{name:<10}{rate:>18}" for name, rate in self._rows())])

    def _repr_html_(self) -> str:
        title = html.escape(f"Measured peaks: {self.device}, threads: {self.threads}")
        rows = "".join(f"<tr><th>{name}</th><td>{rate}</td></tr>" for name, rate in self._rows())
        return f"<table><caption>{title}</caption>{rows}</table>"


def peaks(device: torch.device | str | None = None) -> Peaks:
    """Measured peak FLOP/s by dtype and memory bandwidth, once for each device and thread count.

    Takes a few seconds the first time, then is remembered. A dtype that the device cannot multiply
    is left out. Another busy program lowers what is seen: measure on a quiet machine.
    """
    return _measured(str(_device(device)), torch.get_num_threads())


def _device(named: torch.device | str | None) -> torch.device:
    """The device named, or the best one."""
    if named is None:
        return best_device()
    kind = str(named).split(":")[0]
    require(kind in devices(), f"device is {str(named)!r}; known are: {', '.join(devices())}")
    return torch.device(named)


@lru_cache(maxsize=64)
def _measured(device: str, threads: int) -> Peaks:
    flops = {}
    for dtype in DTYPES:
        try:
            flops[str(dtype).removeprefix("torch.")] = product_rate(torch.device(device), dtype)
        except (RuntimeError, TypeError):  # such as FP64 on MPS
            continue
    return Peaks(device, threads, flops, read_rate(torch.device(device)))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best square matrix product; the width doubles until one takes 10 ms.

    So a dtype without hardware support, hundreds of times slower, is asked for small ones only.
    """
    best, seconds, width = 0.0, 0.0, 64
    while seconds < LONG_ENOUGH and width <= 16_384:
        matrix = torch.rand(width, width, device=device).to(dtype)
        seconds = best_seconds(lambda m=matrix: m @ m)
        best = max(best, 2 * width**3 / seconds)
        width *= 2
    return best


def read_rate(device: torch.device) -> float:
    """Bytes/s of reading a buffer of at least 4 x the largest cache, by the best of three kernels.

    The first is what decoding one token does: a matrix, read once, times one vector.
    """
    rows = max(256 * 2**20, 4 * last_level_cache(device)) // (4 * 2048)
    matrix, vector = torch.ones(rows, 2048, device=device), torch.ones(2048, device=device)
    first, second = matrix.flatten()[: rows // 2 * 4096].chunk(2)
    kernels = (lambda: matrix @ vector, matrix.sum, lambda: torch.dot(first, second))
    return matrix.nbytes / min(best_seconds(kernel, patience=0.2) for kernel in kernels)


def best_seconds(call: Callable[[], object], patience: float = 0.06) -> float:
    """Seconds of the fastest of at least two calls, after one to warm up; more while time lasts."""
    call()
    times: list[float] = []
    while len(times) < 2 or sum(times) < patience:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass(frozen=True)
class MachineCard:
    """Where a number was measured: the small print under every table."""

    cpu: str
    features: tuple[str, ...]
    cores: int  # logical, usable by this process
    threads: int
    memory: int  # bytes
    device: str
    os: str
    python: str
    torch: str
    date: str

    def as_dict(self) -> dict:
        return {**asdict(self), "features": list(self.features)}

    def __str__(self) -> str:
        machine = f"{self.cpu} ({' '.join(self.features)}), cores: {self.cores}"
        run = (
            f"threads: {self.threads}, memory: {self.memory / 2**30:.0f} GiB, device: {self.device}"
        )
        return f"{machine}, {run}, {self.os}, Python {self.python}, torch {self.torch}, {self.date}"

    def _repr_html_(self) -> str:
        return f"<p class='machine-card'><small>{html.escape(str(self))}</small></p>"


def machine_card(device: torch.device | str | None = None) -> MachineCard:
    """The card of this machine now, at the current thread count; no host, user or path is in it."""
    device = _device(device)
    on_cuda = device.type == "cuda"
    return MachineCard(
        cpu=cpu_name(),
        features=tuple(name for name, present in cpu_features().items() if present),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory=physical_memory(),
        device=torch.cuda.get_device_name(device) if on_cuda else str(device),
        os=f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        python=platform.python_version(),
        torch=torch.__version__,
        date=date.today().isoformat(),
    )

"""The roofline: a computation waits for arithmetic or for memory, whichever takes longer.

Its intensity, FLOPs per byte moved, says which: below the machine's ridge memory is the wait, above
it arithmetic. Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009.
Counts come from `companion.cost`; the bytes here are the least that must cross the memory bus.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from companion import cost
from companion.checks import require, require_known, require_number, require_whole
from companion.model import ModelConfig


class Ceilings(Protocol):
    """The two limits of a machine: a `Device` has them, and so have measured `hardware.Peaks`."""

    flops: Mapping[str, float]  # peak FLOP/s by number format
    bandwidth: float  # peak memory bandwidth, bytes a second


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a roofline needs to know of a machine. Raises ValueError for peaks that cannot be."""

    name: str
    flops: Mapping[str, float]  # peak FLOP/s by number format, such as {"float32": 1e11}
    bandwidth: float  # peak memory bandwidth, bytes a second
    memory: float | None = None  # bytes; None if unknown

    def __post_init__(self) -> None:
        require(len(self.flops) > 0, f"{self.name} has no peak FLOP/s; give one format at least")
        for dtype, peak in self.flops.items():
            require_number(f"peak FLOP/s of {self.name} in {dtype}", peak, above=0)
        require_number(f"bandwidth of {self.name}", self.bandwidth, above=0)
        if self.memory is not None:
            require_number(f"memory of {self.name}", self.memory, above=0)


def intensity(flops: float, moved: float) -> float:
    """FLOPs per byte moved. Raises ValueError unless both are positive and finite."""
    require_number("flops", flops, above=0)
    require_number("moved", moved, above=0)
    return flops / moved


def ridge(machine: Ceilings, dtype: str = "float32") -> float:
    """The intensity, FLOP/byte, from which arithmetic is the wait: peak FLOP/s / peak bytes/s.

    Raises ValueError for a number format that the machine has no peak for.
    """
    require_known("number format", dtype, machine.flops)
    return machine.flops[dtype] / machine.bandwidth


def ceiling(flops_per_byte: float, peak_flops: float, peak_bandwidth: float) -> float:
    """The most FLOP/s a computation of this intensity can reach: min(peak, intensity x bytes/s)."""
    require_number("flops_per_byte", flops_per_byte, above=0)
    require_number("peak_flops", peak_flops, above=0)
    require_number("peak_bandwidth", peak_bandwidth, above=0)
    return min(peak_flops, flops_per_byte * peak_bandwidth)


def roofline_seconds(flops: float, moved: float, peak_flops: float, peak_bandwidth: float) -> float:
    """The least seconds: max(FLOPs / peak FLOP/s, bytes / peak bytes/s), if both overlap fully."""
    return flops / ceiling(intensity(flops, moved), peak_flops, peak_bandwidth)


def moved_bytes(
    config: ModelConfig,
    past: int,
    *,
    positions: int = 1,
    batch: int = 1,
    bytes_per_number: float = 4,
) -> int:
    """Bytes a forward pass must move: weights, and the cache of past and new positions, once each.

    The defaults are a decoding step. A tied embedding is read whole, as the head; of an untied one
    only the rows looked up, at most `positions` x `batch`. The new positions of the cache are
    written, the past read. Left out: activations, which a processor's own cache may hold.
    """
    require_whole("past", past, least=0)
    require_whole("positions", positions)
    cache = cost.cache_bytes(
        config, past + positions, batch=batch, bytes_per_number=bytes_per_number
    )
    unread = 0 if config.tied else max(0, config.vocab - positions * batch) * config.width
    weights = (cost.parameters(config) - unread) * bytes_per_number
    return math.ceil(weights + cache)


def training_moved_bytes(
    config: ModelConfig,
    positions: int,
    *,
    batch: int = 1,
    optimizer: str = "adamw",
    bytes_per_number: int = 4,
) -> int:
    """Bytes a training step must move: 4 x weights, 2 x gradients, averages and activations.

    Weights are read forward, backward and in the update, which writes them; the others are written
    once and read once. All are kept in the same number format. An untied embedding's rows that no
    token used are counted too, since AdamW updates them all.
    """
    size = {"bytes_per_number": bytes_per_number}
    twice = (
        cost.gradient_bytes(config, **size)
        + cost.optimizer_bytes(config, optimizer, **size)
        + cost.activation_bytes(config, positions, batch=batch, **size)
    )
    return 4 * cost.weight_bytes(config, **size) + 2 * twice


@dataclass(frozen=True)
class Work:
    """A computation as the roofline sees it. Raises ValueError unless both are above 0."""

    flops: int
    moved: int  # bytes, at the least

    @property
    def intensity(self) -> float:
        return intensity(self.flops, self.moved)

    def seconds(self, machine: Ceilings, dtype: str = "float32") -> float:
        """The least time it takes on a machine."""
        ridge(machine, dtype)  # refuses a format that the machine has no peak for
        return roofline_seconds(self.flops, self.moved, machine.flops[dtype], machine.bandwidth)

    def waits_for(self, machine: Ceilings, dtype: str = "float32") -> str:
        """The slower side: "memory" below the machine's ridge, "arithmetic" from there on."""
        return "memory" if self.intensity < ridge(machine, dtype) else "arithmetic"


def reading_work(
    config: ModelConfig,
    positions: int,
    *,
    past: int = 0,
    batch: int = 1,
    bytes_per_number: float = 4,
) -> Work:
    """Reading `positions` tokens after `past` ones that a cache holds; decoding reads one."""
    moved = moved_bytes(
        config, past, positions=positions, batch=batch, bytes_per_number=bytes_per_number
    )
    return Work(cost.forward_flops(config, positions, past=past, batch=batch), moved)


def training_work(
    config: ModelConfig,
    positions: int,
    *,
    batch: int = 1,
    optimizer: str = "adamw",
    bytes_per_number: int = 4,
) -> Work:
    """One training step on `positions` tokens of each of `batch` texts."""
    size = {"batch": batch, "bytes_per_number": bytes_per_number}
    moved = training_moved_bytes(config, positions, optimizer=optimizer, **size)
    return Work(cost.training_flops(config, positions, batch=batch), moved)

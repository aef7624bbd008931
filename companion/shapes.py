"""What a model of any shape costs on any device, as one value: memory and three times.

The memory is exact (`companion.cost`); the times are the roofline's, a limit that nothing beats.
All numbers are kept in one format, and training keeps no second copy of the weights.
"""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from math import inf

from matplotlib.axes import Axes

from companion import cost, roofline
from companion import style as look
from companion.catalogue import BYTES
from companion.checks import require_known
from companion.model import ModelConfig
from companion.roofline import Device
from companion.style import Card, short

FILLS = ("#FFFFFF", "#BFD7E8", "#F3C99B", "#A9D6C5", "#C9B8D6")  # pale, for black hatches


@dataclass(frozen=True, kw_only=True)
class Time:
    """One computation on the roofline."""

    flops: int
    moved: int  # bytes
    seconds: float
    waits_for: str  # "memory" or "arithmetic"


@dataclass(frozen=True, kw_only=True)
class ShapeCosts:
    """Bytes and times of one shape on one device; shows itself as a table."""

    device: Device
    setting: str
    parameters: int
    weights: int  # bytes, as the next four
    cache: int
    gradients: int
    optimizer: int
    activations: int
    prefill: Time
    decode: Time
    training: Time

    @property
    def inference(self) -> int:
        """Bytes held to generate: weights and cache."""
        return self.weights + self.cache

    @property
    def train(self) -> int:
        """Bytes held at the end of a training step's forward pass."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def as_dict(self) -> dict:
        return asdict(self)

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, value, remark) of each line of the table."""
        memory = [
            ("weights", self.weights, ""),
            ("key-value cache", self.cache, ""),
            ("to generate", self.inference, self._fit(self.inference)),
            ("gradients", self.gradients, ""),
            ("optimizer's averages", self.optimizer, ""),
            ("activations", self.activations, ""),
            ("to train", self.train, self._fit(self.train)),
        ]
        times = [("prefill", self.prefill), ("decode one token", self.decode)]
        times.append(("training step", self.training))
        return [
            ("parameters", f"{self.parameters:,}", ""),
            *((name, in_bytes(number), remark) for name, number, remark in memory),
            *((name, in_seconds(t.seconds), f"waits for {t.waits_for}") for name, t in times),
        ]

    def _fit(self, needed: int) -> str:
        if self.device.memory is None:
            return ""
        fits = "fits into" if needed <= self.device.memory else "does not fit into"
        return f"{fits} {in_bytes(self.device.memory)}"

    def __str__(self) -> str:
        lines = [f"{name:<22}{value:>14}  {remark}".rstrip() for name, value, remark in self.rows()]
        return "\n".join([self.setting, *lines])

    def _repr_html_(self) -> str:
        cells = "".join(
            f'<tr><th scope="row" style="text-align:left">{html.escape(name)}</th>'
            f'<td style="text-align:right">{html.escape(value)}</td>'
            f'<td style="text-align:left">{html.escape(remark)}</td></tr>'
            for name, value, remark in self.rows()
        )
        return (
            f"<table><caption>{html.escape(self.setting)}</caption><tbody>{cells}</tbody></table>"
        )


def shape_table(
    config: ModelConfig,
    device: Device,
    *,
    positions: int = 512,
    batch: int = 1,
    dtype: str = "float32",
    optimizer: str = "adamw",
) -> ShapeCosts:
    """Costs of a shape: to prefill `positions` tokens, to decode the last of them, to train on all.

    Raises ValueError for a number format that the device has no peak for, and for shapes, lengths
    and names that cannot be.
    """
    require_known("number format", dtype, BYTES)
    size = {"bytes_per_number": BYTES[dtype]}
    many = {"batch": batch}

    def time(work: roofline.Work) -> Time:
        seconds, waits_for = work.seconds(device, dtype), work.waits_for(device, dtype)
        return Time(flops=work.flops, moved=work.moved, seconds=seconds, waits_for=waits_for)

    return ShapeCosts(
        device=device,
        setting=f"{device.name}, {dtype}, {positions} positions, batch {batch}, {optimizer}",
        parameters=cost.parameters(config),
        weights=cost.weight_bytes(config, **size),
        cache=cost.cache_bytes(config, positions, **many, **size),
        gradients=cost.gradient_bytes(config, **size),
        optimizer=cost.optimizer_bytes(config, optimizer, **size),
        activations=cost.activation_bytes(config, positions, **many, **size),
        prefill=time(roofline.reading_work(config, positions, **many, **size)),
        decode=time(roofline.reading_work(config, 1, past=positions - 1, **many, **size)),
        training=time(
            roofline.training_work(config, positions, optimizer=optimizer, **many, **size)
        ),
    )


def shape_figure(costs: ShapeCosts, *, title: str = "") -> Card:
    """Memory to generate and to train beside the device's, and the three times of the roofline."""
    text = "; ".join(f"{name} {value} {remark}".rstrip() for name, value, remark in costs.rows())
    with look.style():
        figure = look.card(title or costs.setting, alt=text, height=5.6)
        memory, times = figure.subplots(2, height_ratios=[3, 3])
        _draw_memory(memory, costs)
        _draw_times(times, costs)
    return figure


def in_bytes(number: float) -> str:
    """Bytes in the largest decimal unit that leaves 1 or more: 538 MB."""
    return _scaled(number, (("B", 1), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)))


def in_seconds(number: float) -> str:
    """Seconds in the largest unit that leaves 1 or more: 3.2 ms."""
    return _scaled(number, (("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3), ("s", 1), ("h", 3600)))


def _scaled(number: float, units: tuple[tuple[str, float], ...]) -> str:
    name, size = max((u for u in units if u[1] <= number), key=lambda u: u[1], default=units[0])
    return f"{short(number / size)} {name}"


def _draw_memory(axes: Axes, costs: ShapeCosts) -> None:
    parts = ("weights", "cache", "gradients", "optimizer", "activations")
    ends = {"generate": 0.0, "train": 0.0}
    for i, part in enumerate(parts):
        held = getattr(costs, part) / 1e9
        paint = {"color": FILLS[i], "edgecolor": "black", "hatch": look.HATCHES[i]}
        rows = {"generate": part in ("weights", "cache"), "train": part != "cache"}
        names = [row for row, holds in rows.items() if holds]
        axes.barh(names, [held] * len(names), left=[ends[n] for n in names], label=part, **paint)
        ends |= {name: ends[name] + held for name in names}
    limit = costs.device.memory / 1e9 if costs.device.memory else inf
    if limit < 2 * max(ends.values()):
        axes.axvline(limit, color="black", linewidth=3, label="device")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.45), ncols=3)
    look.label_axes(axes, "memory (GB)", None)


def _draw_times(axes: Axes, costs: ShapeCosts) -> None:
    times = {"prefill": costs.prefill, "decode": costs.decode, "train": costs.training}
    milliseconds = [time.seconds * 1e3 for time in times.values()]
    axes.set(xlim=(min(milliseconds) / 4, max(milliseconds) * 4), ylim=(-0.5, 2.5))
    look.plain_log(axes, "x")
    for i, (x, time) in enumerate(zip(milliseconds, times.values(), strict=True)):
        axes.plot(x, i, color="black", marker="o" if time.waits_for == "memory" else "s")
        left = x > (min(milliseconds) * max(milliseconds)) ** 0.5
        place = {"xytext": (-9 if left else 9, 0), "ha": "right" if left else "left"}
        note = f"{in_seconds(time.seconds)}, waits for {time.waits_for}"
        axes.annotate(note, (x, i), textcoords="offset points", va="center", **place)
    axes.set_yticks(range(3), list(times))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    look.label_axes(axes, "least time by the roofline (ms)", None)

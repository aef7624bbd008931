"""Figures from measurements. Each function takes plain numbers and returns the figure.

A value is a number or an interval (middle, low, high). Every axis says its unit; empty data and
numbers that are not finite are refused. Each figure carries its alt text as `figure.alt`, made
from the numbers; `alt=` replaces it. See `companion.style` for how figures look and show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from companion import style as look
from companion.checks import require
from companion.maps import crossover
from companion.roofline import Ceilings, ceiling, ridge
from companion.style import Card, Value, interval, require_some, short

__all__ = ["bars", "crossover", "lines", "roofline", "tradeoff"]


def roofline(
    machine: Ceilings,
    points: Mapping[str, tuple[float, float]],
    *,
    dtype: str = "float32",
    title: str = "",
    alt: str = "",
) -> Card:
    """Log-log roofline of a machine, with points {label: (FLOP/byte, FLOP/s reached)}.

    A hollow marker is the ceiling that the roofline predicts at a point's intensity; the full one
    below it is what was measured, and the legend gives their ratio.
    """
    require_some("points", points, most=len(look.COLOURS))
    knee, bandwidth = ridge(machine, dtype), machine.bandwidth
    peak = machine.flops[dtype]
    rows = {name: _roof_point(name, point, peak, bandwidth) for name, point in points.items()}
    x = [knee / 8, knee * 8, *(row[0] for row in rows.values())]
    span = np.geomspace(min(x) / 2, max(x) * 2, 200)
    summary = "; ".join(f"{name}: {_share(row)}" for name, row in rows.items())
    roof_text = f"flat above {knee:.3g} FLOP/byte at {short(_giga(peak))} GFLOP/s"
    text = f"Roofline, {dtype}: {roof_text}. {summary}"
    with look.style():
        figure = look.card(title, alt=alt or text, height=4.6)
        axes = figure.subplots()
        roof = [_giga(ceiling(i, peak, bandwidth)) for i in span]
        axes.plot(span, roof, color="black")
        axes.axvline(knee, color="black", linewidth=1, linestyle=":")
        axes.annotate(f" ridge {knee:.3g}", (knee, 0.02), xycoords=("data", "axes fraction"))
        for i, (name, row) in enumerate(rows.items()):
            _draw_roof_point(axes, i, f"{name}: {_share(row)}", row)
        _finish(axes, "intensity (FLOP/byte)", "speed (GFLOP/s)", True, True)
        figure.legend(loc="outside lower left")
    return figure


def lines(
    series: Mapping[str, Sequence[Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    title: str = "",
    alt: str = "",
) -> Card:
    """Lines {label: (x, y)} or, with a band from low to high, {label: (x, y, low, high)}."""
    require_some("series", series, most=len(look.COLOURS))
    rows = {name: _curve(name, curve, log_x, log_y) for name, curve in series.items()}
    ends = "; ".join(f"{n}: {short(y[0])} to {short(y[-1])}" for n, (_, y, *_) in rows.items())
    text = f"{y_label} over {x_label}. {ends}"
    with look.style():
        figure = look.card(title, alt=alt or text, height=4.4)
        axes = figure.subplots()
        for i, (name, (x, y, *band)) in enumerate(rows.items()):
            axes.plot(x, y, label=name, **_series(i))
            if band:
                axes.fill_between(x, *band, color=look.COLOURS[i], alpha=0.2, linewidth=0)
        _finish(axes, x_label, y_label, log_x, log_y)
        if len(rows) > 1 or next(iter(rows)):
            figure.legend(loc="outside lower left", ncols=1 if len(rows) < 3 else 2)
    return figure


def tradeoff(
    points: Mapping[str, tuple[Value, Value]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    title: str = "",
    alt: str = "",
) -> Card:
    """One labelled point for each candidate, {label: (x, y)}; intervals become error bars."""
    require_some("points", points)
    rows = {
        name: (interval(name, x, positive=log_x), interval(name, y, positive=log_y))
        for name, (x, y) in points.items()
    }
    places = "; ".join(f"{n}: {short(x[0])}, {short(y[0])}" for n, (x, y) in rows.items())
    text = f"{y_label} against {x_label}. {places}"
    with look.style():
        figure = look.card(title, alt=alt or text, height=4.4)
        axes = figure.subplots()
        for i, (x, y) in enumerate(rows.values()):
            marks = {**_series(i % len(look.COLOURS)), "linestyle": "none"}
            axes.errorbar(x[0], y[0], xerr=_arms(x), yerr=_arms(y), capsize=4, **marks)
        axes.margins(0.12)
        _finish(axes, x_label, y_label, log_x, log_y)
        for name, (x, y) in rows.items():
            _name_point(axes, name, x[0], y[0])
    return figure


def bars(
    values: Mapping[str, Value],
    *,
    label: str,
    reference: float | None = None,
    title: str = "",
    alt: str = "",
) -> Card:
    """Horizontal bars from zero with their values; `reference` draws a line to compare with."""
    require_some("values", values)
    rows = {name: interval(name, value) for name, value in values.items()}
    numbers = "; ".join(f"{name}: {short(row[0])}" for name, row in rows.items())
    text = f"{label}. {numbers}"
    with look.style():
        figure = look.card(title, alt=alt or text, height=1.3 + 0.5 * len(rows))
        axes = figure.subplots()
        middles = [row[0] for row in rows.values()]
        arms = np.hstack([_arms(row) for row in rows.values()])
        paint = {"color": look.PALE, "edgecolor": "black", "hatch": "//"}
        axes.barh(list(rows), middles, xerr=arms, capsize=4, **paint)
        for i, (middle, low, high) in enumerate(rows.values()):
            end, side = (high, "left") if middle >= 0 else (low, "right")
            axes.annotate(f" {short(middle)} ", (end, i), ha=side, va="center")
        if reference is not None:
            axes.axvline(interval("reference", reference)[0], color="black", linestyle="--")
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        look.label_axes(axes, label, None)
    return figure


def _curve(name: str, curve: Sequence[Sequence[float]], log_x: bool, log_y: bool) -> list:
    require(len(curve) in (2, 4), f"{name} has {len(curve)} parts; (x, y) or (x, y, low, high)")
    x, *heights = (np.asarray(part, dtype=float) for part in curve)
    shapes = [part.shape for part in (x, *heights)]
    alike = x.ndim == 1 and x.size > 0 and all(shape == x.shape for shape in shapes)
    require(
        alike, f"{name} has parts of shapes {shapes}; equally many points are needed, 1 or more"
    )
    for part, log in ((x, log_x), *((height, log_y) for height in heights)):
        bad = part[~np.isfinite(part) | (part <= 0 if log else False)]
        limit = "finite numbers above 0" if log else "finite numbers"
        require(bad.size == 0, f"{name} holds {bad[:1]}; only {limit} can be drawn")
    return [x, *heights]


def _series(i: int) -> dict:
    return {"color": look.COLOURS[i], "marker": look.MARKERS[i], "linestyle": look.LINES[i]}


def _finish(axes: Axes, x_label: str, y_label: str, log_x: bool, log_y: bool) -> None:
    for name, log in (("x", log_x), ("y", log_y)):
        if log:
            look.plain_log(axes, name)
    look.label_axes(axes, x_label, y_label)


def _arms(row: tuple[float, float, float]) -> np.ndarray:
    """Lengths of the error bar below and above, (2, 1)."""
    middle, low, high = row
    return np.array([[middle - low], [high - middle]])


def _name_point(axes: Axes, name: str, x: float, y: float) -> None:
    """Write a name beside its point, on the side where there is room."""
    axes.autoscale_view()
    share = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[0]
    left = share > 0.6
    place = {"xytext": (-9 if left else 9, 9), "ha": "right" if left else "left"}
    axes.annotate(name, (x, y), textcoords="offset points", **place)


def _giga(number: float) -> float:
    return number / 1e9


def _roof_point(name: str, point: tuple[float, float], peak: float, bandwidth: float) -> tuple:
    """(intensity, reached, ceiling), the last two in GFLOP/s."""
    flops_per_byte = interval(f"intensity of {name}", point[0], positive=True)[0]
    reached = interval(f"speed of {name}", point[1], positive=True)[0]
    return flops_per_byte, _giga(reached), _giga(ceiling(flops_per_byte, peak, bandwidth))


def _share(row: tuple[float, float, float]) -> str:
    return f"{short(row[1])} of {short(row[2])} GFLOP/s ({row[1] / row[2]:.0%})"


def _draw_roof_point(axes: Axes, i: int, label: str, row: tuple[float, float, float]) -> None:
    x, reached, top = row
    marks = {"color": look.COLOURS[i], "marker": look.MARKERS[i], "linestyle": "none"}
    axes.plot([x, x], [reached, top], color=look.COLOURS[i], linewidth=1)
    axes.plot(x, top, **marks, markerfacecolor="white", zorder=3)
    axes.plot(x, reached, **marks, label=label, zorder=4)

"""Crossover maps: for which sizes a method pays, and for which it does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from companion import style as look
from companion.checks import require
from companion.style import Card, interval, require_some, short

# Light to dark, never so dark that black digits would not read.
SHADES = LinearSegmentedColormap.from_list("shades", ["#FFFFFF", "#8FC3E0"])


def crossover(
    cells: Iterable[Mapping[str, float]],
    *,
    x: str,
    y: str,
    value: str,
    x_label: str,
    y_label: str,
    value_label: str,
    predicted: str | None = None,
    title: str = "",
    alt: str = "",
) -> Card:
    """Where a method pays: a table of ratios, hatched where the ratio is under 1.0.

    `cells` are records such as {"batch": 1, "width": 64, "speedup": 0.8}, one for every pair of x
    and y; `predicted` names a second ratio, whose crossing of 1.0 is drawn as a thick line.
    """
    cells = list(cells)
    require_some("cells", cells)
    look.require_unit("value_label", value_label)
    columns, rows, table = _pivot(cells, x, y, value)
    under = int((table < 1).sum())
    text = f"{value_label} by {x_label} and {y_label}: under 1.0 in {under} of {table.size} cells"
    with look.style():
        figure = look.card(title, alt=alt or text, height=1.6 + 0.55 * len(rows))
        axes = figure.subplots()
        _draw_cells(axes, table)
        if predicted is not None:
            _draw_frontier(axes, _pivot(cells, x, y, predicted)[2] >= 1)
        axes.set_xticks(range(len(columns)), [_size(c) for c in columns])
        axes.set_yticks(range(len(rows)), [_size(r) for r in rows])
        axes.grid(visible=False)
        legend = "hatched: under 1.0" + ("" if predicted is None else "; line: predicted")
        axes.set_title(f"{value_label}; {legend}", fontsize=12, fontweight="normal")
        look.label_axes(axes, x_label, y_label)
    return figure


def _pivot(
    cells: list[Mapping[str, float]], x: str, y: str, value: str
) -> tuple[list[float], list[float], np.ndarray]:
    """Columns, rows and the table (rows, columns) of one field of the records."""
    for field in (x, y, value):
        known = all(field in cell for cell in cells)
        require(known, f"{field!r} is missing from a cell; each needs {x!r}, {y!r} and {value!r}")
    found = {(cell[y], cell[x]): cell[value] for cell in cells}
    columns, rows = sorted({c for _, c in found}), sorted({r for r, _ in found})
    whole = len(cells) == len(found) == len(columns) * len(rows)
    need = f"{len(cells)} cells; {len(columns)} x {len(rows)} different ones are needed"
    require(whole, need)
    numbers = [[_ratio(value, r, c, found) for c in columns] for r in rows]
    return columns, rows, np.array(numbers)


def _size(number: float) -> str:
    """A size that was chosen, not measured: all digits of a whole number, such as 2,048."""
    return f"{number:,}" if isinstance(number, int) else short(number)


def _ratio(name: str, row: float, column: float, found: Mapping) -> float:
    return interval(f"{name} at ({column}, {row})", found[row, column], positive=True)[0]


def _draw_cells(axes: Axes, table: np.ndarray) -> None:
    axes.imshow(np.log(table), cmap=SHADES, aspect="auto", origin="lower")
    for (row, column), ratio in np.ndenumerate(table):
        corner = (column - 0.5, row - 0.5)
        hatch = "///" if ratio < 1 else None
        edges = {"fill": False, "edgecolor": "#777777", "linewidth": 0.5}
        axes.add_patch(Rectangle(corner, 1, 1, hatch=hatch, **edges))
        plate = {"facecolor": "white", "edgecolor": "none", "pad": 1.5} if ratio < 1 else None
        axes.text(column, row, f"{ratio:.2f}", ha="center", va="center", bbox=plate)


def _draw_frontier(axes: Axes, pays: np.ndarray) -> None:
    """A thick line along every cell edge where the prediction crosses 1.0."""
    thick = {"color": "black", "linewidth": 3.5, "solid_capstyle": "projecting"}
    for row, column in zip(*np.nonzero(pays[:, 1:] != pays[:, :-1]), strict=True):
        axes.plot([column + 0.5] * 2, [row - 0.5, row + 0.5], **thick)
    for row, column in zip(*np.nonzero(pays[1:] != pays[:-1]), strict=True):
        axes.plot([column - 0.5, column + 0.5], [row + 0.5] * 2, **thick)

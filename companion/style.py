"""One figure style for the course: a white card that reads in grey, in the dark and on a phone.

Series differ three ways at once: by colour, whose lightness steps survive grey print and every kind
of colour vision, by marker, and by line or hatch. Nothing here changes matplotlib's own settings:
figures are made without pyplot, so none stays open and a notebook shows each one once.
"""

from __future__ import annotations

import html
import io
import math
import textwrap
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from companion.checks import require

# Hues after Okabe and Ito's palette, darkened to even steps of lightness and 3:1 against white,
# but for the last, which the marker carries. jfly.uni-koeln.de/color
COLOURS = ("#00527F", "#D97210", "#000000", "#007E5C", "#4B1A6B", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
HATCHES = ("", "//", "..", "xx", "--", "oo")
PALE = "#D9D9D9"

SETTINGS = {
    "figure.dpi": 120,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "font.family": "DejaVu Sans",  # comes with matplotlib, so figures are alike everywhere
    "font.size": 12,  # 6 inches on a phone's 360 points leave 10 pixels
    "grid.color": "#DDDDDD",
    "hatch.linewidth": 1.2,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 8,
    "text.color": "black",
}

# A value on a plot: a number, or (middle, low, high) of an interval.
Value = float | tuple[float, float, float]


class Card(Figure):
    """A figure that a notebook shows once, as a PNG, with `alt` as the text for a screen reader."""

    alt = ""

    def _repr_png_(self) -> bytes:
        with style():
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=SETTINGS["figure.dpi"], facecolor="white")
        return file.getvalue()

    def _repr_html_(self) -> str:
        data, text = b64encode(self._repr_png_()).decode(), html.escape(self.alt, quote=True)
        look = "max-width:100%;height:auto;background:white;border-radius:6px"
        return f'<img src="data:image/png;base64,{data}" alt="{text}" style="{look}">'


@contextmanager
def style() -> Iterator[None]:
    """Within it, matplotlib draws in the course's style; afterwards as before."""
    with matplotlib.rc_context(SETTINGS):
        yield


def card(title: str = "", *, alt: str = "", width: float = 6, height: float = 4) -> Card:
    """An empty figure of the course's style, size in inches. Call it within `style()`."""
    figure = Card(figsize=(width, height), layout="constrained")
    figure.alt = f"{title}. {alt}" if title and alt else title or alt
    if title:
        figure.suptitle(textwrap.fill(title, 52), x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def alt(figure: Figure) -> str:
    """The text that stands for a figure; the book needs it where a cell's metadata asks for one."""
    return getattr(figure, "alt", "")


def label_axes(axes: Axes, x_label: str | None, y_label: str | None) -> None:
    """Set both labels. Raises ValueError unless each ends with a unit, as in "time (ms)"."""
    for name, label in (("x_label", x_label), ("y_label", y_label)):
        if label is not None:
            require_unit(name, label)
    axes.set_xlabel(x_label or "")
    axes.set_ylabel(y_label or "")


def plain_log(axes: Axes, name: str) -> None:
    """Make axis "x" or "y" logarithmic, its ticks written as plain numbers. Call it last."""
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    if high < 50 * low:  # few powers of ten in sight
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda number, _: short(number))
    axis.set_minor_formatter(NullFormatter())


def require_unit(name: str, label: str) -> None:
    """`label` must end with a unit in brackets; a ratio's unit is (x) or (ratio)."""
    good = label.endswith(")") and " (" in label and not label.endswith("()")
    require(good, f"{name} is {label!r}; it needs a unit at its end, as in 'time (ms)'")


def require_some(name: str, data: Mapping | list, most: int | None = None) -> None:
    """There must be data to draw, and no more series than can be told apart."""
    require(len(data) > 0, f"{name} holds 0 entries; at least 1 is needed")
    fits = most is None or len(data) <= most
    require(fits, f"{name} holds {len(data)} entries; at most {most} can be told apart")


def interval(name: str, value: Value, *, positive: bool = False) -> tuple[float, float, float]:
    """(middle, low, high) of a number or an interval.

    Raises ValueError for non-finite numbers, for an interval out of order, and, if `positive`, for
    numbers that a logarithmic axis or a bar from zero cannot show.
    """
    middle, low, high = value if isinstance(value, tuple) else (value, value, value)
    finite = all(math.isfinite(number) for number in (middle, low, high))
    require(finite, f"{name} is {value!r}; finite numbers are needed")
    require(low <= middle <= high, f"{name} is {value!r}; (middle, low, high) must be in order")
    require(not positive or low > 0, f"{name} is {value!r}; only numbers above 0 can be drawn")
    return float(middle), float(low), float(high)


def short(number: float) -> str:
    """Three digits, thousands with a comma: 0.00123, 1.23, 123, 12,300."""
    if number and math.isfinite(number) and abs(number) >= 1000:
        digits = max(0, math.floor(math.log10(abs(number))) - 2)
        return f"{round(number, -digits):,.0f}"
    return f"{number:.3g}"

"""One number as each format stores it: its bits by field, what they stand for, the error, the gap.

Fields differ by lightness, from left to right: sign black, exponent blue, fraction white.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ipywidgets as widgets
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from companion import style as look
from companion.checks import require
from companion.explorers.choices import LOOK, Explorer
from companion.precision.formats import FORMATS, Format, format_of
from companion.precision.rounding import rounded
from companion.style import Card

FIELDS = ("sign", "exponent", "fraction")
FILLS = {"sign": "black", "exponent": look.COLOURS[5], "fraction": "white"}
DIGITS = {"fontsize": 10, "fontfamily": "DejaVu Sans Mono"}
LARGEST = FORMATS["FP32"].largest


@dataclass(frozen=True)
class Stored:
    """A number as a format stores it."""

    format: Format
    number: float  # what was to be stored
    value: float  # what is
    fields: tuple[str, str, str]  # the bits of sign, exponent and fraction
    spacing: float  # of the format at the value; NaN at infinity

    @property
    def error(self) -> float:
        """The value less the number."""
        return self.value - self.number

    @property
    def kind(self) -> str:
        """Normal, denormal, zero or infinite."""
        if self.value == 0 or math.isinf(self.value):
            return "infinite" if self.value else "zero"
        return "denormal" if abs(self.value) < self.format.smallest_normal else "normal"

    def __str__(self) -> str:
        """Format, value, error and spacing in a line."""
        if self.kind == "infinite":
            return f"{self.format.name}: infinite, the largest is {self.format.largest:,.0f}"
        share = f" ({look.short(abs(100 * self.error / self.number))} %)" if self.error else ""
        name = f"{self.format.name}: {self.value:.8g}{', denormal' * (self.kind == 'denormal')}"
        return f"{name}, error {self.error:+.2g}{share}, spacing {self.spacing:.2g}"


def stored(number: float, format: Format | str) -> Stored:
    """A number, taken as FP32 first, rounded to the nearest of a format.

    Where denormals are flushed (`torch.set_flush_denormal`), FP32's become 0 at that first step.
    Raises ValueError for an unknown format, and for a number that is not finite in FP32.
    """
    found = format_of(format)
    require(abs(number) <= LARGEST, f"the number is {number!r}; at most {LARGEST:.4g} fits FP32")
    near = rounded(torch.tensor(number, dtype=torch.float64).float(), found)
    widths = (1, found.exponent_bits, found.fraction_bits)
    parts = found.parts(near)
    sign, exponent, fraction = (f"{p:0{width}b}" for p, width in zip(parts, widths, strict=True))
    value = found.value(parts).item()
    return Stored(found, number, value, (sign, exponent, fraction), found.spacing(value).item())


def number_figure(number: float = 0.01) -> Card:
    """The bits of a number in each format, and in words what is stored, the error, the spacing.

    Raises ValueError for a number that is not finite in FP32.
    """
    rows = [stored(number, name) for name in FORMATS]
    alt = "; ".join(f"{row}, bits {' '.join(row.fields)}" for row in rows)
    with look.style():
        figure = look.card(f"{number:.8g} in seven formats", alt=alt, height=6.4)
        axes = figure.subplots()
        axes.set(xlim=(0, 32.6), ylim=(len(rows), -0.1))
        axes.set_axis_off()
        for place, row in enumerate(rows):
            _draw(axes, place, row)
        for text in axes.texts:
            text.set_in_layout(False)  # or a long line makes the axes narrow
        marks = [Patch(facecolor=FILLS[name], edgecolor="black", label=name) for name in FIELDS]
        figure.legend(handles=marks, loc="outside lower left", ncols=3)
    return figure


def number_explorer(number: float = 0.01) -> Explorer:
    """`number_figure` of a number times a power of two, which a slider moves through the range."""
    controls = {
        "number": widgets.FloatText(description="number", value=number, **LOOK),
        "power": widgets.IntSlider(description="times 2^", min=-40, max=40, value=0, **LOOK),
    }

    def show(*, number: float, power: int) -> str:
        return number_figure(number * 2.0**power)._repr_html_()

    return Explorer(controls, show)


def _draw(axes: Axes, place: int, row: Stored) -> None:
    """A line of words, and below it a box for each field with its bits, one unit a bit."""
    axes.text(0, place + 0.36, str(row), fontsize=10, va="bottom")
    left = 0.0
    for name, bits in zip(FIELDS, row.fields, strict=True):
        size = len(bits), 0.42
        axes.add_patch(Rectangle((left, place + 0.42), *size, fc=FILLS[name], ec="black"))
        middle, ink = (left + size[0] / 2, place + 0.63), "white" if name == "sign" else "black"
        axes.text(*middle, " ".join(bits), color=ink, ha="center", va="center", **DIGITS)
        left += size[0] + 0.3

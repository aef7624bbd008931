"""The rounding picture: the numbers of one row of a weight, the levels they may take, the errors.

Each group has levels of its own, so a large number spoils only the group it lies in.
"""

from __future__ import annotations

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from companion import style as look
from companion.checks import require, require_known
from companion.explorers.choices import LOOK, Explorer, choice, group_name
from companion.quantization import affine, extremes, least_squares, minimum, percentile, symmetric
from companion.quantization.grids import Grid, code_range, fit, grouped
from companion.style import Card

MAPPINGS = {"symmetric": symmetric, "affine": affine, "minimum": minimum}
LIMITS = {"extremes": extremes, "least squares": least_squares, "1 % cut off": percentile(0.01)}
DRAWN = 5  # bits up to which single levels can be told apart


def rounding_figure(
    row: Tensor,
    bits: int = 4,
    *,
    mapping: str = "symmetric",
    group: int | str = "row",
    limits: str = "extremes",
) -> Card:
    """Numbers (I,) of one row with the levels of each group, and below them the errors.

    The band below is half a scale to either side. Raises ValueError for what cannot be.
    """
    require(row.ndim == 1, f"the row has shape {tuple(row.shape)}; a line of numbers is expected")
    require_known("mapping", mapping, MAPPINGS)
    require_known("limits", limits, LIMITS)
    numbers = grouped(row[None].float(), group)
    grid = fit(numbers, bits, mapping=MAPPINGS[mapping], limits=LIMITS[limits])
    error = (grid.rounded(numbers) - numbers).flatten()
    size = error.square().mean().sqrt() / row.float().square().mean().sqrt()
    title = f"{bits} bits, {mapping}, {group_name(group)}: error {size:.1%} of the numbers"
    half = (grid.scale / 2).expand_as(numbers).flatten()
    alt = f"{len(_codes(grid))} levels a group; errors up to {error.abs().max():.3g}, half a scale "
    alt += f"from {half.min():.3g} to {half.max():.3g}"
    with look.style():
        figure = look.card(title, alt=alt, height=5.2)
        above, below = figure.subplots(2, 1, sharex=True)
        _draw_numbers(above, numbers, grid)
        _draw_errors(below, error, half)
    return figure


def rounding_explorer(row: Tensor) -> Explorer:
    """`rounding_figure` of one row behind controls."""
    groups = [size for size in (32, 64, 192) if len(row) % size == 0] + ["row"]
    controls = {
        "bits": widgets.IntSlider(description="bits", min=2, max=8, value=4, **LOOK),
        "mapping": choice("mapping", [*MAPPINGS], "symmetric"),
        "group": choice("group", groups, "row"),
        "limits": choice("limits", [*LIMITS], "extremes"),
    }
    return Explorer(controls, lambda **chosen: rounding_figure(row, **chosen)._repr_html_())


def _codes(grid: Grid) -> Tensor:
    """All codes that the grid uses: a symmetric one leaves the lowest out."""
    lowest, highest = code_range(grid.bits)
    balanced = grid.zero is None and grid.offset is None
    return torch.arange(-highest if balanced else lowest, highest + 1)


def _draw_numbers(axes: Axes, numbers: Tensor, grid: Grid) -> None:
    _, groups, size = numbers.shape
    if grid.bits <= DRAWN:
        levels = grid.numbers(_codes(grid).expand(1, groups, -1))[0]
        for index, heights in enumerate(levels.tolist()):
            start, stop = index * size - 0.5, (index + 1) * size - 0.5
            axes.hlines(heights, start, stop, color="#999999", linewidth=0.8)
    flat = numbers.flatten()
    axes.plot(np.arange(len(flat)), flat, ".", color=look.COLOURS[0], markersize=3)
    look.label_axes(axes, None, "weight (number)")


def _draw_errors(axes: Axes, error: Tensor, half: Tensor) -> None:
    places = np.arange(len(error))
    axes.fill_between(places, -half, half, step="mid", color=look.PALE)
    axes.plot(places, error, ".", color=look.COLOURS[1], markersize=3)
    look.label_axes(axes, "input (index)", "error (number)")

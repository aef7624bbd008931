"""Figures hold the numbers they were given, refuse what cannot be drawn, and leave no trace."""

from html import unescape
from math import inf, nan

import matplotlib
import nbformat
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from nbclient import NotebookClient

from companion import plots, style
from companion.roofline import Device

DEVICE = Device(name="toy", flops={"float32": 1e11, "bfloat16": 4e11}, bandwidth=1e10)
CELLS = [
    {"batch": batch, "width": width, "speedup": batch * width / 128, "expected": batch / 2}
    for width in (64, 128)
    for batch in (1, 2, 4)
]
MAP = {"x": "batch", "y": "width", "value": "speedup"}
MAP |= {"x_label": "batch (sequences)", "y_label": "width (numbers)", "value_label": "speed-up (x)"}
XY = {"x_label": "size (MB)", "y_label": "time (ms)"}

FIGURES = {
    "roofline": lambda: plots.roofline(DEVICE, {"decode": (2, 1e10), "prefill": (80, 5e10)}),
    "lines": lambda: plots.lines({"a": ([1, 2], [3, 4]), "b": ([1, 2], [4, 3])}, **XY),
    "band": lambda: plots.lines({"a": ([1, 2], [3, 4], [2, 3], [4, 5])}, log_x=True, **XY),
    "tradeoff": lambda: plots.tradeoff({"full": (1, (2, 1, 3)), "half": (9, 4)}, **XY),
    "bars": lambda: plots.bars({"full": (18, 16, 19), "int8": 30}, label="speed (tokens/s)"),
    "crossover": lambda: plots.crossover(CELLS, predicted="expected", **MAP),
}


@pytest.fixture(params=FIGURES)
def figure(request):
    return FIGURES[request.param]()


def marks(figure):
    """Points of every drawn line that has a marker, as {(x, y), ...}."""
    drawn = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", "")]
    return {(float(x), float(y)) for line in drawn for x, y in zip(*line.get_data(), strict=True)}


def test_a_figure_draws_leaves_settings_alone_and_says_what_it_shows(figure):
    before = dict(matplotlib.rcParams)
    png = figure._repr_png_()
    assert png.startswith(b"\x89PNG") and len(png) > 5000
    assert dict(matplotlib.rcParams) == before
    assert style.alt(figure) and any(digit in style.alt(figure) for digit in "0123456789")
    assert style.alt(figure) in unescape(figure._repr_html_())


def test_every_axis_has_a_unit_and_every_text_reads_on_a_phone(figure):
    figure._repr_png_()
    axes = figure.axes[0]
    labels = [axes.get_xlabel(), axes.get_ylabel()]
    assert all(label.endswith(")") for label in labels if label) and any(labels)
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    width = figure.get_size_inches()[0] * 72
    assert min(text.get_fontsize() for text in texts) * 360 / width >= 10  # a phone has 360 pixels


def test_figures_inside_the_style_only():
    before = matplotlib.rcParams["axes.spines.top"]
    with style.style():
        assert matplotlib.rcParams["axes.spines.top"] is False
    assert matplotlib.rcParams["axes.spines.top"] == before


def test_colours_differ_in_grey_and_stand_out_on_white():
    lightness = [_lightness(colour) for colour in style.COLOURS]
    gaps = np.diff(sorted(lightness))
    assert gaps.min() > 9
    assert max(lightness[:5]) < 62  # 3:1 against white
    looks = {*zip(style.MARKERS, style.LINES, style.HATCHES, strict=True)}
    assert len(looks) == len(style.COLOURS) == len(set(style.MARKERS)) == len(set(style.HATCHES))


def _lightness(colour):
    """CIE L* of a colour, 0 to 100."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = np.dot([0.2126, 0.7152, 0.0722], linear)
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_roofline_draws_ceilings_and_what_was_reached():
    figure = FIGURES["roofline"]()
    expected = {(2, 10), (2, 20), (80, 50), (80, 100)}  # GFLOP/s; ridge at 10 FLOP/byte
    assert marks(figure) == {(float(x), float(y)) for x, y in expected}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [label.split(": ")[1] for label in legend] == [
        "10 of 20 GFLOP/s (50%)",
        "50 of 100 GFLOP/s (50%)",
    ]
    roof = figure.axes[0].lines[0].get_data()
    at_ends = [roof[1][0] / roof[0][0], roof[1][-1]]
    np.testing.assert_allclose(at_ends, [10, 100])
    wide = plots.roofline(DEVICE, {"prefill": (80, 5e10)}, dtype="bfloat16")
    assert (80.0, 400.0) in marks(wide)


def test_lines_and_tradeoff_hold_their_points():
    assert marks(FIGURES["lines"]()) == {(1, 3), (2, 4), (1, 4), (2, 3)}
    assert marks(FIGURES["tradeoff"]()) >= {(1, 2), (9, 4)}
    band = FIGURES["band"]().axes[0].collections[0].get_paths()[0].vertices
    assert {(1.0, 2.0), (2.0, 3.0), (1.0, 4.0), (2.0, 5.0)} <= {tuple(v) for v in band}


def test_bars_hold_their_lengths_and_intervals():
    axes = FIGURES["bars"]().axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [18, 30]
    arms = axes.collections[0].get_segments()
    assert [(a[0][0], a[1][0]) for a in arms] == [(16, 19), (30, 30)]
    assert [(t.get_text().strip(), *t.xy) for t in axes.texts] == [("18", 19, 0), ("30", 30, 1)]


def test_crossover_hatches_what_does_not_pay_and_draws_the_prediction():
    axes = FIGURES["crossover"]().axes[0]
    ratios = {(t.get_position()): float(t.get_text()) for t in axes.texts}
    columns, rows = [1, 2, 4], [64, 128]
    for (column, row), ratio in ratios.items():
        assert ratio == columns[column] * rows[row] / 128
    cells = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    hatched = {(c.get_x() + 0.5, c.get_y() + 0.5) for c in cells if c.get_hatch()}
    assert hatched == {place for place, ratio in ratios.items() if ratio < 1} == {(0, 0)}
    edges = [line.get_data() for line in axes.lines]
    assert [(list(x), list(y)) for x, y in edges] == [
        ([0.5, 0.5], [-0.5, 0.5]),  # batch 1 | 2, in both rows
        ([0.5, 0.5], [0.5, 1.5]),
    ]
    assert "under 1.0 in 1 of 6" in style.alt(FIGURES["crossover"]())


def test_crossover_shows_all_digits_of_a_chosen_size():
    cells = [{"batch": 0.5, "width": 2048, "speedup": 1.0}]
    axes = plots.crossover(cells, **MAP).axes[0]
    labels = [t.get_text() for t in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    assert labels == ["0.5", "2,048"]


@pytest.mark.parametrize(
    "call",
    [
        lambda: plots.roofline(DEVICE, {}),
        lambda: plots.roofline(DEVICE, {"a": (nan, 1e9)}),
        lambda: plots.roofline(DEVICE, {"a": (1, 0)}),
        lambda: plots.roofline(DEVICE, {"a": (1, 1e9)}, dtype="int8"),
        lambda: plots.lines({}, **XY),
        lambda: plots.lines({"a": ([], [])}, **XY),
        lambda: plots.lines({"a": ([1, 2], [1])}, **XY),
        lambda: plots.lines({"a": ([1, 2], [1, inf])}, **XY),
        lambda: plots.lines({"a": ([1, 2], [1, 2], [1, 2])}, **XY),
        lambda: plots.lines({"a": ([0, 2], [1, 2])}, log_x=True, **XY),
        lambda: plots.lines({"a": ([1, 2], [-1, 2])}, log_y=True, **XY),
        lambda: plots.lines({"a": ([1], [1])}, x_label="size", y_label="time (ms)"),
        lambda: plots.lines({"a": ([1], [1])}, x_label="size (MB)", y_label="time ()"),
        lambda: plots.lines({str(i): ([1], [1]) for i in range(7)}, **XY),
        lambda: plots.tradeoff({}, **XY),
        lambda: plots.tradeoff({"a": (1, (2, 3, 4))}, **XY),
        lambda: plots.tradeoff({"a": (0, 1)}, log_x=True, **XY),
        lambda: plots.bars({}, label="speed (x)"),
        lambda: plots.bars({"a": nan}, label="speed (x)"),
        lambda: plots.bars({"a": 1}, label="speed"),
        lambda: plots.bars({"a": 1}, label="speed (x)", reference=inf),
        lambda: plots.crossover([], **MAP),
        lambda: plots.crossover(CELLS[1:], **MAP),
        lambda: plots.crossover([*CELLS, CELLS[0]], **MAP),
        lambda: plots.crossover([{**CELLS[0], "speedup": 0}], **MAP),
        lambda: plots.crossover(CELLS, predicted="other", **MAP),
        lambda: plots.crossover(CELLS, **{**MAP, "value_label": "speed-up"}),
    ],
)
def test_what_cannot_be_drawn_is_refused(call):
    with pytest.raises(ValueError) as problem:
        call()
    assert problem.traceback[-1].name == "require"  # ours, not one that matplotlib ran into


def test_a_notebook_shows_a_figure_once():
    """As one output, PNG and the same picture with alt text, whether pyplot is there or not."""
    show = "plots.bars({'a': 1}, label='speed (x)')"
    cells = [
        f"import sys\nfrom companion import plots\n{show}",
        "assert 'matplotlib.pyplot' not in sys.modules",
        f"import matplotlib.pyplot\n{show}",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    for cell in notebook.cells[::2]:
        (output,) = cell.outputs
        assert output.output_type == "execute_result"
        assert len(output.data["image/png"]) > 5000
        assert 'alt="speed (x). a: 1"' in output.data["text/html"]

"""The pictures show what the grids do, and the explorers hold a default when dead."""

import re

import pytest
import torch

from companion.explorers import bits_explorer, bits_figure, rounding_explorer, rounding_figure
from companion.explorers.bits import lost, setting_name
from companion.quantization import symmetric
from companion.quantization.grids import fit
from companion.studies import load

ROW = torch.randn(192, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def record():
    return load("bits")


def test_the_picture_shows_numbers_levels_and_errors_within_the_band():
    figure = rounding_figure(ROW, 3, group=64)
    above, below = figure.axes
    assert above.lines[0].get_ydata() == pytest.approx(ROW.numpy())
    assert [len(levels.get_segments()) for levels in above.collections] == [7] * 3
    whole = rounding_figure(ROW, 3, mapping="affine").axes[0].collections
    assert [len(levels.get_segments()) for levels in whole] == [8]
    grid = fit(ROW.view(3, 64), 3, mapping=symmetric)
    error = below.lines[0].get_ydata()
    assert error == pytest.approx((grid.rounded(ROW.view(3, 64)).flatten() - ROW).numpy())
    assert (abs(error).reshape(3, 64) <= grid.scale.numpy() / 2 * 1.0001).all()
    assert "3 bits, symmetric, groups of 64" in figure.alt and "levels" in figure.alt


def test_levels_are_drawn_only_where_they_can_be_told_apart():
    assert len(rounding_figure(ROW, 5).axes[0].collections) == 1
    assert len(rounding_figure(ROW, 8).axes[0].collections) == 0


@pytest.mark.parametrize(("change", "message"), [
    ({"bits": 9}, "bits is 9"), ({"group": 50}, "group 50 does not divide"),
    ({"mapping": "log"}, "mapping is 'log'"), ({"limits": "none"}, "limits is 'none'"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        rounding_figure(ROW, **change)
    with pytest.raises(ValueError, match="a line of numbers"):
        rounding_figure(ROW.view(2, -1))


def test_the_rounding_explorer_follows_its_controls():
    explorer = rounding_explorer(ROW)
    before = explorer.result.value
    assert "4 bits, symmetric, a grid a row" in before
    for name, value in (("bits", 3), ("group", 32), ("mapping", "affine")):
        explorer.controls[name].value = value
    assert (
        explorer.result.value == rounding_figure(ROW, 3, group=32, mapping="affine")._repr_html_()
    )


def test_the_bits_explorer_says_what_the_study_found(record):
    explorer = bits_explorer(record)
    text = explorer.result.value
    setting = setting_name("SmolLM2", "gptq", 4, 64)
    assert str(lost(record, setting)) in text and record.label in text
    megabytes = record.values(setting, "bytes")[0] / 1e6
    assert float(re.search(r": ([\d.]+) MB", text).group(1)) == pytest.approx(megabytes, abs=0.1)
    explorer.controls["model"].value = "tiny"
    assert "tiny, gptq, 4 bits, 64" in explorer.result.value
    explorer.controls["group"].value = 192
    assert "Not possible: group is 192" in explorer.result.value


def test_the_figure_of_the_study_has_a_line_for_each_method_and_group(record):
    axes = bits_figure(record, "tiny").axes[0]
    assert [len(line.get_xdata()) for line in axes.lines] == [5] * 6
    assert len(axes.collections) == 6  # the bands
    heights = [y for line in axes.lines for y in line.get_ydata()]
    assert min(heights) >= 1e-3


def test_a_loss_is_the_mean_over_all_windows_of_all_seeds(record):
    setting = setting_name("tiny", "nearest", 3, 64)
    windows = [x for seed in record.values(setting, "windows") for x in seed]
    found = lost(record, setting)
    assert found.estimate == pytest.approx(sum(windows) / len(windows))

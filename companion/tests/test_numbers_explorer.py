"""The picture shows the bits of a number in each format, and the explorer holds a default."""

import math
import struct
from itertools import pairwise

import pytest
import torch
from ipywidgets import embed
from matplotlib.colors import to_rgb

from companion.explorers.numbers import FILLS, number_explorer, number_figure, stored
from companion.precision.formats import FORMATS


def bits_of(number, kind):
    """The pattern of IEEE 754 as Python's own struct packs it: "f" FP32, "e" FP16."""
    return "".join(f"{byte:08b}" for byte in struct.pack(f">{kind}", number))


@pytest.mark.parametrize("number", [0.01, -3.0, 65504.0, 1e-7, 0.0, -0.0, 1 / 3])
def test_the_fields_are_the_bits_that_python_packs(number):
    for name, kind in (("FP32", "f"), ("FP16", "e")):
        row = stored(number, name)
        assert "".join(row.fields) == bits_of(number, kind)
        assert row.value == struct.unpack(kind, struct.pack(kind, number))[0]
    short = "".join(stored(number, "BF16").fields)
    cast = torch.tensor(number).bfloat16().view(torch.int16).item() & 0xFFFF
    assert short == f"{cast:016b}"


def test_value_error_and_spacing_of_a_known_number():
    row = stored(0.01, "BF16")
    assert row.value == 0.010009765625 and row.spacing == 2**-14
    assert row.error == pytest.approx(9.765625e-6) and row.kind == "normal"
    assert row.fields == ("0", "01111000", "0100100")
    assert str(row) == "BF16: 0.010009766, error +9.8e-06 (0.0977 %), spacing 6.1e-05"
    assert str(stored(0.5, "E2M1")) == "E2M1: 0.5, denormal, error +0, spacing 0.5"


def test_the_kinds_of_numbers():
    assert stored(1e5, "FP16").kind == "infinite" and math.isnan(stored(1e5, "FP16").spacing)
    assert str(stored(-1e5, "FP16")) == "FP16: infinite, the largest is 65,504"
    assert stored(1e5, "E4M3").value == 448 and stored(1e5, "E4M3").kind == "normal"
    assert stored(1e-6, "FP16").kind == "denormal" and stored(1e-9, "FP16").kind == "zero"
    assert str(stored(1e-9, "FP16")) == "FP16: 0, error -1e-09 (100 %), spacing 6e-08"


def test_flushing_takes_the_denormals_of_fp32_and_no_others():
    plain = stored(1e-40, "FP32")
    assert plain.kind == "denormal" and plain.value == pytest.approx(1e-40, rel=1e-5)
    half = [str(stored(1e-6, name)) for name in FORMATS]
    torch.set_flush_denormal(True)
    try:
        assert stored(1e-40, "FP32").kind == "zero"
        assert [str(stored(1e-6, name)) for name in FORMATS] == half
    finally:
        torch.set_flush_denormal(False)


def test_the_figure_has_a_box_for_every_field_as_wide_as_its_bits():
    figure = number_figure(-0.3)
    (axes,) = figure.axes
    shown = [text.get_text() for text in axes.texts]
    rows = [stored(-0.3, name) for name in FORMATS]
    words = [str(row) for row in rows]
    assert shown[::4] == words
    fields = [bits for row in rows for bits in row.fields]
    assert [text.replace(" ", "") for text in shown if text not in words] == fields
    assert [box.get_width() for box in axes.patches] == [len(bits) for bits in fields]
    for left, right in pairwise(axes.patches):  # in a row, no box covers another
        assert left.get_y() < right.get_y() or left.get_x() + left.get_width() < right.get_x()
    assert figure._repr_png_().startswith(b"\x89PNG")
    for row in words:
        assert row in figure.alt
    assert figure.alt.endswith("bits 1 00 1")  # E2M1 has -0.5


def test_fields_are_told_apart_in_grey():
    grey = [sum(to_rgb(fill)) / 3 for fill in FILLS.values()]
    assert min(b - a for a, b in pairwise(grey)) > 0.3


def test_words_stay_inside_the_figure():
    for number in (-1.2345678e-5, 1.7e38, -3.3333333e-39):
        figure = number_figure(number)
        figure.draw_without_rendering()
        width = figure.bbox.width
        (axes,) = figure.axes
        assert max(text.get_window_extent().x1 for text in axes.texts) < width
        boxes = [box.get_window_extent() for box in axes.patches]
        digits = [t.get_window_extent() for t in axes.texts if set(t.get_text()) <= set("01 ")]
        assert all(b.x0 < d.x0 and d.x1 < b.x1 for b, d in zip(boxes, digits, strict=True))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e39])
def test_what_fp32_cannot_hold_is_refused(number):
    with pytest.raises(ValueError, match=r"the number is .*; at most 3\.403e"):
        number_figure(number)
    with pytest.raises(ValueError, match="format is 'FP64'"):
        stored(1.0, "FP64")


def test_the_default_is_on_show_even_without_a_kernel():
    explorer = number_explorer()
    expected = number_figure(0.01)._repr_html_()
    assert explorer.result.value == expected
    state = embed.embed_data(views=[explorer])["manager_state"]["state"]
    assert expected in [model["state"].get("value") for model in state.values()]


def test_the_explorer_follows_its_controls():
    explorer = number_explorer()
    explorer.controls["number"].value = 3.0
    explorer.controls["power"].value = -20
    assert explorer.result.value == number_figure(3 * 2.0**-20)._repr_html_()
    assert str(stored(3 * 2.0**-20, "FP16")) in explorer.result.value
    explorer.controls["number"].value = 1e38
    explorer.controls["power"].value = 10
    assert "Not possible: the number is" in explorer.result.value

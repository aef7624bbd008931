"""The picture of a step's memory has the numbers of the closed forms, and a default when dead."""

from html import unescape

import pytest
from ipywidgets import embed

from companion import cost, step_memory
from companion.explorers.step_memory import (
    PARTS,
    shape_of_width,
    step_memory_explorer,
    step_memory_figure,
    ways,
)

SIZES = {"batch": 16, "microbatches": 4, "every": 2}


def test_the_shape_follows_the_width():
    config = shape_of_width(768, layers=3)
    assert (config.heads, config.kv_heads, config.hidden, config.layers) == (12, 3, 2048, 3)
    assert shape_of_width(192).kv_heads == 3  # three heads do not share
    assert shape_of_width(8192).head_width == 64


def test_the_ways_are_those_of_the_closed_forms():
    config = shape_of_width(256)
    plain, cut, again, both = ways(config, 512, **SIZES).values()
    assert plain.kept == cost.activation_bytes(config, 512, batch=16)
    assert cut.kept == pytest.approx(plain.kept / 4, rel=0.01)
    assert both == step_memory.predicted(config, 512, **SIZES)
    assert again.kept < plain.kept and len({way.weights for way in (plain, cut, again, both)}) == 1
    assert list(ways(config, 512, **SIZES | {"every": None})) == ["as it is", "4 microbatches"]
    assert list(ways(config, 512, **SIZES | {"microbatches": 1}))[1:] == [
        "blocks again, 2 at a time"
    ]


def test_the_figure_draws_every_part_of_every_way():
    config = shape_of_width(256)
    figure = step_memory_figure(config, 512, **SIZES)
    found = ways(config, 512, **SIZES)
    drawn = [bar.get_width() for bar in figure.axes[0].patches]
    expected = [getattr(memory, part) / 1e9 for part in PARTS for memory in found.values()]
    assert drawn == pytest.approx(expected)
    last = figure.axes[0].patches[-1]
    assert last.get_x() + last.get_width() == pytest.approx(found["both"].total / 1e9)
    flops = [step_memory.flops(config, 512, batch=16, every=every) for every in (None, 2)]
    assert f"for {flops[1] / flops[0]:.2f} x the FLOPs" in figure.alt
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_one_way_alone_has_no_price():
    figure = step_memory_figure(shape_of_width(256), 64, batch=2, microbatches=1, every=None)
    assert "FLOPs" not in figure.alt and len(figure.axes[0].patches) == 4


@pytest.fixture(scope="module")
def explorer():
    return step_memory_explorer()


def test_the_default_is_on_show_even_without_a_kernel(explorer):
    expected = step_memory_figure(shape_of_width(768), 1024)._repr_html_()
    assert explorer.result.value == expected
    state = embed.embed_data(views=[explorer])["manager_state"]["state"]
    assert expected in [model["state"].get("value") for model in state.values()]


def test_the_explorer_follows_its_controls():
    explorer = step_memory_explorer(width=128)
    explorer.controls["layers"].value = 6
    explorer.controls["recomputed"].value = "in segments of 3"
    config = shape_of_width(128, layers=6)
    expected = step_memory_figure(config, 1024, every=3)
    assert explorer.result.value == expected._repr_html_()
    explorer.controls["microbatches"].value = 128
    text = unescape(explorer.result.value)
    assert "Not possible: 32 rows do not divide into 128 equal microbatches" in text
    explorer.controls["microbatches"].value = 1
    explorer.controls["recomputed"].value = "in segments of 12"
    assert "every is 12; the model has 6 blocks" in unescape(explorer.result.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shape_of_width(100), "width is 100"),
        (lambda: step_memory_explorer(width=100), "width is 100; known are: 128, 192"),
        (lambda: step_memory_figure(shape_of_width(128), 5000), "5000 positions exceed"),
        (lambda: step_memory_figure(shape_of_width(128), 64, batch=3), "3 rows do not divide"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

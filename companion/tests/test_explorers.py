"""The explorer shows what the formulas say, says what cannot be, and holds a default when dead."""

import re
from dataclasses import replace
from html import unescape

import pytest
from ipywidgets import embed

from companion import cost
from companion.catalogue import BYTES, DEVICES, MODELS
from companion.explorers import shapes as explorers
from companion.explorers.shapes import OWN, POWERS, SLIDERS, shape_explorer
from companion.hardware import Peaks
from companion.pretraining import Recipe
from companion.roofline import Device
from companion.shapes import in_bytes, in_seconds, shape_figure, shape_table

LAPTOP = Device(name="laptop", flops={"float32": 1e11}, bandwidth=1e10, memory=8e9)
SMOLLM2 = MODELS["SmolLM2-135M"]


@pytest.fixture
def explorer():
    return shape_explorer(LAPTOP)


def shown(explorer):
    """The table's rows as {name: (value, remark)}, from the HTML on show."""
    rows = re.findall(
        r"<tr><th[^>]*>(.*?)</th><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td>", text(explorer)
    )
    return {name: (value, remark) for name, value, remark in rows}


def text(explorer):
    return unescape(explorer.result.value)


def test_a_table_adds_up():
    costs = shape_table(SMOLLM2, LAPTOP, positions=100, batch=4)
    assert costs.inference == costs.weights + costs.cache
    held = costs.weights + costs.gradients + costs.optimizer + costs.activations
    assert costs.train == held
    assert costs.cache == cost.cache_bytes(SMOLLM2, 100, batch=4)
    assert costs.decode.flops == cost.decode_flops(SMOLLM2, 99, batch=4)
    assert costs.training.flops == 3 * costs.prefill.flops
    assert costs.decode.waits_for == "memory" and costs.prefill.waits_for == "arithmetic"
    assert costs.decode.seconds == pytest.approx(costs.decode.moved / LAPTOP.bandwidth)
    assert costs.prefill.seconds == pytest.approx(costs.prefill.flops / LAPTOP.flops["float32"])
    assert costs.as_dict()["weights"] == cost.weight_bytes(SMOLLM2)
    for rendered in (str(costs), costs._repr_html_()):
        assert "134,515,008" in rendered and "fits into 8 GB" in rendered


def test_sixteen_bits_halve_the_memory():
    device = replace(LAPTOP, flops={"float32": 1e11, "bfloat16": 4e11})
    full, half = (shape_table(SMOLLM2, device, dtype=d) for d in ("float32", "bfloat16"))
    for part in ("weights", "cache", "gradients", "optimizer"):
        assert 2 * getattr(half, part) == getattr(full, part)
    assert half.activations == cost.activation_bytes(SMOLLM2, 512, bytes_per_number=2)
    assert 2 * half.decode.seconds == pytest.approx(full.decode.seconds)


@pytest.mark.parametrize(
    "number, said", [(0, "0 B"), (999, "999 B"), (538_060_032, "538 MB"), (16.06e9, "16.1 GB")]
)
def test_bytes_are_said_in_their_unit(number, said):
    assert in_bytes(number) == said


@pytest.mark.parametrize(
    "number, said", [(6.35e-5, "63.5 us"), (0.0519, "51.9 ms"), (34.04, "34 s"), (7200, "2 h")]
)
def test_seconds_are_said_in_their_unit(number, said):
    assert in_seconds(number) == said


def test_the_default_is_on_show_even_without_a_kernel(explorer):
    expected = shape_table(SMOLLM2, LAPTOP)._repr_html_()
    assert explorer.result.value == expected
    state = embed.embed_data(views=[explorer])["manager_state"]["state"]
    kept = [model["state"].get("value") for model in state.values()]
    assert expected in kept


def test_a_slider_changes_the_text_and_the_preset_says_so(explorer):
    before = shown(explorer)
    explorer.controls["layers"].value = 15
    smaller = replace(SMOLLM2, layers=15)
    assert shown(explorer)["parameters"][0] == f"{cost.parameters(smaller):,}"
    assert shown(explorer) != before
    assert explorer.controls["model"].value == OWN
    explorer.controls["layers"].value = 30
    assert explorer.controls["model"].value == "SmolLM2-135M"
    assert shown(explorer) == before


@pytest.mark.parametrize("name", MODELS)
def test_presets_fill_the_sliders_exactly(explorer, name):
    explorer.controls["model"].value = name
    names = [*SLIDERS, "tied"]
    assert [explorer.controls[n].value for n in names] == [getattr(MODELS[name], n) for n in names]
    assert shown(explorer)["parameters"][0] == f"{cost.parameters(MODELS[name]):,}"
    for slider, (_, step) in SLIDERS.items():
        assert getattr(MODELS[name], slider) % step == 0  # a browser would move it otherwise


def test_every_control_counts(explorer):
    seen = {text(explorer)}
    moves = {"device": "NVIDIA H100 80 GB", "dtype": "bfloat16", "optimizer": "sgd"}
    moves |= {"positions": 64, "batch": 8, "tied": False, "vocab": 1024, "width": 1152}
    moves |= {"hidden": 64, "kv_heads": 9, "heads": 18, "model": "tiny"}
    for name, value in moves.items():
        explorer.controls[name].value = value
        assert "Not possible" not in text(explorer)
        assert text(explorer) not in seen
        seen.add(text(explorer))


@pytest.mark.parametrize(
    "control, value, why",
    [
        ("heads", 7, "width 576 / heads 7"),
        ("kv_heads", 2, "9 query heads"),
        ("positions", 16384, "exceed the context of 8192"),
        ("positions", 1, "at least 2"),
        ("dtype", "bfloat16", "known are: float32"),
    ],
)
def test_what_cannot_be_is_said_and_undone(explorer, control, value, why):
    good = explorer.controls[control].value
    explorer.controls[control].value = value
    assert text(explorer).startswith('<p role="alert">Not possible') and why in text(explorer)
    explorer.controls[control].value = good
    assert explorer.result.value == shape_table(SMOLLM2, LAPTOP)._repr_html_()


def test_no_device_or_shape_on_offer_makes_an_error_by_itself():
    for device in DEVICES.values():
        for dtype in set(BYTES) & set(device.flops):
            for config in MODELS.values():
                assert shape_table(config, device, dtype=dtype).decode.waits_for == "memory"
    assert MODELS["tiny"] == Recipe().config
    assert 512 in POWERS


def test_the_static_figure_shows_the_same_numbers():
    costs = shape_table(SMOLLM2, replace(LAPTOP, memory=3e9), positions=256)
    figure = shape_figure(costs)
    memory, times = figure.axes
    ends = {round(bar.get_x() + bar.get_width(), 6) for bar in memory.patches}
    assert {round(costs.inference / 1e9, 6), round(costs.train / 1e9, 6)} <= ends
    assert [line.get_xdata()[0] for line in memory.lines] == [3.0]  # the device's memory, in GB
    points = [line.get_xdata()[0] / 1e3 for line in times.lines]
    expected = [costs.prefill.seconds, costs.decode.seconds, costs.training.seconds]
    assert points == pytest.approx(expected)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "134,515,008" in figure.alt and in_bytes(costs.train) in figure.alt
    large = shape_figure(shape_table(SMOLLM2, LAPTOP, positions=256))
    assert not large.axes[0].lines  # far beyond the bars, it would flatten them


def test_this_machine_is_offered_as_measured(monkeypatch):
    peaks = Peaks("cpu", 1, {"float32": 2e11, "float64": 1e11}, 3e10)
    monkeypatch.setattr(explorers, "peaks", lambda: peaks)
    explorer = shape_explorer()
    machine = explorer.devices["this machine"]
    assert explorer.controls["device"].value == "this machine"
    assert machine.flops == {"float32": 2e11} and machine.bandwidth == 3e10
    assert machine.memory > 1e8


@pytest.mark.parametrize("wrong", [{"model": "gpt-9"}, {"dtype": "int3"}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ValueError, match="known are"):
        shape_explorer(LAPTOP, **wrong)

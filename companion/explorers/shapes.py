"""Any shape of model on any device: parameters, memory and roofline times."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets as widgets
import torch

from companion.catalogue import BYTES, DEVICES, MODELS
from companion.checks import require_known
from companion.cost import OPTIMIZERS
from companion.explorers.choices import LOOK, choice, shown
from companion.hardware import best_device, peaks, physical_memory
from companion.model import ModelConfig
from companion.roofline import Device
from companion.shapes import ShapeCosts, shape_table

OWN = "your own"
SLIDERS = {  # highest value and step; every preset lies on a step
    "layers": (128, 1),
    "width": (16_384, 64),
    "heads": (128, 1),
    "kv_heads": (128, 1),
    "hidden": (65_536, 64),
    "vocab": (262_144, 64),
    "context": (131_072, 64),
}
POWERS = [2**i for i in range(18)]


class ShapeExplorer(widgets.VBox):
    """`shape_table` behind `controls` (by name); its table is in `result`, an HTML widget."""

    def __init__(self, devices: Mapping[str, Device], *, model: str, dtype: str) -> None:
        require_known("model", model, MODELS)
        self.devices, self._filling = devices, False
        self.controls = _controls(devices, model, dtype)
        self.result = widgets.HTML()
        for name, control in self.controls.items():
            control.observe(self._chosen if name == "model" else self._changed, names="value")
        self._fill(MODELS[model])
        self._show()
        wrap = widgets.Layout(flex_flow="row wrap")
        super().__init__([widgets.Box([*self.controls.values()], layout=wrap), self.result])

    def config(self) -> ModelConfig:
        """The shape that the controls describe. Raises ValueError if there is none."""
        values = {name: self.controls[name].value for name in SLIDERS}
        return ModelConfig(**values, tied=self.controls["tied"].value)

    def costs(self) -> ShapeCosts:
        """What it costs. Raises ValueError for a combination that cannot be."""
        names = ("positions", "batch", "dtype", "optimizer")
        settings = {name: self.controls[name].value for name in names}
        return shape_table(self.config(), self.devices[self.controls["device"].value], **settings)

    def _show(self) -> None:
        self.result.value = shown(lambda: self.costs()._repr_html_())

    def _chosen(self, change: dict) -> None:
        """A preset was chosen: move the sliders to it."""
        if not self._filling and change["new"] != OWN:
            self._fill(MODELS[change["new"]])
            self._show()

    def _changed(self, _: dict) -> None:
        """A slider was moved: name the preset it is, if it is one."""
        if self._filling:
            return
        values = self._shape()
        same = [name for name, config in MODELS.items() if _shape_of(config) == values]
        self._filling = True
        self.controls["model"].value = same[0] if same else OWN
        self._filling = False
        self._show()

    def _fill(self, config: ModelConfig) -> None:
        self._filling = True
        for name, value in _shape_of(config).items():
            self.controls[name].value = value
        self._filling = False

    def _shape(self) -> dict:
        return {name: self.controls[name].value for name in (*SLIDERS, "tied")}


def shape_explorer(
    machine: Device | None = None, *, model: str = "SmolLM2-135M", dtype: str = "float32"
) -> ShapeExplorer:
    """Parameters, memory and roofline times of any shape on any device.

    `machine` is the first device offered; by default this one, measured, which takes some seconds.
    Raises ValueError for an unknown model or number format.
    """
    machine = this_machine() if machine is None else machine
    return ShapeExplorer({machine.name: machine, **DEVICES}, model=model, dtype=dtype)


def this_machine() -> Device:
    """This machine as a `Device`: its measured peaks, and the memory of what it computes on."""
    measured = peaks()
    on_cuda = best_device().type == "cuda"
    memory = torch.cuda.get_device_properties(0).total_memory if on_cuda else physical_memory()
    flops = {dtype: measured.flops[dtype] for dtype in BYTES if dtype in measured.flops}
    return Device(
        name="this machine", flops=flops, bandwidth=measured.bandwidth, memory=float(memory)
    )


def _shape_of(config: ModelConfig) -> dict:
    return {name: getattr(config, name) for name in (*SLIDERS, "tied")}


def _controls(devices: Mapping[str, Device], model: str, dtype: str) -> dict[str, widgets.Widget]:
    require_known("number format", dtype, BYTES)

    def power(name: str, value: int) -> widgets.SelectionSlider:
        return widgets.SelectionSlider(description=name, options=POWERS, value=value, **LOOK)

    def slider(name: str, high: int, step: int) -> widgets.IntSlider:
        late = {"continuous_update": False}
        return widgets.IntSlider(description=name, min=step, max=high, step=step, **late, **LOOK)

    return {
        "model": choice("model", [*MODELS, OWN], model),
        "device": choice("device", [*devices], next(iter(devices))),
        "dtype": choice("numbers", [*BYTES], dtype),
        "optimizer": choice("optimizer", [*OPTIMIZERS], "adamw"),
        "positions": power("positions", 512),
        "batch": power("batch", 1),
        **{name: slider(name, *limits) for name, limits in SLIDERS.items()},
        "tied": widgets.Checkbox(description="tied head", value=True, indent=True, **LOOK),
    }

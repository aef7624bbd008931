"""Memory of a training step: what microbatches and recomputation take away, and what stays.

Weights, gradients and states depend on the width and the layers alone; what autograd keeps grows
with the batch. All in FP32, by the closed forms of `companion.step_memory`.
"""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets as widgets

from companion import step_memory
from companion import style as look
from companion.checks import next_multiple, require, require_known
from companion.explorers.choices import LOOK, Explorer
from companion.model import ModelConfig
from companion.step_memory import StepMemory
from companion.style import Card

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "states": "AdamW's states",
    "kept": "saved activations",
}
EVERY = {"nothing": None, **{f"in segments of {k}": k for k in (1, 2, 3, 4, 6, 12)}}
VOCAB, CONTEXT, HEAD = 32_000, 4096, 64


def shape_of_width(width: int, *, layers: int = 12) -> ModelConfig:
    """A model with heads 64 wide and an MLP 8/3 as wide as the model.

    Four heads share a key-value head where they divide. Raises ValueError for a width that is no
    multiple of 64.
    """
    heads = max(1, width // HEAD)
    require(width == heads * HEAD, f"width is {width}; a multiple of {HEAD} is needed")
    shape = {"heads": heads, "kv_heads": heads // 4 if heads % 4 == 0 else heads}
    hidden = next_multiple(8 * width // 3, 64)
    return ModelConfig(
        vocab=VOCAB, context=CONTEXT, layers=layers, width=width, hidden=hidden, **shape
    )


def ways(
    config: ModelConfig, positions: int, *, batch: int, microbatches: int, every: int | None
) -> dict[str, StepMemory]:
    """The step as it is, with microbatches, with recomputation, and with both.

    Raises ValueError as `companion.step_memory.predicted` does.
    """
    cut, again = f"{microbatches} microbatches", f"blocks again, {every} at a time"
    wanted = {"as it is": (1, None)}
    if microbatches > 1:
        wanted[cut] = (microbatches, None)
    if every is not None:
        wanted[again] = (1, every)
        if microbatches > 1:
            wanted["both"] = (microbatches, every)
    return {
        name: step_memory.predicted(config, positions, batch=batch, microbatches=m, every=k)
        for name, (m, k) in wanted.items()
    }


def step_memory_figure(
    config: ModelConfig,
    positions: int,
    *,
    batch: int = 32,
    microbatches: int = 8,
    every: int | None = 1,
) -> Card:
    """Bytes of a step by part, for each of `ways`; the title has the gain and its price in FLOPs.

    Raises ValueError for a batch that does not divide and for impossible shapes.
    """
    found = ways(config, positions, batch=batch, microbatches=microbatches, every=every)
    told = "; ".join(f"{name}: {_told(memory)}" for name, memory in found.items())
    with look.style():
        figure = look.card(
            _title(config, positions, batch, every, found),
            alt=f"Gigabytes of a step. {told}",
            height=2.2 + 0.6 * len(found),
        )
        axes = figure.subplots()
        ends = [0.0] * len(found)
        for number, (part, name) in enumerate(PARTS.items()):
            lengths = [getattr(memory, part) / 1e9 for memory in found.values()]
            paint = {"color": look.COLOURS[number], "hatch": look.HATCHES[number]}
            axes.barh(range(len(found)), lengths, left=ends, label=name, edgecolor="white", **paint)
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        axes.set_yticks(range(len(found)), list(found))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        look.label_axes(axes, "memory of a step (GB)", None)
        figure.legend(loc="outside lower left", ncols=2)
    return figure


def step_memory_explorer(*, width: int = 768) -> Explorer:
    """`step_memory_figure` behind sliders. Raises ValueError for a width that is not offered."""
    widths = sorted(base * 2**i for base in (128, 192) for i in range(6))
    require_known("width", width, widths)

    def power(name: str, most: int, value: int) -> widgets.SelectionSlider:
        options = [2**i for i in range(most + 1)]
        return widgets.SelectionSlider(description=name, options=options, value=value, **LOOK)

    def show(*, width, layers, positions, batch, microbatches, recomputed) -> str:
        sizes = {"batch": batch, "microbatches": microbatches, "every": EVERY[recomputed]}
        config = shape_of_width(width, layers=layers)
        return step_memory_figure(config, positions, **sizes)._repr_html_()

    controls = {
        "width": widgets.SelectionSlider(description="width", options=widths, value=width, **LOOK),
        "layers": widgets.IntSlider(description="layers", min=1, max=96, value=12, **LOOK),
        "positions": power("positions", 12, 1024),
        "batch": power("batch", 10, 32),
        "microbatches": power("microbatches", 10, 8),
        "recomputed": widgets.Dropdown(
            description="recomputed", options=[*EVERY], value="in segments of 1", **LOOK
        ),
    }
    return Explorer(controls, show)


def _title(
    config: ModelConfig,
    positions: int,
    batch: int,
    every: int | None,
    found: Mapping[str, StepMemory],
) -> str:
    first, last = (found[name].total / 1e9 for name in (next(iter(found)), list(found)[-1]))
    plain, ours = (
        step_memory.flops(config, positions, batch=batch, every=each) for each in (None, every)
    )
    if len(found) == 1:
        return f"{look.short(first)} GB"
    sizes = f"{look.short(first)} GB to {look.short(last)} GB"
    return f"{sizes} for {ours / plain:.2f} x the FLOPs"


def _told(memory: StepMemory) -> str:
    parts = ", ".join(
        f"{name} {look.short(getattr(memory, part) / 1e9)}" for part, name in PARTS.items()
    )
    return f"{look.short(memory.total / 1e9)} GB ({parts})"

"""The schedule picture: by what factor the rate is multiplied, step by step.

The shaded area is what the schedule lets through: its share of the whole is the mean factor, so a
schedule of 0.5 moves the weights about half as far as a constant rate would.
"""

from __future__ import annotations

import ipywidgets as widgets
import numpy as np

from companion import style as look
from companion.explorers.choices import LOOK, Explorer, choice
from companion.schedules import SCHEDULES, make_schedule
from companion.style import Card, short

STEPS = 400


def schedule_figure(
    name: str = "cosine",
    *,
    steps: int = STEPS,
    warmup: int = 40,
    floor: float = 0.1,
    rate: float = 1e-3,
    **options: float,
) -> Card:
    """The rate at each of `steps` steps, `rate` at its highest, with the area below it.

    Raises ValueError for what `make_schedule` refuses.
    """
    schedule = make_schedule(name, steps, warmup=warmup, floor=floor, **options)
    rates = [rate * schedule(step) for step in range(steps)]
    share = np.mean(rates) / rate
    title = f"{name}, warm-up {warmup}: mean factor {share:.2f}"
    ends = f"first {short(rates[0])}, highest {short(max(rates))}, last {short(rates[-1])}"
    with look.style():
        figure = look.card(title, alt=f"Learning rate over {steps} steps: {ends}", height=3.6)
        axes = figure.subplots()
        axes.plot(rates, color=look.COLOURS[0])
        axes.fill_between(range(steps), rates, color=look.PALE)
        axes.set_ylim(0, rate * 1.05)
        look.label_axes(axes, "step (count)", "rate (a step)")
    return figure


def schedule_explorer() -> Explorer:
    """`schedule_figure` behind a choice and sliders."""
    floors = {"min": 0.0, "max": 1.0, "step": 0.05, "value": 0.1, "readout_format": ".2f"}
    warmups = {"min": 0, "max": STEPS, "step": 10, "value": 40}
    controls = {
        "name": choice("schedule", [*SCHEDULES], "cosine"),
        "warmup": widgets.IntSlider(description="warm-up", **warmups, **LOOK),
        "floor": widgets.FloatSlider(description="floor", **floors, **LOOK),
    }
    return Explorer(controls, lambda **chosen: schedule_figure(**chosen)._repr_html_())

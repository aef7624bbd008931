"""Bits, bytes and quality: the points of the study `bits`, with their spread over windows."""

from __future__ import annotations

import html
import math
from functools import partial

from companion import plots
from companion.checks import require_known
from companion.explorers.choices import Explorer, choice, group_name
from companion.intervals import Interval
from companion.studies import Recorded
from companion.studies.bits import BITS, GROUPS, METHODS, MODELS
from companion.style import Card

FLOOR = 1e-3  # nats per token: smaller losses, and gains, are drawn here


def lost(record: Recorded, setting: str) -> Interval:
    """Nats per token more than the plain model: the mean over the windows of all seeds."""
    return record.pooled(setting, "windows")


def setting_name(model: str, method: str, bits: int, group: int | str) -> str:
    """A point of the study by what was chosen. Raises ValueError where there is none."""
    require_known("model", model, MODELS)
    require_known("group", group, GROUPS[model])
    return f"{model}, {method}, {bits} bits, {group}"


def bits_figure(
    record: Recorded, model: str, *, groups: tuple[int | str, ...] = ("row", 64)
) -> Card:
    """Nats lost against stored megabytes, a line for each method and group, a point for each width.

    Bands are 95 % intervals over windows. Losses under 0.001 are drawn at 0.001.
    """
    series = {
        f"{method}, {group_name(group)}": _line(record, model, method, group)
        for group in groups
        for method in METHODS
    }
    return plots.lines(
        series,
        x_label="stored model (MB)",
        y_label="loss (nats per token)",
        log_y=True,
        title=f"{model}: {', '.join(map(str, BITS))} bits, from right to left",
    )


def bits_explorer(record: Recorded) -> Explorer:
    """One point of the study in words, above its figure."""
    controls = {
        "model": choice("model", [*MODELS], "SmolLM2"),
        "method": choice("method", [*METHODS], "gptq"),
        "bits": choice("bits", [*BITS], 4),
        "group": choice("group", [*GROUPS["SmolLM2"]], 64),
    }
    return Explorer(controls, partial(_told, record))


def _told(record: Recorded, *, model: str, method: str, bits: int, group: int | str) -> str:
    setting = setting_name(model, method, bits, group)
    more, stored = lost(record, setting), record.values(setting, "bytes")[0] / 1e6
    factor = more.map(math.exp)
    words = f"<b>{setting}</b>: {stored:.1f} MB, {more} nats per token more, perplexity x {factor}"
    figure = bits_figure(record, model, groups=(group,))
    return f"<p>{words}</p>{figure._repr_html_()}<p><small>{html.escape(record.label)}</small></p>"


def _line(record: Recorded, model: str, method: str, group: int | str) -> list[list[float]]:
    """(x, y, low, high) over all widths."""
    names = [setting_name(model, method, bits, group) for bits in BITS]
    megabytes = [record.values(name, "bytes")[0] / 1e6 for name in names]
    found = [lost(record, name) for name in names]
    ends = [[max(FLOOR, getattr(i, end)) for i in found] for end in ("estimate", "low", "high")]
    return [megabytes, *ends]

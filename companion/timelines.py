"""What simulated ranks do when, drawn: a Gantt chart of their lanes, and the memory they hold.

Both take a `companion.parallel.simulator.Timeline`. Bars are told apart by the first word of their
label ("backward 3" is a bar "backward" with a 3 in it): a colour and a hatch for each, so that a
grey print reads too. Figures carry alt text and show as those of `companion.plots` do.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from companion import style as look
from companion.checks import require
from companion.parallel.simulator import Span, Timeline
from companion.style import Card, require_some, short

LANES = ("compute", "link")
MOST = 16  # ranks whose lanes can still be told apart
ROOM = 40  # letters that fit across the axes
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def gantt(
    timeline: Timeline,
    *,
    ranks: Sequence[int] | None = None,
    title: str = "",
    alt: str = "",
) -> Card:
    """A row for each lane in use of each of `ranks` (all, if they are not said), over time.

    Raises ValueError for a rank that there is not, more than 16 ranks or 6 kinds of bars, and
    where nothing took any time.
    """
    chosen = _chosen(timeline, ranks, MOST)
    spans = [s for s in timeline.spans if s.rank in chosen and s.end > s.start]
    require_some("spans", spans)
    kinds = list(dict.fromkeys(_kind(span) for span in spans))
    require_some("kinds of bars", kinds, most=len(look.COLOURS))
    used = {(s.rank, s.lane) for s in spans}
    rows = [(rank, lane) for rank in chosen for lane in LANES if (rank, lane) in used]
    scale, unit = _unit(timeline.seconds, UNITS)
    with look.style():
        figure = look.card(title, alt=alt or _told(timeline, chosen), height=1.6 + 0.34 * len(rows))
        axes = figure.subplots()
        for span in spans:
            row, paint = rows.index((span.rank, span.lane)), _paint(kinds.index(_kind(span)))
            _draw_bar(axes, span, row, paint, scale, timeline.seconds)
        axes.set_yticks(range(len(rows)), [f"rank {rank}, {lane}" for rank, lane in rows])
        axes.set_xlim(0, timeline.seconds / scale)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        look.label_axes(axes, f"time ({unit})", None)
        patches = [Patch(**_paint(i), label=kind) for i, kind in enumerate(kinds)]
        figure.legend(handles=patches, loc="outside lower left", ncols=3)
    return figure


def memory(
    timeline: Timeline,
    *,
    ranks: Sequence[int] | None = None,
    title: str = "",
    alt: str = "",
) -> Card:
    """The bytes that each of `ranks` (all, if they are not said) held, over time.

    Raises ValueError for a rank that there is not, more than 6 ranks, and where nothing was held.
    """
    chosen = _chosen(timeline, ranks, len(look.COLOURS))
    peak = max(timeline.peak[rank] for rank in chosen)
    require(peak > 0, "no rank held any memory; programs take it with Hold")
    (scale, unit), (size, name) = _unit(timeline.seconds, UNITS), _unit(peak, BYTES)
    tops = {rank: f"{short(timeline.peak[rank] / size)} {name}" for rank in chosen}
    text = "; ".join(f"rank {rank}: at most {top}" for rank, top in tops.items())
    with look.style():
        figure = look.card(title, alt=alt or f"Memory over time. {text}", height=4.4)
        axes = figure.subplots()
        for i, rank in enumerate(chosen):
            times, held = timeline.memory[rank]
            x = [time / scale for time in (*times, timeline.seconds)]
            y = [number / size for number in (*held, held[-1])]
            style = {"color": look.COLOURS[i], "linestyle": look.LINES[i]}
            axes.step(x, y, where="post", label=f"rank {rank}, at most {tops[rank]}", **style)
        axes.set_xlim(0, timeline.seconds / scale)
        axes.set_ylim(bottom=0)
        look.label_axes(axes, f"time ({unit})", f"memory ({name})")
        figure.legend(loc="outside lower left", ncols=2)
    return figure


def _chosen(timeline: Timeline, ranks: Sequence[int] | None, most: int) -> list[int]:
    found = len(timeline.results)
    chosen = list(range(found)) if ranks is None else list(ranks)
    good = 0 < len(chosen) <= most and all(0 <= rank < found for rank in chosen)
    text = f"ranks {chosen[:20]} of {found} are to be drawn; name 1 to {most} of them with ranks="
    require(good and len(set(chosen)) == len(chosen), text)
    return chosen


def _kind(span: Span) -> str:
    return span.label.partition(" ")[0] or span.lane


def _told(timeline: Timeline, chosen: list[int]) -> str:
    """Alt text: how long it took, and how busy the first and the last rank's lanes were."""
    scale, unit = _unit(timeline.seconds, UNITS)
    text = f"Timeline of {len(chosen)} ranks, {short(timeline.seconds / scale)} {unit} in all"
    for rank in dict.fromkeys((chosen[0], chosen[-1])):
        share = timeline.busy(rank) / timeline.seconds
        text += f". Rank {rank} computes {share:.0%} of the time"
    return text


def _unit(largest: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The first unit of which there is at least one, or the smallest."""
    return next((unit for unit in units if largest >= unit[0]), units[-1])


def _paint(i: int) -> dict:
    pale = [0.45 * part + 0.55 for part in to_rgb(look.COLOURS[i])]
    return {"facecolor": pale, "edgecolor": "black", "hatch": look.HATCHES[i], "linewidth": 0.8}


def _draw_bar(axes: Axes, span: Span, row: int, paint: dict, scale: float, total: float) -> None:
    """A bar, and in it the rest of its label where there is room."""
    width = (span.end - span.start) / scale
    axes.barh(row, width, left=span.start / scale, height=0.8, **paint)
    text = span.label.partition(" ")[2]
    room = (span.end - span.start) / total * ROOM
    if text and room > len(text) + 0.8:
        plate = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        middle = span.start / scale + width / 2
        axes.text(middle, row, text, ha="center", va="center", bbox=plate)

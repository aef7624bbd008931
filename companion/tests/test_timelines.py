"""Timelines as figures: bars where the spans are, lines where the memory is, readable in grey."""

import matplotlib
import pytest
from matplotlib.text import Text

from companion import style
from companion.parallel.network import Network
from companion.parallel.requests import Begin, Compute, Hold, Meet, Wait
from companion.parallel.simulator import simulate
from companion.parallel.traffic import Link
from companion.timelines import gantt, memory

NETWORK = Network(Link(0.0, 1.0))


def program(rank, ranks):
    def beside():
        yield Meet("sum", tuple(range(ranks)), 0.002, label="sum 7")

    yield Hold(2e9)
    yield Compute(0.003, "forward")
    handle = yield Begin(beside())
    yield Compute(0.004 + 0.001 * rank, "backward 1")
    yield Hold(1e9)
    yield Wait(handle)
    yield Hold(-3e9)


TIMELINE = simulate(program, 2, network=NETWORK)  # 8 ms
FIGURES = {"gantt": lambda: gantt(TIMELINE), "memory": lambda: memory(TIMELINE, title="Memory")}


@pytest.fixture(params=FIGURES)
def figure(request):
    return FIGURES[request.param]()


def test_a_figure_draws_has_alt_text_and_a_unit_and_reads_on_a_phone(figure):
    before = dict(matplotlib.rcParams)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before
    assert any(digit in style.alt(figure) for digit in "0123456789")
    axes = figure.axes[0]
    assert axes.get_xlabel() == "time (ms)"
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    width = figure.get_size_inches()[0] * 72
    assert min(text.get_fontsize() for text in texts) * 360 / width >= 10  # a phone has 360 pixels


def test_bars_stand_where_the_spans_are_and_differ_in_two_ways():
    figure = gantt(TIMELINE, title="Two ranks")
    axes = figure.axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["rank 0, compute", "rank 0, link", "rank 1, compute", "rank 1, link"]
    bars = {}
    for patch in axes.patches:
        row = rows[round(patch.get_y() + patch.get_height() / 2)]
        bars.setdefault(row, []).append((patch.get_x(), patch.get_x() + patch.get_width()))
    drawn = {row: pytest.approx(sum(sorted(times), ())) for row, times in bars.items()}
    assert drawn == {
        "rank 0, compute": (0, 3, 3, 7),
        "rank 0, link": (3, 5),
        "rank 1, compute": (0, 3, 3, 8),
        "rank 1, link": (3, 5),
    }
    paints = {(patch.get_facecolor(), patch.get_hatch()) for patch in axes.patches}
    assert len(paints) == len({hatch for _, hatch in paints}) == 3
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["forward", "backward", "sum"]
    assert {text.get_text() for text in axes.texts} == {"1", "7"}
    assert style.alt(figure).startswith("Two ranks. Timeline of 2 ranks, 8 ms in all. Rank 0")


def test_some_ranks_can_be_chosen():
    axes = gantt(TIMELINE, ranks=[1]).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["rank 1, compute", "rank 1, link"]
    assert len(memory(TIMELINE, ranks=[1]).axes[0].lines) == 1


def test_memory_lines_hold_what_was_held():
    figure = memory(TIMELINE)
    axes = figure.axes[0]
    x, y = axes.lines[1].get_data()
    assert list(x) == pytest.approx([0, 0, 8, 8, 8]) and list(y) == pytest.approx([0, 2, 3, 0, 0])
    assert axes.lines[1].get_drawstyle() == "steps-post"
    assert axes.get_ylabel() == "memory (GB)"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["rank 0, at most 3 GB", "rank 1, at most 3 GB"]


def test_times_and_sizes_get_units_that_fit():
    def brief(rank, ranks):
        yield Hold(5)
        yield Compute(2e-6)

    timeline = simulate(brief, 1, network=NETWORK)
    axes = memory(timeline).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("time (µs)", "memory (bytes)")
    assert list(axes.lines[0].get_data()[0]) == pytest.approx([0, 0, 2])


def labels(rank, ranks):
    for letter in "abcdefg":
        yield Compute(1.0, letter)


def nothing(rank, ranks):
    yield Compute(0.0)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: gantt(TIMELINE, ranks=[2]), r"ranks \[2\] of 2"),
        (lambda: gantt(TIMELINE, ranks=[]), "name 1 to 16"),
        (lambda: gantt(TIMELINE, ranks=[0, 0]), r"ranks \[0, 0\]"),
        (lambda: gantt(simulate(labels, 17)), "name 1 to 16"),
        (lambda: gantt(simulate(labels, 1)), "kinds of bars holds 7"),
        (lambda: gantt(simulate(nothing, 1)), "spans holds 0"),
        (lambda: memory(simulate(labels, 7)), "name 1 to 6"),
        (lambda: memory(simulate(labels, 1)), "no rank held any memory"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()

"""Schedules against torch's own, at their edges, and the explorer that draws them."""

import pytest
import torch
from ipywidgets import embed
from torch.optim import lr_scheduler

from companion.explorers.schedules import schedule_explorer, schedule_figure
from companion.schedules import (
    SCHEDULES,
    linear,
    make_schedule,
    stable_decay,
    stepped,
    warmed,
)
from companion.tests.test_model import small
from companion.tests.test_training import batches
from companion.training import constant, cosine, train

STEPS = 30


def torchs(make) -> list[float]:
    """The factors of one of torch's schedulers, steps 0 to STEPS."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(STEPS + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("schedule", "make"), [
    (make_schedule("constant", STEPS), lambda o: lr_scheduler.ConstantLR(o, 1.0)),
    (make_schedule("step", STEPS, floor=0.01), lambda o: lr_scheduler.StepLR(o, 10, 0.1)),
    (stepped(STEPS, floor=0.125, falls=3), lambda o: lr_scheduler.MultiStepLR(o, [8, 15, 23], 0.5)),
    (make_schedule("linear", STEPS, floor=0.1),
     lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, STEPS)),
    (make_schedule("cosine", STEPS, floor=0.1),
     lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, 0.1)),
    (make_schedule("warm-up", STEPS, warmup=5), lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 4)),
    (stable_decay(STEPS, floor=0.0, share=1 / 3), lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 1.0), lr_scheduler.LinearLR(o, 1.0, 0.0, 10)], [20])),
])  # fmt: skip
def test_schedules_are_torchs(schedule, make):
    ours, limit = [schedule(step) for step in range(STEPS + 1)], STEPS
    if schedule(STEPS) < 0.02 and schedule(0) == 1 and ours[10] == pytest.approx(0.1):
        limit = STEPS - 1  # StepLR falls on beyond the end; ours keeps its last factor
    assert ours[: limit + 1] == pytest.approx(torchs(make)[: limit + 1], abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_edges_first_last_and_beyond(name):
    schedule = make_schedule(name, STEPS, warmup=10, floor=0.2)
    assert [schedule(step) for step in range(10)] == pytest.approx([k / 10 for k in range(1, 11)])
    assert schedule(10) == 1.0
    factors = [schedule(step) for step in range(9, 5 * STEPS)]
    assert factors == sorted(factors, reverse=True)
    end = 1.0 if name in ("constant", "warm-up") else 0.2
    beyond = [schedule(step) for step in (STEPS, STEPS + 1, 10 * STEPS)]
    assert beyond == pytest.approx([end] * 3, abs=1e-15)
    last = {"linear": 0.24, "cosine": 0.20493, "warmup-stable-decay": 0.4, "step": 0.2}.get(name, 1)
    assert schedule(STEPS - 1) == pytest.approx(last, abs=1e-5)


def test_a_warm_up_may_stand_before_any_schedule():
    ours, theirs = warmed(cosine(20, floor=0.1), 10), cosine(30, warmup=10, floor=0.1)
    assert [ours(k) for k in range(40)] == pytest.approx([theirs(k) for k in range(40)])
    plain = warmed(constant, 0)
    assert [plain(k) for k in (0, 1, 99)] == [1.0, 1.0, 1.0]


def test_one_step_is_a_whole_training():
    assert [make_schedule(name, 1)(0) for name in ("constant", "linear", "cosine")] == [1, 1, 1]
    assert stable_decay(1)(0) == 1 and linear(1, floor=0)(1) == 0
    assert stable_decay(10, share=0.01)(9) == 1  # never less than one step of decay


def test_training_takes_the_rates():
    model, seen = small(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    take = lambda step, loss: seen.append(optimizer.param_groups[0]["lr"])  # noqa: E731
    schedule = make_schedule("warmup-stable-decay", 4, warmup=2, floor=0.0, share=0.5)
    how = {"optimizer": optimizer, "schedule": schedule, "after": take, "progress": False}
    train(model, batches(), steps=5, **how)
    assert seen == [0.25, 0.5, 0.5, 0.5, 0.0]


@pytest.mark.parametrize(("given", "message"), [
    ({"name": "cosin"}, "schedule is 'cosin'; known are: constant, warm-up, step, linear"),
    ({"steps": 0}, "steps is 0"), ({"warmup": 30}, "warmup 30 must be shorter than the 30 steps"),
    ({"warmup": -1}, "warmup is -1"), ({"name": "warm-up"}, "warmup is 0"),
    ({"name": "warmup-stable-decay"}, "warmup is 0"), ({"floor": 1.5}, "floor is 1.5"),
    ({"floor": -0.1}, "floor is -0.1"), ({"name": "step", "floor": 0.0}, "floor is 0.0"),
    ({"name": "step", "falls": 30}, "30 falls do not fit into 30 steps"),
    ({"name": "warmup-stable-decay", "warmup": 1, "share": 0}, "share is 0"),
    ({"falls": 3}, "option of cosine is 'falls'"), ({"share": 0.5}, "option of cosine is 'share'"),
])  # fmt: skip
def test_what_is_no_schedule_is_refused(given, message):
    given = {"name": "cosine", "steps": STEPS} | given
    with pytest.raises(ValueError, match=message):
        make_schedule(given.pop("name"), given.pop("steps"), **given)


def test_the_figure_draws_the_rates():
    how = {"steps": 20, "warmup": 4, "floor": 0.5, "rate": 0.01}
    figure = schedule_figure("linear", **how)
    (axes,) = figure.axes
    schedule = make_schedule("linear", 20, warmup=4, floor=0.5)
    expected = [0.01 * schedule(step) for step in range(20)]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx(expected)
    assert f"mean factor {sum(expected) / 0.2:.2f}" in figure.alt
    assert "first 0.0025, highest 0.01, last 0.00531" in figure.alt
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_the_explorer_shows_a_default_follows_and_refuses():
    explorer, expected = schedule_explorer(), schedule_figure()._repr_html_()
    assert explorer.result.value == expected
    state = embed.embed_data(views=[explorer])["manager_state"]["state"]
    assert expected in [model["state"].get("value") for model in state.values()]
    explorer.controls["name"].value = "warmup-stable-decay"
    assert "warmup-stable-decay, warm-up 40" in explorer.result.value
    explorer.controls["warmup"].value = 400
    assert "Not possible: warmup 400 must be shorter than the 400 steps" in explorer.result.value
    explorer.controls["warmup"].value = 0
    assert "Not possible: warmup is 0" in explorer.result.value

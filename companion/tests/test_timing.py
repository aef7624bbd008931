"""The stopwatch in a made-up world where time passes only when something is called.

There the truth is known, noise can be made as bad as one likes, and a hundred races cost nothing.
"""

import gc
import math
import random

import pytest
import torch

from companion import rounds, timing
from companion.rounds import DRIFTED, SETTLE, WAITED, Plan, Round, plans, quiet_rounds
from companion.timing import LAYOUT, Race, once, race


class World:
    """A machine with a speed that wanders, and other programs that take its core."""

    def __init__(self, wander=0.0, memory=0.9, taken=0.0, seed=0):
        self.time, self.lost, self.log = 0.0, 0.0, []
        self.wander, self.memory, self.taken = wander, memory, taken
        self.random, self.speed = random.Random(seed), 0.0

    def now(self):
        return self.time

    def waited(self):
        return self.lost

    def work(self, name, seconds, effect=None):
        """A callable that takes so many seconds of an undisturbed machine."""

        def call():
            self.log.append(name)
            fresh = self.random.gauss(0, self.wander) * math.sqrt(1 - self.memory**2)
            self.speed = self.memory * self.speed + fresh
            self.time += seconds * math.exp(self.speed)
            if self.random.random() < self.taken:
                away = self.random.uniform(0.001, 0.01)
                self.time, self.lost = self.time + away, self.lost + away
            if effect:
                effect()

        return call


@pytest.fixture
def world(monkeypatch):
    """Put a world in the place of the clock and of the reference product; returns a maker."""

    def make(**settings):
        made = World(**settings)
        monkeypatch.setattr(rounds, "Clock", lambda: made)
        monkeypatch.setattr(timing, "Clock", lambda: made)
        monkeypatch.setattr(rounds, "reference_product", lambda: made.work("product", 0.0005))
        return made

    return make


def test_a_still_world_gives_exact_medians_and_ratios(world):
    w = world()
    result = race(rounds=25, slow=w.work("slow", 0.030), fast=w.work("fast", 0.010))
    assert result.median("slow") == pytest.approx(0.030)
    assert result.ratio("slow", "fast").estimate == pytest.approx(3)
    assert result.ratio("fast", "slow").estimate == pytest.approx(1 / 3)
    assert result.differs("slow", "fast") is True and not result.busy
    assert [len(times) for times in result.seconds.values()] == [25, 25]


def test_each_round_goes_there_and_back_and_orders_vary(world):
    w = world()
    race(rounds=12, a=w.work("a", 0.1), b=w.work("b", 0.1), c=w.work("c", 0.1))
    visits = "".join(name for name in w.log if name in "abc")[6:]  # after warm-up and pilots
    assert len(visits) == 12 * 6
    orders = [visits[i : i + 6] for i in range(0, len(visits), 6)]
    assert all(order == order[::-1] and set(order) == set("abc") for order in orders)
    assert len(set(orders)) > 2


def test_the_order_follows_the_seed(world):
    logs = []
    for seed in (1, 1, 2):
        w = world()
        race(rounds=8, seed=seed, a=w.work("a", 0.1), b=w.work("b", 0.1))
        logs.append(w.log)
    assert logs[0] == logs[1] != logs[2]


def test_short_calls_are_repeated_until_a_sample_is_long_and_settle_first(world):
    w = world()
    result = race(rounds=6, warmup=0, quick=w.work("quick", 0.0003), long=w.work("long", 0.2))
    assert result.median("quick") == pytest.approx(0.0003)  # seconds are those of one call
    assert w.log.count("quick") == 3 + 12 * (1 + 7)  # pilots; 7 x 0.3 ms in each of 12 samples
    assert w.log.count("long") == 1 + 12


@pytest.mark.parametrize("seconds, expected", [(0.002, 90), (0.010, 72), (0.5, 25)])
def test_quick_calls_get_more_rounds_within_limits(world, seconds, expected):
    w = world()
    result = race(a=w.work("a", seconds), b=w.work("b", seconds))
    assert len(result.seconds["a"]) == pytest.approx(expected, abs=5) and not result.busy


def test_warmup_calls_come_before_anything_else(world):
    w = world()
    race(rounds=6, warmup=3, a=w.work("a", 0.1), b=w.work("b", 0.1))
    assert w.log[:6] == ["a"] * 3 + ["b"] * 3


def test_calls_of_like_length_share_a_plan():
    made = plans({"a": 0.0019, "b": 0.0021, "slow": 0.060, "tiny": 1e-5})
    assert made["a"] == made["b"] == Plan(2, True)
    assert made["slow"] == Plan(1, False) and made["tiny"] == Plan(200, True)
    edge = plans({"a": SETTLE * 0.99, "b": SETTLE * 1.01})
    assert edge["a"] == edge["b"]
    assert plans({"free": 0.0})["free"].repeats > 1000


def test_a_steady_drift_cancels(world):
    w = world()
    w.pace = 1.0

    def slower():  # each call takes 0.1 % longer than the one before
        w.time += 0.020 * w.pace
        w.pace *= 1.001

    result = race(rounds=20, a=lambda: slower(), b=lambda: slower())
    assert result.ratio("a", "b").estimate == pytest.approx(1, abs=1e-5)


def alarms(make, slowdown, races=100, **settings):
    """How often of so many races a difference was called, and how often the machine was busy."""
    called = busy = 0
    for seed in range(races):
        w = make(seed=seed, **settings)
        result = race(seed=seed, a=w.work("a", 0.004 * slowdown), b=w.work("b", 0.004))
        called += result.differs("a", "b") is True
        busy += result.differs("a", "b") is None
    return called, busy


NOISE = {
    "quiet": dict(wander=0.03),
    "slow waves": dict(wander=0.15, memory=0.999),
    "rough": dict(wander=0.08, memory=0.5),
    "preempted": dict(wander=0.03, taken=0.03),
}


@pytest.mark.parametrize("settings", NOISE.values(), ids=NOISE.keys())
def test_a_callable_seldom_differs_from_its_own_copy(world, settings, monkeypatch):
    monkeypatch.setattr(timing, "LAYOUT", 0.0)  # the interval alone must do it
    called, busy = alarms(world, 1.0, **settings)
    assert called <= 10 and busy <= 10


@pytest.mark.parametrize("settings", NOISE.values(), ids=NOISE.keys())
def test_ten_percent_is_found_in_noise(world, settings):
    called, busy = alarms(world, 1.1, **settings)
    assert called >= 90 - busy and busy <= 10


def test_a_machine_that_is_always_taken_gives_no_number(world):
    called, busy = alarms(world, 1.1, races=20, taken=0.5)
    assert busy == 20 and called == 0


def test_busy_says_so_and_gives_no_number(world):
    w = world(taken=1.0)
    result = race(patience=0, a=w.work("a", 0.1), b=w.work("b", 0.01))
    assert result.busy and result.tried == 25
    assert math.isnan(result.median("a")) and not result.ratio("a", "b").known
    assert result.differs("a", "b") is None
    for text in (str(result), result._repr_html_()):
        assert "machine busy: not measured, run again" in text and "ms" not in text


def test_patience_waits_for_the_other_program_to_end(world):
    w = world(taken=1.0)

    def until_three_seconds():
        if w.time > 3:
            w.taken = 0.0

    calls = dict(a=w.work("a", 0.01, until_three_seconds), b=w.work("b", 0.01), rounds=25)
    assert race(patience=0, **calls).busy
    w.time, w.taken = 0.0, 1.0
    patient = race(patience=30, **calls)
    assert not patient.busy and patient.tried > 25 and len(patient.seconds["a"]) == 25


def test_noisy_rounds_are_left_out_for_every_candidate(world):
    w = world()
    calls = iter(range(1000))

    def stall():  # another program has the core for 50 ms in every seventh call
        if next(calls) % 7 == 0:
            w.time, w.lost = w.time + 0.05, w.lost + 0.05

    result = race(patience=0, a=w.work("a", 0.1, stall), b=w.work("b", 0.1))
    assert not result.busy and result.tried > 25
    assert set(map(len, result.seconds.values())) == {25}
    assert max(result.seconds["a"]) == pytest.approx(0.1)


def test_one_slow_product_of_three_condemns_its_round(world, monkeypatch):
    w = world()
    normal, slow = w.work("product", 0.002), w.work("product", 0.004)
    calls = iter(range(1000))

    def product():  # two calls at first, then six a round, each second one timed
        (slow if next(calls) % 24 == 9 else normal)()  # slow at the start of one round in four

    monkeypatch.setattr(rounds, "reference_product", lambda: product)
    result = race(patience=0, a=w.work("a", 0.1), b=w.work("b", 0.1))
    assert not result.busy and result.tried > 27


def test_quiet_rounds_know_both_signs_of_a_busy_machine():
    def made(reference=1.0, waited=0.0):
        return Round({"a": 1.0}, reference, waited)

    usual = [made(), made(1 + DRIFTED * 0.9), made(), made(waited=WAITED)]
    assert quiet_rounds(usual) == [True] * 4
    assert quiet_rounds([*usual, made(1 + DRIFTED * 1.1)])[-1] is False
    assert quiet_rounds([*usual, made(waited=WAITED * 1.1)])[-1] is False


def test_threads_and_collector_are_put_back():
    before = torch.get_num_threads()
    seen = []

    def look():
        seen.append((torch.get_num_threads(), gc.isenabled()))

    race(rounds=6, threads=before + 1, a=look)
    assert set(seen) == {(before + 1, False)}
    assert (torch.get_num_threads(), gc.isenabled()) == (before, True)

    def fail():
        raise KeyError("from the candidate")

    for call in (lambda: race(threads=before + 1, a=fail), lambda: once(fail, before + 1)):
        with pytest.raises(KeyError, match="from the candidate"):
            call()
        assert (torch.get_num_threads(), gc.isenabled()) == (before, True)


def test_accelerators_are_waited_for(monkeypatch):
    waits = []
    monkeypatch.setattr(rounds, "synchronize", lambda: waits.append(1))
    once(lambda: None)
    assert len(waits) == 2


def test_once_times_a_single_call(world):
    w = world()
    assert once(w.work("a", 0.7)) == pytest.approx(0.7) and w.log == ["a"]


def test_a_real_race_sees_twenty_times_the_work_or_says_it_was_busy():
    matrix = torch.ones(64, 64)
    result = race(
        rounds=6, one=lambda: matrix @ matrix, many=lambda: [matrix @ matrix for _ in range(20)]
    )
    assert result.busy or result.ratio("many", "one").estimate > 2


def test_the_real_clock_advances_and_counts_waiting():
    clock = rounds.Clock()
    first, waited = clock.now(), clock.waited()
    assert clock.now() > first and clock.waited() >= waited >= 0


STILL = Race({"plain": (0.0102,) * 9, "<quick>": (0.0051,) * 9}, threads=1, tried=11)


def test_a_race_renders_its_medians_and_ratios():
    for text in (str(STILL), repr(STILL), STILL._repr_html_()):
        assert "ms a call" in text and "10.2" in text and "5.10" in text
        assert "0.50" in text and "9 rounds, 2 noisy ones left out" in text
    assert "&lt;quick&gt;" in STILL._repr_html_()
    assert STILL.as_dict()["seconds"]["plain"] == [0.0102] * 9


def test_the_ratio_allows_for_layout():
    ratio = STILL.ratio("plain", "<quick>")
    assert ratio.low == pytest.approx(2 / (1 + LAYOUT)) and ratio.high == pytest.approx(
        2 + 2 * LAYOUT
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: race(), "no candidates"),
        (lambda: race(rounds=0, a=print), "rounds is 0; it must be a whole number of at least 6"),
        (lambda: race(rounds=5, a=print), "rounds is 5"),
        (lambda: race(warmup=-1, a=print), "warmup is -1"),
        (lambda: race(threads=0, a=print), "threads is 0"),
        (lambda: race(patience=-1, a=print), "patience is -1"),
        (lambda: race(a=3), "candidate 'a' is 3, which cannot be called"),
        (lambda: once(3), "3 cannot be called"),
        (lambda: STILL.median("slow"), "candidate is 'slow'; known are: plain, <quick>"),
        (lambda: STILL.ratio("plain", "slow"), "candidate is 'slow'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Break-even by a clock that is set by hand, and reasons that are the true ones."""

import math

import pytest
import torch

from companion import compiling
from companion.compiling import BreakEven, break_even, why_not_compiled


class Fake:
    """A clock, and calls that take as long as they are told to."""

    def __init__(self):
        self.now = 100.0

    def call(self, *seconds):
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_steps_until_compiling_has_paid():
    """By hand: 31 s the first time, 1 s later, 1.5 s without: 30 s are saved after 60 steps."""
    fake = Fake()
    plain, compiled = fake.call(9.0, 1.5), fake.call(31.0, 1.0)
    found = break_even(plain, compiled, calls=3, clock=lambda: fake.now)
    assert found == BreakEven(30.0, 1.5, 1.0) and found.steps == 60
    assert found.speedup(60) == 1 and found.speedup(30) < 1 < found.speedup(61)
    assert found.speedup(10**9) == pytest.approx(1.5)
    assert str(found) == "1.50 x a step, 30.0 s to compile: 60 steps"


def test_one_slow_call_does_not_count():
    fake = Fake()
    plain, compiled = fake.call(2.0, 2.0, 50.0, 2.0), fake.call(11.0, 1.0, 1.0, 70.0, 1.0)
    found = break_even(plain, compiled, calls=5, clock=lambda: fake.now)
    assert found == BreakEven(10.0, 2.0, 1.0)


def test_a_step_that_is_no_faster_never_pays():
    for after in (1.0, 2.0):
        found = BreakEven(5.0, 1.0, after)
        assert found.steps == math.inf and "no number of steps" in str(found)
        assert found.speedup(1000) < 1


@pytest.mark.parametrize(
    ("numbers", "match"),
    [((-1.0, 1.0, 1.0), "compiling"), ((1.0, 0.0, 1.0), "before"), ((1.0, 1.0, math.nan), "after")],
)
def test_impossible_seconds_are_refused(numbers, match):
    with pytest.raises(ValueError, match=match):
        BreakEven(*numbers)
    with pytest.raises(ValueError, match="calls is 0"):
        break_even(print, print, calls=0)


def test_without_a_compiler_the_reason_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler" in why_not_compiled() and "set CXX" in why_not_compiled()
    one = tmp_path / "my-compiler"
    one.write_text("#!/bin/sh\n")
    one.chmod(0o755)
    monkeypatch.setenv("CXX", "my-compiler")
    assert "C++ compiler" not in why_not_compiled()
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in why_not_compiled()
    (tmp_path / "Python.h").touch()
    assert why_not_compiled() == ""


def test_devices_have_their_own_reasons(monkeypatch):
    assert "not on meta" in why_not_compiled("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not_compiled("cuda") == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    assert "triton" in why_not_compiled("cuda")

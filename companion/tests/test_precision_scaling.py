"""The loss scale against torch.amp.GradScaler on the same gradients, and what it refuses."""

import math

import pytest
import torch

from companion.hardware import best_device
from companion.precision.scaling import FLOOR, PATIENCE, LossScale, static


def gradients(steps, bad, seed=0):
    """Scaled gradients of two parameters a step; a step in `bad` holds an infinity or a NaN."""
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        pair = [torch.randn(5, generator=draw), torch.randn(2, 3, generator=draw)]
        if step in bad:
            pair[step % 2].view(-1)[step % 5] = (math.inf, -math.inf, math.nan)[step % 3]
        yield pair


def beside_torch(steps, bad, **options):
    """Our scales, skips and weights beside torch's, step by step, with SGD."""
    device = best_device()
    ours, theirs = ([torch.nn.Parameter(torch.ones(n, device=device)) for n in (5, (2, 3))]
                    for _ in range(2))  # fmt: skip
    names = {"value": "init_scale", "growth": "growth_factor", "backoff": "backoff_factor",
             "interval": "growth_interval"}  # fmt: skip
    scale = LossScale(**options)
    scaler = torch.amp.GradScaler(device.type, **{names[k]: v for k, v in options.items()})
    scaler.scale(torch.zeros((), device=device))  # makes its tensors
    one, other = torch.optim.SGD(ours, lr=0.1), torch.optim.SGD(theirs, lr=0.1)
    for pair in gradients(steps, bad):
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, pair, strict=True):
                parameter.grad = gradient.clone().to(device)
        finite = scale.unscale(ours)
        scaler.unscale_(other)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.grad.nan_to_num(7, 8, 9), b.grad.nan_to_num(7, 8, 9))
        if finite:
            one.step()
        scaler.step(other)
        scaler.update()
        scale.update(finite)
        yield scale.value, scaler.get_scale(), [torch.equal(a, b) for a, b in zip(ours, theirs)]  # noqa: B905


@pytest.mark.parametrize(
    "options",
    [
        {"interval": 7},
        {"value": 1000.0, "interval": 3, "growth": 3.0, "backoff": 0.3},  # no powers of two
        {"value": 2.0**126, "interval": 1},  # stops growing at the end of FP32
    ],
)
def test_same_scales_and_skips_as_torch_over_hundreds_of_steps(options):
    draw = torch.Generator().manual_seed(1)
    bad = {step for step in range(400) if torch.rand((), generator=draw) < 0.12}
    rows = list(beside_torch(400, bad, **options))
    assert all(ours == theirs and all(equal) for ours, theirs, equal in rows)
    assert len({ours for ours, _, _ in rows}) >= 3


def test_same_as_torch_at_the_default_interval():
    bad = {0, 1, 5, 2100}
    rows = list(beside_torch(2104, bad))
    assert [ours for ours, _, _ in rows] == [theirs for _, theirs, _ in rows]
    assert rows[5][0] == 2.0**13 and rows[2005][0] == 2.0**14 and rows[2100][0] == 2.0**13


def test_counts():
    scale = LossScale(8.0, interval=2)
    for finite in (True, True, False, True, False, True, True):
        scale.update(finite)
    assert (scale.good, scale.skipped, scale.steps) == (5, 2, 7)
    assert scale.value == 8.0 * 2 / 2 / 2 * 2
    assert "5 good steps, 2 skipped" in repr(scale)


def test_a_static_scale_stays():
    scale = static(1024.0)
    for finite in (True, False) * 110:
        scale.update(finite)
    assert scale.value == 1024 and (scale.good, scale.skipped) == (110, 110)


def test_a_scale_goes_on_from_its_state():
    whole, first = LossScale(64.0, interval=3), LossScale(64.0, interval=3)
    pattern = [True, True, False, True, True, True, True, False]
    for finite in pattern:
        whole.update(finite)
    for finite in pattern[:5]:
        first.update(finite)
    second = LossScale(interval=3)
    second.load_state_dict(first.state_dict())
    for finite in pattern[5:]:
        second.update(finite)
    assert second.state_dict() == whole.state_dict()
    with pytest.raises(ValueError, match=r"lacks \['good'"):
        second.load_state_dict({"value": 1.0})


def test_stops_below_the_floor_and_says_so():
    scale = LossScale(2.0**16)
    with pytest.raises(FloatingPointError, match=r"30 steps before it.*skipped.*3.05176e-05"):
        for _ in range(1000):
            scale.update(False)
    assert scale.value == FLOOR / 2 and scale.skipped == 31


def test_a_static_scale_stops_when_it_skips_on_and_on():
    scale = static(1024.0)
    with pytest.raises(FloatingPointError, match="99 steps before it"):
        for _ in range(1000):
            scale.update(False)
    assert scale.skipped == PATIENCE


@pytest.mark.parametrize("value", [0, 0.0, -2.0, math.inf, math.nan, True, "8", None, 1e300, 1e-60])
def test_a_scale_that_is_none_is_refused(value):
    for make in (LossScale, static):
        with pytest.raises(ValueError, match="loss scale is"):
            make(value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"growth": 0.5}, "growth is 0.5"),
        ({"growth": math.nan}, "growth is nan"),
        ({"backoff": 1.5}, "backoff is 1.5"),
        ({"backoff": 0.0}, r"backoff is 0.0.*above 0"),
        ({"interval": 0}, "interval is 0"),
        ({"interval": 2.5}, "interval is 2.5"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        LossScale(**options)


def test_fp16_gradients_are_refused():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    weight.grad = torch.ones(3, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"float16.*FP32 master weights"):
        LossScale().unscale([weight])

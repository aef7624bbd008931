"""The loop against the loop written out, and a resumed training against an uninterrupted one."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from companion.data import Batches
from companion.model import LanguageModel
from companion.tests.test_model import SMALL, small
from companion.training import (
    adamw,
    constant,
    cosine,
    load_checkpoint,
    plain_step,
    restarts,
    save_checkpoint,
    train,
)


def batches(seed=0):
    line = torch.arange(400) % 50
    return Batches(line, batch=3, context=12, seed=seed)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_training_is_the_loop_written_out():
    model, slow = small(), small()
    losses = train(model, batches(), steps=4, optimizer=adamw(model), progress=False)
    optimizer, data, expected = adamw(slow), batches(), []
    for step in range(4):
        logits = slow(data[step])[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), data[step][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(slow.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-12) and same(model, slow)


def test_training_learns_a_text_that_repeats():
    model = small().float()
    losses = train(model, batches(), steps=60, optimizer=adamw(model, 1e-2), progress=False)
    assert losses[0] > 3.5 and losses[-1] < 0.5


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path, stop):
    schedule = cosine(10, warmup=3)
    whole = small()
    optimizer = adamw(whole)
    losses = train(
        whole, batches(), steps=10, optimizer=optimizer, schedule=schedule, progress=False
    )
    part, path = small(), tmp_path / "x.safetensors"
    optimizer = adamw(part)
    first = train(part, batches(), steps=stop, optimizer=optimizer, schedule=schedule)
    save_checkpoint(path, part, optimizer, step=stop, about={"losses": first})
    torch.manual_seed(99)
    resumed = LanguageModel(SMALL).double()
    resumed.cos, resumed.sin = part.cos, part.sin
    optimizer = adamw(resumed)
    found = load_checkpoint(path, resumed, optimizer)
    rest = train(
        resumed, batches(), steps=10, start=found.step, optimizer=optimizer, schedule=schedule
    )
    assert found.about["losses"] + rest == losses and same(resumed, whole)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    model = small()
    path = save_checkpoint(tmp_path / "x.safetensors", model, adamw(model), step=0)
    wide, deep = small(hidden=64), small(layers=3)
    with pytest.raises(ValueError, match=r"\(32, 48\), the model \(32, 64\)"):
        load_checkpoint(path, wide, adamw(wide))
    with pytest.raises(ValueError, match="another shape"):
        load_checkpoint(path, deep, adamw(deep))
    assert same(wide, small(hidden=64))  # nothing was put in place before the check


def test_cosine_rises_falls_and_stays():
    factor = cosine(110, warmup=10, floor=0.1)
    assert factor(0) == pytest.approx(0.1) and factor(9) == factor(10) == 1
    assert factor(60) == pytest.approx(0.1 + 0.9 / 2)
    assert factor(110) == factor(1000) == pytest.approx(0.1)
    assert constant(5) == 1


def test_restarts_are_one_cosine_after_another():
    factor = restarts((110, 20), warmup=10, floor=0.1)
    first, second = (cosine(steps, warmup=10, floor=0.1) for steps in (110, 20))
    assert [factor(step) for step in range(110)] == [first(step) for step in range(110)]
    assert [factor(110 + step) for step in range(20)] == [second(step) for step in range(20)]
    assert factor(1000) == 0.1


def test_restarts_refuse_what_is_no_cycle():
    with pytest.raises(ValueError, match="cycles is empty"):
        restarts(())
    with pytest.raises(ValueError, match="warmup 10 must be shorter than the 5 steps"):
        restarts((50, 5), warmup=10)


def test_the_schedule_scales_each_group_from_its_own_rate():
    model = small()
    optimizer = adamw(model, 0.5)
    optimizer.param_groups[1]["lr"] = 0.25
    seen = []
    step = lambda *_: seen.append([g["lr"] for g in optimizer.param_groups]) or torch.tensor(1.0)  # noqa: E731
    train(model, batches(), steps=2, optimizer=optimizer, step=step, schedule=lambda i: 1 / (i + 1))
    assert seen == [[0.5, 0.25], [0.25, 0.125]]


def test_vectors_do_not_decay():
    groups = adamw(small()).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(p.ndim == 2 for p in groups[0]["params"])
    assert len(groups[1]["params"]) == 2 * SMALL.layers + 1


def test_after_is_told_each_step_and_a_loss_that_is_no_number_stops():
    seen = []
    train(small(), batches(), steps=3, after=lambda i, loss: seen.append(i), progress=False)
    assert seen == [0, 1, 2]
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        train(small(), batches(), steps=3, step=lambda *_: torch.tensor(math.nan), progress=False)


def test_steps_change_the_model_by_their_gradient():
    model = small()
    before = [p.clone() for p in model.parameters()]
    plain_step(model, torch.optim.SGD(model.parameters(), lr=1e-3), batches()[0])
    pairs = zip(model.parameters(), before, strict=True)
    length = math.sqrt(sum((p - b).square().sum().item() for p, b in pairs))
    assert 0 < length <= 1e-3 * (1 + 1e-9)  # a gradient of length at most 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cosine(0), "steps is 0"),
        (lambda: cosine(5, warmup=5), "warmup 5 must be shorter than the 5"),
        (lambda: cosine(5, floor=1.5), "floor is 1.5"),
        (lambda: adamw(small(), rate=0.0), "rate is 0.0"),
        (lambda: adamw(small(), rate=math.inf), "rate is inf"),
        (lambda: train(small(), batches(), steps=0), "steps is 0"),
    ],
)
def test_bad_input_names_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Stored logits: equal to the teacher when all are kept, a bound or a bias when not."""

import math

import pytest
import torch
from safetensors.torch import load_file

from companion.distillation import (
    forward_kl,
    imitation_step,
    load_top,
    offline_step,
    renormalised,
    save_top,
    store_top,
    top_bytes,
    with_rest,
)
from companion.distillation.stored import TENSORS, id_type
from companion.storage import load_tensors, save_tensors
from companion.tests.test_distillation import Forgetful, narrow, spoiled, states, untouched
from companion.tests.test_model import small
from companion.training import adamw, train

WINDOWS = torch.randint(50, (6, 9), generator=torch.Generator().manual_seed(8))
LOSSES = [renormalised, with_rest]


def sharp():
    """A teacher that is surer of itself than a model is at its start."""
    model = small()
    with torch.no_grad():
        model.head.weight *= 3
    return model


def stored(k=5, **options):
    return store_top(sharp(), WINDOWS, k, **options)


# --- what is stored -----------------------------------------------------------------------------


def test_the_best_are_stored_with_what_the_rest_share():
    top = stored(temperature=2.0)
    shares = (sharp()(WINDOWS) / 2).softmax(-1)
    for window, position in ((0, 0), (3, 7), (5, 8)):
        chances = sorted(shares[window, position].tolist(), reverse=True)
        found = top.values[window, position].double().exp()
        assert found.tolist() == pytest.approx(chances[:5], rel=5e-3)
        assert top.rest[window, position].exp().item() == pytest.approx(sum(chances[5:]), rel=5e-3)
        ids = top.ids[window, position].long()
        assert shares[window, position, ids].tolist() == pytest.approx(chances[:5])
    assert torch.equal(top.tokens.long(), WINDOWS) and (top.k, top.vocab) == (5, 50)


def test_windows_may_come_in_batches_and_the_teacher_is_left_alone():
    teacher = Forgetful(sharp())
    before = states(teacher)
    one, many = store_top(teacher, WINDOWS, 3), store_top(teacher, WINDOWS.split(4), 3)
    untouched(before, teacher)
    assert torch.equal(one.ids, many.ids) and torch.equal(one.values, stored(3).values)


@pytest.mark.parametrize("k", [1, 8, 50])
def test_bytes_are_counted_and_foretold(k):
    top = stored(k)
    assert top.values.dtype == torch.float16 and top.ids.dtype == torch.int16
    assert top.bytes == top_bytes(WINDOWS.numel(), k, 50) == WINDOWS.numel() * (4 * k + 4)
    assert top_bytes(10, 8, 49_152) == 10 * (8 * 6 + 6) and id_type(2**15) == torch.int16


def test_windows_are_found_by_their_tokens_in_any_order():
    top = stored()
    part = top.of(WINDOWS[[4, 1]])
    assert torch.equal(part.values, top.values[[4, 1]]) and torch.equal(part.rest, top.rest[[4, 1]])
    with pytest.raises(ValueError, match=r"rows \[1\] of the batch.*\(6, 9\) windows"):
        top.of(torch.stack([WINDOWS[0], (WINDOWS[1] + 1) % 50]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 51}, "k is 51; there are only 50"),
        ({"k": 2.0}, "k is 2.0"),
        ({"temperature": 0}, "temperature is 0"),
        ({"windows": []}, "0 windows"),
        ({"windows": torch.empty(0, 9, dtype=torch.int64)}, "at least one"),
        ({"windows": [WINDOWS, WINDOWS[:, 1:]]}, r"windows have \[8, 9\] tokens"),
        ({"teacher": spoiled(small())}, "teacher's blocks.1"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        store_top(**{"teacher": sharp(), "windows": WINDOWS, "k": 3} | change)


def test_impossible_sizes_have_no_bytes():
    for positions, k in ((0, 1), (1, 0), (1, 51)):
        with pytest.raises(ValueError):
            top_bytes(positions, k, 50)


# --- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_logits_stored_are_the_teacher(loss, temperature):
    top = stored(50, temperature=temperature, dtype=torch.float64).of(WINDOWS)
    student = narrow()(WINDOWS)
    expected = forward_kl(student, sharp()(WINDOWS), temperature)
    torch.testing.assert_close(loss(student, top), expected, rtol=1e-5, atol=1e-12)


def test_fp16_costs_little():
    student = narrow()(WINDOWS)
    exact, found = (
        with_rest(student, stored(50, dtype=dtype)) for dtype in (torch.float64, torch.float16)
    )
    assert (found - exact).abs().max() < 5e-3 * exact.mean()


@pytest.mark.parametrize("k", [1, 3, 10, 30])
def test_merging_the_rest_never_raises_the_divergence(k):
    random = torch.Generator().manual_seed(k)
    full, merged = forward_kl(narrow()(WINDOWS), sharp()(WINDOWS)), []
    merged = with_rest(narrow()(WINDOWS), stored(k, dtype=torch.float64))
    assert (merged <= full + 1e-12).all() and (merged >= -1e-12).all()
    assert (merged < full - 1e-6).any()
    assert not (renormalised(narrow()(WINDOWS), stored(k)) <= full).all()  # that one is no bound
    students = 3 * torch.randn(6, 9, 50, generator=random, dtype=torch.float64)
    assert (with_rest(students, stored(k, dtype=torch.float64)) >= merged * 0).all()


def test_both_losses_written_out_for_one_position():
    top = stored(2, dtype=torch.float64).of(WINDOWS[:1])
    student = narrow()(WINDOWS[:1])
    p, q = sharp()(WINDOWS[:1]).softmax(-1)[0, 4], student.softmax(-1)[0, 4]
    best = p.argsort(descending=True)[:2].tolist()
    kept = sum(p[i] for i in best)
    biased = sum(p[i] / kept * (p[i] / kept / q[i]).log() for i in best)
    rest = (1 - kept) * ((1 - kept) / (1 - sum(q[i] for i in best))).log()
    bound = sum(p[i] * (p[i] / q[i]).log() for i in best) + rest
    assert renormalised(student, top)[0, 4].item() == pytest.approx(biased.item(), rel=1e-9)
    assert with_rest(student, top)[0, 4].item() == pytest.approx(bound.item(), rel=1e-9)


def test_the_renormalised_loss_pushes_all_chance_into_the_stored_tokens():
    """At the teacher itself its gradient is not 0, and points away from the tokens left out."""
    top = stored(3, dtype=torch.float64)
    teacher = sharp()(WINDOWS).detach().requires_grad_()
    renormalised(teacher, top).sum().backward()
    inside = torch.zeros_like(teacher, dtype=torch.bool).scatter(-1, top.ids.long(), True)
    torch.testing.assert_close(teacher.grad[~inside], teacher.softmax(-1).detach()[~inside])
    assert (teacher.grad[inside] < 0).all()
    teacher.grad = None
    with_rest(teacher, top).sum().backward()
    assert teacher.grad.abs().max() < 1e-12


def test_the_renormalised_loss_is_least_for_the_stored_tokens_alone():
    top = stored(3, dtype=torch.float64)
    alone = torch.full((6, 9, 50), -60.0, dtype=torch.float64)
    alone = alone.scatter(-1, top.ids.long(), top.values)
    teacher = sharp()(WINDOWS)
    assert renormalised(alone, top).max() < 1e-12 and renormalised(teacher, top).min() > 1e-6
    assert with_rest(teacher, top).max() < 1e-12 and with_rest(alone, top).min() > 1e-6
    kept = top.values.exp().sum(-1)  # what the teacher loses by: -log of what it gives the stored
    torch.testing.assert_close(renormalised(teacher, top), -kept.log())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_confident_logits_give_finite_losses_and_gradients(loss, k):
    class Sure(torch.nn.Linear):
        config = small(vocab=3).config

        def forward(self, tokens):
            return torch.tensor([1e4, -1e4, 0.0]).expand(*tokens.shape, 3)

    tokens = torch.zeros(1, 2, dtype=torch.int64)
    top = store_top(Sure(1, 1), tokens, k)
    student = Sure(1, 1)(tokens).flip(-1).clone().requires_grad_()
    found = loss(student, top)
    found.mean().backward()
    assert found.isfinite().all() and student.grad.isfinite().all()


def test_a_student_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"student \(6, 9, 60\) and stored \(6, 9\).*vocab of 50"):
        with_rest(narrow(vocab=60)(WINDOWS), stored())


# --- the step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [0.0, 0.4])
def test_the_step_with_all_logits_is_the_imitation_step(hard):
    online, offline = narrow(), narrow()
    steps = (
        imitation_step(sharp(), temperature=2.0, hard=hard),
        offline_step(stored(50, temperature=2.0, dtype=torch.float64), hard=hard),
    )
    batches = [WINDOWS[:2], WINDOWS[[5, 3]]]
    losses = [
        train(model, batches, steps=2, optimizer=adamw(model), step=step, progress=False)
        for model, step in zip((online, offline), steps, strict=True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for one, other in zip(online.parameters(), offline.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_the_step_refuses_and_changes_nothing():
    model, other = narrow(), narrow(vocab=60)
    before = states(model, other)
    with pytest.raises(ValueError, match="hard is -1"):
        offline_step(stored(), hard=-1)
    for student, batch in ((model, WINDOWS + 0 * 1), (model, WINDOWS.flip(0)), (other, WINDOWS)):
        step = offline_step(store_top(sharp(), WINDOWS[:2], 3))
        with pytest.raises(ValueError, match=r"not among them|do not match"):
            step(student, adamw(student), batch[: 2 if student is other else 6])
    untouched(before, model, other)


# --- files --------------------------------------------------------------------------------------


def test_a_file_holds_what_was_stored(tmp_path):
    top = stored(4, temperature=2.0)
    path = save_top(tmp_path / "top.safetensors", top)
    again = load_top(path)
    assert all(torch.equal(getattr(again, name), getattr(top, name)) for name in TENSORS)
    assert (again.vocab, again.temperature, again.bytes) == (50, 2.0, top.bytes)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + top_bytes(WINDOWS.numel(), 4, 50)
    assert set(load_file(path)) == set(TENSORS)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors, about: (tensors | {"values": tensors["values"] + 1}, about),
        lambda tensors, about: (tensors | {"ids": tensors["ids"].int()}, about),
        lambda tensors, about: (tensors | {"more": torch.ones(1)}, about),
        lambda tensors, about: ({k: v for k, v in tensors.items() if k != "rest"}, about),
        lambda tensors, about: (tensors, about | {"top": 2}),
        lambda tensors, about: (tensors, about | {"sha256": "0"}),
        lambda tensors, about: (tensors, about | {"temperature": 3.0}),
        lambda tensors, about: (tensors, None),
    ],
)
def test_an_altered_file_is_refused(spoil, tmp_path):
    path = save_top(tmp_path / "top.safetensors", stored())
    save_tensors(path, *spoil(*load_tensors(path)))
    with pytest.raises(ValueError, match="store"):
        load_top(path)


def test_a_cut_or_missing_file_is_refused(tmp_path):
    path = save_top(tmp_path / "top.safetensors", stored())
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="truncated or altered"):
        load_top(path)
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_top(tmp_path / "none.safetensors")
    assert math.isfinite(stored().values.max())

"""The teacher's text and the student's own: repeatable, within bounds, and worth learning from."""

import pytest
import torch

from companion.decoding import generate
from companion.distillation import (
    Shuffled,
    distill,
    forward_kl,
    on_policy_step,
    reverse_kl,
    teacher_text,
)
from companion.distillation.sequences import pieces
from companion.surgery import copied
from companion.tests.test_distillation import Forgetful, narrow, spoiled, states, untouched
from companion.tests.test_distillation_offline import sharp
from companion.tests.test_model import small, some_tokens
from companion.training import adamw, train

PROMPTS = some_tokens(5, 4)


def test_the_teachers_text_is_repeatable_by_seed():
    teacher = sharp()
    before, random = states(teacher), torch.random.get_rng_state()
    one, two, other = (teacher_text(teacher, PROMPTS, 8, seed=seed, batch=2) for seed in (1, 1, 2))
    assert one.shape == (5, 12) and torch.equal(one[:, :4], PROMPTS)
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert one.min() >= 0 and one.max() < 50
    untouched(before, teacher)
    assert torch.equal(random, torch.random.get_rng_state())
    same = teacher_text(small(), PROMPTS[:1].expand(4, -1), 8, batch=2)
    assert len({tuple(row.tolist()) for row in same}) == 4  # batches draw different numbers


def test_the_best_text_is_generates_own_in_evaluation_mode():
    expected = generate(sharp(), PROMPTS, 6)
    assert torch.equal(teacher_text(sharp().train(), PROMPTS, 6, temperature=0, batch=2), expected)
    assert torch.equal(teacher_text(sharp(), PROMPTS, 6, top_k=1), expected)


def test_drawn_text_follows_the_teachers_chances():
    teacher = sharp()
    drawn = teacher_text(teacher, PROMPTS[:1].expand(4000, -1), 1, batch=4000)[:, -1]
    chances = teacher(PROMPTS[:1])[0, -1].softmax(-1)
    counted = torch.bincount(drawn, minlength=50) / 4000
    assert (counted - chances).abs().max() < 4 * (0.25 / 4000) ** 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": PROMPTS[:0]}, r"\(0, 4\)"),
        ({"prompts": PROMPTS[0]}, r"\(4,\)"),
        ({"new": 0}, "new is 0"),
        ({"new": 29}, "4 \\+ 29 tokens exceed the context of 32"),
        ({"temperature": -1}, "temperature is -1"),
        ({"batch": 0}, "batch is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"teacher": spoiled(small())}, "teacher's blocks.1"),
    ],
)
def test_bad_input_to_the_writer_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        teacher_text(**{"teacher": small(), "prompts": PROMPTS, "new": 2} | change)


def test_windows_come_once_a_round_in_an_order_of_the_seed():
    windows = torch.arange(7)[:, None].expand(7, 3)
    rounds = [
        [Shuffled(windows, batch=2, seed=seed)[step] for step in range(3 * turn, 3 * turn + 3)]
        for seed, turn in ((0, 0), (0, 1), (1, 0))
    ]
    orders = [torch.cat(batches)[:, 0].tolist() for batches in rounds]
    assert all(len(order) == len(set(order)) == 6 for order in orders)
    assert orders[0] != orders[1] and orders[0] != orders[2]
    again = Shuffled(windows, batch=2, seed=0)
    assert torch.equal(again[4], rounds[1][1])


@pytest.mark.parametrize(
    ("windows", "batch", "message"),
    [
        (PROMPTS, 6, "5 windows are fewer than one batch of 6"),
        (PROMPTS[:0], 1, "0 windows"),
        (PROMPTS[0], 1, r"shape \(4,\)"),
        (PROMPTS, 0, "batch is 0"),
    ],
)
def test_windows_that_make_no_batch_are_refused(windows, batch, message):
    with pytest.raises(ValueError, match=message):
        Shuffled(windows, batch=batch)


# --- on policy ----------------------------------------------------------------------------------


def test_pieces_are_neighbouring_tokens_of_one_window():
    batch = torch.arange(22).view(2, 11)
    assert pieces(batch, 5).tolist() == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [11, 12, 13, 14, 15],
        [16, 17, 18, 19, 20],
    ]
    with pytest.raises(ValueError, match="11 tokens have no piece of 12"):
        pieces(batch, 12)


def test_the_loss_is_the_divergence_where_the_student_has_written():
    teacher, student, seen = Forgetful(sharp()).train(), narrow(), []

    def watched(ours, theirs, temperature):
        seen.append((ours.detach(), theirs, temperature))
        return forward_kl(ours, theirs, temperature)

    step = on_policy_step(teacher, prompt=3, new=6, temperature=2.0, divergence=watched)
    plain = copied(student)
    loss = step(student, torch.optim.SGD(student.parameters(), lr=0.0), some_tokens(2, 18))
    (ours, theirs, temperature) = seen[0]
    assert ours.shape == theirs.shape == (4, 6, 50) and temperature == 2.0
    assert loss.item() == pytest.approx(4 * forward_kl(ours, theirs, 2.0).mean().item(), rel=1e-12)
    first = pieces(some_tokens(2, 18), 9)[:, :3]  # the first is predicted from the prompt alone
    torch.testing.assert_close(ours[:, 0], plain(first)[:, -1].detach())
    torch.testing.assert_close(theirs[:, 0], sharp()(first)[:, -1].detach())
    assert teacher.training and not theirs.requires_grad


def test_a_student_that_writes_for_its_teacher_comes_closer_to_it():
    """On text that the student wrote, its reverse KL falls."""
    teacher, student = sharp(), narrow()
    before = states(teacher, student)
    call = {"steps": 40, "method": on_policy_step, "prompt": 3, "new": 6, "rate": 1e-2}
    batches = [some_tokens(4, 18)] * 40
    one, two = (distill(teacher, student, batches, progress=False, **call) for _ in range(2))
    untouched(before, teacher, student)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))

    def far(model):
        text = generate(model, some_tokens(16, 3), 6, temperature=1.0)
        return reverse_kl(model(text), teacher(text))[:, 2:-1].mean().item()

    assert far(one) < far(student) / 2


def test_each_step_draws_other_text():
    losses, student = [], narrow()
    step = on_policy_step(sharp(), prompt=3, new=6)
    frozen = torch.optim.SGD(student.parameters(), lr=0.0)
    losses = train(student, [some_tokens(2, 9)] * 3, steps=3, optimizer=frozen, step=step)
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 0}, "prompt is 0"),
        ({"new": 0}, "new is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"temperature": 0}, "temperature is 0"),
        ({"prompt": 5, "new": 5}, "9 tokens have no piece of 10"),
        ({"student": narrow(vocab=60)}, "vocab of 50, the student of 60"),
        ({"teacher": spoiled(small())}, "teacher's blocks.1"),
    ],
)
def test_bad_options_are_named_and_the_models_stay(options, message):
    options = {"student": narrow(), "prompt": 3, "new": 3} | options
    student, teacher = options.pop("student"), options.pop("teacher", small())
    before = states(student)
    with pytest.raises(ValueError, match=message):
        distill(
            teacher,
            student,
            [some_tokens()],
            steps=1,
            method=on_policy_step,
            progress=False,
            **options,
        )
    untouched(before, student)


def test_a_vocabulary_that_differs_is_refused_at_the_step():
    model = narrow(vocab=40)
    before = states(model)
    with pytest.raises(ValueError, match=r"\(2, 3, 40\) and teacher \(2, 3, 50\)"):
        on_policy_step(small(), prompt=3, new=3)(model, adamw(model), some_tokens(2, 6) % 40)
    untouched(before, model)

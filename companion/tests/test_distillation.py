"""Divergences against torch's and hand-computed numbers; the step against the plain one."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from companion.distillation import (
    QUARTER,
    TENTH,
    Remembering,
    distill,
    forward_kl,
    imitation_step,
    in_turn,
    jensen_shannon,
    new_student,
    reverse_kl,
)
from companion.losses import next_token_loss
from companion.memory import unique_parameters
from companion.pretrained import tiny
from companion.surgery import copied
from companion.tests.test_model import small, some_tokens
from companion.training import adamw, plain_step, train

DIVERGENCES = [forward_kl, reverse_kl, jensen_shannon]


def two_logits(spread=1.0, dtype=torch.float64):
    random = torch.Generator().manual_seed(3)
    student, teacher = spread * torch.randn(2, 2, 5, 7, generator=random, dtype=dtype)
    return student, teacher


def narrow(**changes):
    """A student half as wide as `small`, with other weights."""
    return new_student(small(), {"width": 16, "hidden": 24, **changes}, seed=5).double()


def states(*models):
    """Weights, modes and gradients: all that a technique must leave alone."""
    return [
        (
            {name: tensor.clone() for name, tensor in model.state_dict().items()},
            [module.training for module in model.modules()],
            [(p.requires_grad, p.grad is None) for p in model.parameters()],
        )
        for model in models
    ]


def untouched(before, *models):
    for (weights, modes, gradients), (again, later, left) in zip(
        before, states(*models), strict=True
    ):
        assert modes == later and gradients == left and weights.keys() == again.keys()
        assert all(torch.equal(weights[name], again[name]) for name in weights)


# --- divergences --------------------------------------------------------------------------------


def test_divergences_of_two_coins_are_those_computed_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2); their mean is (5/8, 3/8)."""
    teacher = torch.tensor([[[math.log(3), 0.0]]], dtype=torch.float64)
    student = torch.zeros(1, 1, 2, dtype=torch.float64)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    middle = 0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3)
    middle += 0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)
    for divergence, expected in zip(DIVERGENCES, (forward, reverse, middle / 2), strict=True):
        assert divergence(student, teacher).shape == (1, 1)
        assert divergence(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergences_are_torch_kl_summed_over_the_vocabulary(temperature):
    student, teacher = two_logits()
    ours, theirs = (log_softmax(x / temperature, -1) for x in (student, teacher))
    mean = ((ours.exp() + theirs.exp()) / 2).log()

    def kl(p, q):
        return kl_div(q, p, reduction="none", log_target=True).sum(-1)

    expected = [kl(theirs, ours), kl(ours, theirs), (kl(theirs, mean) + kl(ours, mean)) / 2]
    for divergence, wanted in zip(DIVERGENCES, expected, strict=True):
        found = divergence(student, teacher, temperature)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def test_jensen_shannon_is_symmetric_and_at_most_log_2():
    for spread in (0.1, 1.0, 10.0, 1000.0):
        student, teacher = two_logits(spread)
        found = jensen_shannon(student, teacher)
        torch.testing.assert_close(found, jensen_shannon(teacher, student), rtol=1e-12, atol=1e-15)
        assert found.min() >= 0 and found.max() <= math.log(2) + 1e-12
    assert found.max() > 0.99 * math.log(2)  # two that are sure of different tokens
    assert not torch.allclose(reverse_kl(*two_logits()), forward_kl(*two_logits()))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_confident_logits_give_finite_losses_and_gradients(divergence):
    """What `softmax(...).log()` cannot do."""
    sure = torch.tensor([[[1e4, -1e4, 0.0]]])
    student, teacher = sure.flip(-1).requires_grad_(), sure
    p, q = student.softmax(-1), teacher.softmax(-1)
    assert not (q * (q.log() - p.log())).sum().isfinite()
    loss = divergence(student, teacher).mean()
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    if divergence is not jensen_shannon:
        assert loss.item() == pytest.approx(1e4)


def test_16_bit_logits_are_summed_in_32():
    student, teacher = (x.bfloat16() for x in two_logits())
    for divergence in DIVERGENCES:
        found = divergence(student, teacher)
        assert found.dtype == torch.float32
        assert torch.equal(found, divergence(student.float(), teacher.float()))


def length_of_gradient(temperature, factor):
    student, teacher = two_logits()
    student, teacher = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, True)
    student.requires_grad_()
    (forward_kl(student, teacher, temperature).sum() * factor).backward()
    return student, teacher, student.grad


def test_the_gradient_keeps_its_size_with_t_squared_and_loses_it_without():
    """Hinton et al.: at high temperatures, zero-mean logits, T^2 x gradient is (z - v) / V."""
    student, teacher, gradient = length_of_gradient(1e4, 1e4**2)
    limit = (student.detach() - teacher) / 7
    torch.testing.assert_close(gradient, limit, rtol=1e-2, atol=1e-4)
    lengths = [length_of_gradient(t, 1)[2].norm().item() for t in (100.0, 200.0)]
    assert lengths[0] / lengths[1] == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "message"),
    [
        ((1, 2, 3), (1, 2, 4), 1.0, r"student \(1, 2, 3\) and teacher \(1, 2, 4\)"),
        ((2, 3), (2, 3), 1.0, r"\(2, 3\) must both be"),
        ((1, 2, 3), (1, 2, 3), 0.0, "temperature is 0.0"),
        ((1, 2, 3), (1, 2, 3), -1, "temperature is -1"),
        ((1, 2, 3), (1, 2, 3), math.nan, "temperature is nan"),
    ],
)
def test_bad_logits_and_temperatures_are_named(divergence, student, teacher, temperature, message):
    with pytest.raises(ValueError, match=message):
        divergence(torch.zeros(student), torch.zeros(teacher), temperature)


# --- the step -----------------------------------------------------------------------------------


def gradients(step, model):
    """What a step would change the weights by, under plain descent at rate 1."""
    before = [p.detach().clone() for p in model.parameters()]
    loss = step(model, torch.optim.SGD(model.parameters(), lr=1.0), some_tokens())
    return loss, [b - p for b, p in zip(before, model.parameters(), strict=True)]


def test_labels_alone_are_the_plain_step():
    (loss, found), (plain, expected) = (
        gradients(step, small()) for step in (imitation_step(narrow(), hard=1.0), plain_step)
    )
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_no_labels_is_the_divergence_alone_at_every_position():
    teacher, model = small(), narrow()
    loss, found = gradients(imitation_step(teacher, temperature=2.0), copied(model))
    tokens = some_tokens()
    expected = 4 * forward_kl(model(tokens), teacher(tokens).detach(), 2.0).mean()
    expected.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for one, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-9, atol=1e-14)


def test_no_labels_means_that_the_next_tokens_do_not_matter():
    """Only the last token of a window is never read: as a label it counts, for imitation not."""

    class Blind(nn.Module):  # both models see the windows without their last token
        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, tokens):
            return self.model(torch.cat([tokens[:, :-1], tokens[:, :1]], dim=1))

    tokens = some_tokens()
    other = torch.cat([tokens[:, :-1], (tokens[:, -1:] + 1) % 50], dim=1)
    for hard, same in ((0.0, True), (0.5, False)):
        step, losses = imitation_step(Blind(small()), hard=hard), []
        for batch in (tokens, other):
            model = Blind(narrow())
            losses.append(step(model, adamw(model), batch).item())
        assert (losses[0] == losses[1]) == same


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_loss_is_the_weighted_sum_of_its_parts(divergence):
    teacher, model, tokens = small(), narrow(), some_tokens()
    far = divergence(model(tokens), teacher(tokens), 3.0).mean()
    expected = 0.7 * 9 * far + 0.3 * next_token_loss(model(tokens), tokens)
    step = imitation_step(teacher, temperature=3.0, hard=0.3, divergence=divergence)
    assert step(model, adamw(model), tokens).item() == pytest.approx(expected.item(), rel=1e-12)


class Forgetful(nn.Module):
    """A model with dropout before its head: another one in training mode."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.dropout = model, model.config, nn.Dropout(0.5)

    def forward(self, tokens):
        return self.dropout(self.model(tokens))


def test_the_teacher_is_read_in_evaluation_mode_without_gradients():
    plain, tokens = small(), some_tokens()
    forgetful = Forgetful(small())
    forgetful.train()
    forgetful.model.eval()
    before, losses = states(forgetful), []
    for teacher in (plain, forgetful):
        model = narrow()
        losses.append(imitation_step(teacher)(model, adamw(model), tokens).item())
    assert losses[0] == losses[1]
    untouched(before, forgetful)
    assert all(p.grad is None for p in plain.parameters())


def test_no_steps_are_needed_to_imitate_oneself():
    model = small()
    for divergence in DIVERGENCES:
        loss = imitation_step(small(), divergence=divergence)(model, adamw(model), some_tokens())
        assert loss.item() == pytest.approx(0, abs=1e-12)
        model = small()


def test_in_turn_changes_steps_after_a_count():
    calls = []
    one, two = (lambda *_, name=name: calls.append(name) or torch.tensor(0.0) for name in "ab")
    train(narrow(), [some_tokens()] * 5, steps=5, step=in_turn(one, 2, two), progress=False)
    assert calls == ["a", "a", "b", "b", "b"]
    with pytest.raises(ValueError, match="count is 0"):
        in_turn(one, 0, two)


def test_a_remembering_teacher_reads_each_window_once_and_says_the_same():
    rows = []

    class Counting(Forgetful):
        def forward(self, tokens):
            rows.append(len(tokens))
            return super().forward(tokens)

    teacher = Remembering(Counting(small()).train())
    batches = [some_tokens(3, 9), some_tokens(3, 9)[[2, 0]], some_tokens(4, 9)]
    for batch in batches:
        one, two = narrow(), narrow()
        loss = imitation_step(teacher)(one, adamw(one), batch)
        plain = imitation_step(small())(two, adamw(two), batch)
        assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    shared = (batches[0][None] == batches[2][:, None]).all(-1).any(1).sum().item()
    assert rows == [3] + [4 - shared] * (shared < 4)
    assert not teacher(batches[0]).requires_grad and teacher.config == small().config


# --- the verb -----------------------------------------------------------------------------------


def windows(count=4):
    return [(some_tokens(2, 9) + index) % 50 for index in range(count)]


def test_distill_gives_a_new_model_the_same_each_time_and_leaves_the_old():
    teacher, student = small().eval(), narrow().train()
    before, state = states(teacher, student), torch.random.get_rng_state()
    options = {"steps": 3, "temperature": 2.0, "hard": 0.5, "rate": 1e-2, "progress": False}
    one, two = (distill(teacher, student, windows(), **options) for _ in range(2))
    untouched(before, teacher, student)
    assert torch.equal(state, torch.random.get_rng_state())
    pairs = [*zip(one.parameters(), two.parameters(), student.parameters(), strict=True)]
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs) and not one.training
    assert one.head.weight is one.embedding.weight


def test_distill_is_the_training_loop_with_an_imitation_step():
    teacher, student = small(), narrow()
    kept = {"steps": 3, "schedule": lambda step: 1 / (1 + step), "progress": False}
    found = distill(teacher, student, windows(), rate=1e-2, temperature=2.0, **kept)
    train(
        student,
        windows(),
        optimizer=adamw(student, 1e-2),
        step=imitation_step(teacher, temperature=2.0),
        **kept,
    )
    pairs = zip(found.parameters(), student.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_student_comes_closer_to_its_teacher():
    torch.manual_seed(0)
    teacher, student = small(), narrow()
    with torch.no_grad():
        teacher.head.weight *= 4  # surer of itself than at its start
    text = [some_tokens(4, 12)] * 60
    learned = distill(teacher, student, text, steps=60, rate=1e-2, progress=False)
    far = [forward_kl(m(text[0]), teacher(text[0])).mean().item() for m in (student, learned)]
    assert far[1] < far[0] / 2


def spoiled(model):
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[0, 0] = math.nan
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": narrow(vocab=60)}, "vocab of 50, the student of 60"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": -2.0}, "temperature is -2.0"),
        ({"hard": 1.5}, "hard is 1.5"),
        ({"hard": -0.1}, "hard is -0.1"),
        ({"hard": math.nan}, "hard is nan"),
        ({"hard": True}, "hard is True"),
        ({"batches": []}, "0 batches for 2 steps"),
        ({"batches": windows(1)}, "1 batches for 2 steps"),
        ({"steps": 0}, "steps is 0"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"student": spoiled(narrow())}, "student's blocks.1.mlp.up.weight"),
        ({"teacher": spoiled(small())}, "teacher's blocks.1.mlp.up.weight"),
        ({"batches": [torch.empty(0, 9, dtype=torch.int64)] * 2}, "at least one is needed"),
        ({"batches": [some_tokens(1, 40)] * 2}, "40 positions exceed the context of 32"),
        ({"batches": [some_tokens(1, 1)] * 2, "hard": 0.5}, "1 position"),
    ],
)
def test_bad_input_is_named_and_both_models_stay(changes, message):
    call = {"teacher": small(), "student": narrow(), "batches": windows(), "steps": 2} | changes
    models = call["teacher"], call["student"]
    plain = [m for m in models if m.blocks[1].mlp.up.weight.isfinite().all()]  # nan is not nan
    before = states(*plain)
    with pytest.raises(ValueError, match=message):
        distill(**call, progress=False)
    untouched(before, *plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": 0}, "temperature is 0"), ({"hard": 2}, "hard is 2")],
)
def test_a_step_refuses_bad_options_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        imitation_step(small(), **options)


def test_a_step_refuses_another_vocabulary_and_changes_nothing():
    teacher, model = small(), narrow(vocab=60)
    before = states(teacher, model)
    with pytest.raises(ValueError, match=r"\(2, 9, 60\) and teacher \(2, 9, 50\)"):
        imitation_step(teacher)(model, adamw(model), some_tokens())
    untouched(before, teacher, model)


# --- the students -------------------------------------------------------------------------------


def test_students_are_a_quarter_and_a_tenth_of_tiny():
    teacher = tiny()
    for shape, share in ((QUARTER, 1 / 4), (TENTH, 1 / 10)):
        student = new_student(teacher, shape, seed=1)
        ratio = unique_parameters(student) / unique_parameters(teacher)
        assert ratio == pytest.approx(share, rel=0.02)
        assert (student.config.vocab, student.config.context) == (1024, 512)


def test_a_new_student_depends_on_its_seed_alone():
    state = torch.random.get_rng_state()
    one, same, other = (new_student(small(), {"layers": 1}, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.embedding.weight, same.embedding.weight)
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="is no integer"):
        new_student(small(), {"heads": 3})

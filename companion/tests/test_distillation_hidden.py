"""Hidden states: what hooks catch, what the projections learn, what is left alone."""

import pytest
import torch

from companion.distillation import distill, hidden_step, imitation_step
from companion.distillation.hidden import spread, state_distance, watching
from companion.surgery import copied
from companion.tests.test_distillation import narrow, spoiled, states, untouched
from companion.tests.test_model import small, some_tokens
from companion.training import adamw, train


def test_pairs_are_spread_evenly_and_end_with_the_last():
    assert spread(5, 6) == [(0, 0), (1, 1), (2, 3), (3, 4), (4, 5)]
    assert spread(4, 6) == [(0, 1), (1, 2), (2, 3), (3, 5)]
    assert spread(2, 2) == [(0, 0), (1, 1)]
    assert spread(1, 30) == [(0, 29)]
    assert spread(3, 1) == [(0, 0), (1, 0), (2, 0)]


def test_watching_catches_what_the_blocks_give_and_leaves_no_hook():
    model, tokens = small(), some_tokens()
    with watching(model, [1, 0, 1]) as found:
        logits = model(tokens)
    assert torch.equal(model.head(model.norm(found[1])), logits) and set(found) == {0, 1}
    model(tokens[:, :3])
    assert found[1].shape[1] == 9 and not any(b._forward_hooks for b in model.blocks)
    with pytest.raises(ValueError), watching(model, [0]):
        model(tokens + 50)
    assert not model.blocks[0]._forward_hooks


def test_the_distance_is_a_share_of_the_teachers_square():
    aim = torch.tensor([3.0, 4.0])
    assert state_distance(aim, aim) == 0
    assert state_distance(torch.zeros(2), aim) == 1
    assert state_distance(torch.tensor([3.0, 9.0]), aim).item() == pytest.approx(25 / 25)
    assert state_distance(10 * aim, 10 * torch.tensor([3.0, 9.0])) == pytest.approx(2500 / 9000)


def test_a_model_is_no_distance_from_itself_through_the_identity():
    model = small()
    step = hidden_step(small())
    step.prepare(model)
    with torch.no_grad():
        for projection in step.projections:
            projection.weight.copy_(torch.eye(32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert step(model, optimizer, some_tokens()).item() == pytest.approx(0, abs=1e-12)


def test_the_loss_is_imitation_and_weight_times_the_distance():
    teacher, model, tokens = small(), narrow(), some_tokens()
    step = hidden_step(teacher, pairs=[(0, 1)], weight=0.5, temperature=2.0, hard=0.3)
    step.prepare(model)
    with watching(teacher, [1]) as aims, watching(model, [0]) as found:
        teacher(tokens), model(tokens)
    (project,) = step.projections
    assert project.weight.shape == (32, 16)
    far = (found[0] @ project.weight.T - aims[1]).square().mean() / aims[1].square().mean()
    plain = imitation_step(teacher, temperature=2.0, hard=0.3)
    imitation = plain(copied(model), torch.optim.SGD(model.parameters(), lr=0.0), tokens)
    loss = step(model, adamw(model), tokens)
    assert loss.item() == pytest.approx((imitation + 0.5 * far).item(), rel=1e-12)


def test_the_projections_learn_and_bring_the_states_closer():
    teacher, tokens = small(), some_tokens(4, 12)
    step, before = hidden_step(teacher, weight=10.0), []
    student = narrow()
    step.prepare(student)

    def left():
        with watching(teacher, [0, 1]) as aims, watching(student, [0, 1]) as found:
            teacher(tokens), student(tokens)
        return step.distance(found, aims).item()

    before, starts = left(), [p.weight.clone() for p in step.projections]
    optimizer = adamw(student, 1e-2)
    train(student, [tokens] * 80, steps=80, optimizer=optimizer, step=step, progress=False)
    moved = zip(step.projections, starts, strict=True)
    assert left() < before / 3 and not any(torch.equal(p.weight, w) for p, w in moved)
    assert all(group["lr"] == 1e-2 for group in step._optimizer.param_groups)
    assert not any(b._forward_hooks for m in (teacher, student) for b in m.blocks)


def test_it_is_a_method_of_distill_and_depends_on_its_seed_alone():
    teacher, student = small(), narrow(layers=1)
    before, random = states(teacher, student), torch.random.get_rng_state()
    call = {"steps": 2, "method": hidden_step, "weight": 2.0, "progress": False}
    models = [
        distill(teacher, student, [some_tokens()] * 2, seed=seed, **call) for seed in (0, 0, 1)
    ]
    weights = [model.blocks[0].mlp.up.weight for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    untouched(before, teacher, student)
    assert torch.equal(random, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0}, "weight is 0"),
        ({"temperature": 0}, "temperature is 0"),
        ({"hard": 1.1}, "hard is 1.1"),
        ({"pairs": []}, "0 pairs"),
        ({"pairs": [(0, 2)]}, r"pair \(0, 2\) does not lie within 2 blocks \(student\) and 2"),
        ({"pairs": [(-1, 0)]}, r"pair \(-1, 0\)"),
        ({"teacher": spoiled(small())}, "teacher's blocks.1"),
    ],
)
def test_bad_options_are_named_and_the_models_stay(options, message):
    student = narrow()
    before = states(student)
    with pytest.raises(ValueError, match=message):
        distill(
            options.pop("teacher", small()),
            student,
            [some_tokens()],
            steps=1,
            method=hidden_step,
            progress=False,
            **options,
        )
    untouched(before, student)

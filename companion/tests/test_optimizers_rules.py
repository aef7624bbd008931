"""LAMB and Lion against steps computed by hand, and against torch's Adam where they agree."""

import math

import pytest
import torch
from torch import nn

from companion.optimizers import Lamb, Lion
from companion.optimizers.lamb import trust_ratio
from companion.tests.test_model import small
from companion.tests.test_training import batches
from companion.training import load_checkpoint, save_checkpoint, train


def parameter(*numbers) -> nn.Parameter:
    return nn.Parameter(torch.tensor(numbers, dtype=torch.float64))


def test_a_step_of_lamb_by_hand():
    """After one step Adam's update is a sign: [[1, -1]]; plus 0.5 [[3, 4]] that is [[2.5, 1]]."""
    weight = parameter([3.0, 4.0])
    weight.grad = torch.tensor([[7.0, -0.2]], dtype=torch.float64)
    Lamb([weight], 0.1, epsilon=1e-12, decay=0.5).step()
    trust = 5 / math.hypot(2.5, 1)  # |x| / |u|
    expected = [3 - 0.1 * trust * 2.5, 4 - 0.1 * trust * 1]
    assert weight[0].tolist() == pytest.approx(expected, rel=1e-9)
    moved = math.dist(expected, [3, 4])
    assert moved == pytest.approx(0.1 * 5)  # a tenth of its length, as the rate says


def test_two_steps_of_lamb_by_hand():
    weight, gradients = parameter([1.0]), (1.0, -3.0)
    optimizer = Lamb([weight], 0.1, betas=(0.9, 0.5), epsilon=1e-12, decay=0.0)
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    mean = (0.9 * 0.1 * 1 + 0.1 * -3) / (1 - 0.9**2)
    assert mean < 0  # so the second step goes up; its length is a tenth of the weight, 0.9
    assert weight.item() == pytest.approx(0.9 + 0.1 * 0.9)
    square = 0.5 * 0.5 * 1 + 0.5 * 9
    assert optimizer.state[weight]["square"].item() == pytest.approx(square)
    assert optimizer.state[weight]["step"].item() == 2


def test_lamb_goes_where_adam_goes_as_far_as_the_weights_are_long():
    """Against torch's Adam over five steps; vectors take Adam's step itself."""
    torch.manual_seed(0)
    for shape in ((6, 5), (7,)):
        ours = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        lamb = Lamb([ours], 0.03, betas=(0.9, 0.95), epsilon=1e-8, decay=0.0)
        theirs = nn.Parameter(torch.zeros_like(ours))
        adam = torch.optim.Adam([theirs], lr=1.0, betas=(0.9, 0.95), eps=1e-8)
        for _ in range(5):
            before, at = ours.detach().clone(), theirs.detach().clone()
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
            lamb.step(), adam.step()
            step, update = before - ours.detach(), at - theirs.detach()
            length = 1.0 if len(shape) == 1 else before.norm() / update.norm()
            torch.testing.assert_close(step, 0.03 * length * update, rtol=1e-9, atol=0)


def test_the_trust_ratio_is_one_where_there_is_no_length():
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    assert [trust_ratio(*pair).item() for pair in ((zero, one), (one, zero))] == [1, 1]
    assert trust_ratio(3 * one, one).item() == 3
    assert trust_ratio(torch.full((4,), 3.0), torch.ones(4)).item() == 1
    weight = nn.Parameter(torch.zeros(2, 2))  # and LAMB can leave a matrix of zeros
    weight.grad = torch.ones(2, 2)
    Lamb([weight], 0.1).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.1), rtol=1e-5, atol=0)


def test_three_steps_of_lion_by_hand():
    weight = parameter(1.0)
    optimizer = Lion([weight], 0.1, betas=(0.9, 0.75), decay=0.2)
    x, average = 1.0, 0.0
    for gradient, sign in ((2.0, 1), (-1.0, 1), (-100.0, -1)):
        # 0.9 average + 0.1 gradient: 0.2; 0.9 x 0.5 - 0.1; 0.9 x 0.125 - 10
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert math.copysign(1, 0.9 * average + 0.1 * gradient) == sign
        x -= 0.1 * (sign + 0.2 * x)
        average = 0.75 * average + 0.25 * gradient
        assert weight.item() == pytest.approx(x, rel=1e-12)
    assert optimizer.state[weight]["average"].item() == pytest.approx(average)


def test_lion_without_memory_is_the_sign_of_the_gradient():
    weight = parameter([1.0, 1.0, 1.0])
    weight.grad = torch.tensor([[5.0, -1e-9, 0.0]], dtype=torch.float64)
    Lion([weight], 0.1, betas=(0.0, 0.0), decay=0.0).step()
    assert weight.tolist() == [pytest.approx([0.9, 1.1, 1.0], abs=1e-15)]


@pytest.mark.parametrize("make", [Lamb, Lion])
def test_a_scale_of_the_gradients_changes_nothing(make):
    found = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        optimizer = make([weight], 0.01)
        for _ in range(4):
            weight.grad = scale * torch.randn_like(weight)
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)  # LAMB's epsilon is all that remains


@pytest.mark.parametrize("make", [Lamb, Lion])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(make, tmp_path):
    whole = small()
    train(whole, batches(), steps=6, optimizer=make(whole.parameters(), 1e-3), progress=False)
    part, again = small(), small()
    optimizer, path = make(part.parameters(), 1e-3), tmp_path / "x.safetensors"
    train(part, batches(), steps=3, optimizer=optimizer, progress=False)
    save_checkpoint(path, part, optimizer, step=3)
    optimizer = make(again.parameters(), 1e-3)
    load_checkpoint(path, again, optimizer)
    train(again, batches(), steps=6, start=3, optimizer=optimizer, progress=False)
    pairs = zip(whole.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("make", [Lamb, Lion])
def test_what_has_no_gradient_stays(make):
    moved, left = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    moved.grad = torch.ones(2)
    optimizer = make([moved, left], 0.1)
    optimizer.step()
    assert left.tolist() == [1, 1] and moved.tolist() != [1, 1] and len(optimizer.state) == 1


@pytest.mark.parametrize(("make", "given", "message"), [
    (Lamb, {"rate": -1.0}, "rate is -1.0"), (Lion, {"rate": 0.0}, "rate is 0.0"),
    (Lamb, {"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
    (Lion, {"betas": (0.9,)}, r"betas are \(0.9,\)"),
    (Lamb, {"decay": -0.1}, "decay is -0.1"), (Lion, {"decay": math.nan}, "decay is nan"),
    (Lamb, {"epsilon": 0.0}, "epsilon is 0.0"),
])  # fmt: skip
def test_settings_without_a_meaning_are_refused(make, given, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(2))], **given)

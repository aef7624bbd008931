"""Live bytes of programs small enough to count by hand."""

import torch
from torch import nn

from companion.memory import LiveBytes, forward_peak_bytes, stored_bytes, unique_parameters
from companion.model import LanguageModel
from companion.tests.test_model import SMALL


def test_live_bytes_follow_each_storage():
    given = torch.zeros(1000)
    with LiveBytes() as live:
        a = given + 1  # 4000
        b = a * 2  # 8000
        view = b.view(10, 100)  # no storage of its own
        del a, b
        assert (live.now, live.peak) == (4000, 8000)
        given.add_(1)  # in place
        assert live.now == 4000
        del view
        assert (live.now, live.peak) == (0, 8000)
        for _ in range(5):
            kept = given + 1  # the new one is made before the old one goes
        assert (live.now, live.peak) == (kept.nbytes, 8000)


def test_backward_frees_what_forward_saved():
    weight = torch.ones(100, requires_grad=True)
    with LiveBytes() as live:
        loss = (weight * 2).exp().sum()
        held = live.now
        loss.backward()
    assert held == 400 + 4  # what exp saved, and the loss
    assert live.now == 400 + 4  # the gradient, and the loss


def test_a_tie_counts_once_and_a_mask_counts():
    model = LanguageModel(SMALL)
    assert stored_bytes(model) == 4 * unique_parameters(model)
    model.register_buffer("mask", torch.ones(10, dtype=torch.bool))
    assert stored_bytes(model) == 4 * unique_parameters(model) + 10
    assert stored_bytes(model.bfloat16()) == 2 * unique_parameters(model) + 10


def test_peak_of_a_forward_pass_is_weights_and_the_widest_moment():
    model = nn.Sequential(nn.Linear(10, 500, bias=False), nn.Linear(500, 1, bias=False))
    expected = stored_bytes(model) + 4 * (500 + 1)
    assert forward_peak_bytes(model, torch.zeros(1, 10)) == expected

"""8-bit states against torchao's AdamW8bit and FP32 AdamW, their bytes against the formula."""

import logging
import warnings

import pytest
import torch

from companion.precision.eight_bit import (
    LEVELS,
    EightBitAdamW,
    decoded,
    dynamic_levels,
    eight_bit_adamw,
    encoded,
    held_bytes,
    state_bytes,
)
from companion.tests.equalities import far, refusals, some_batches, weights
from companion.tests.test_model import small
from companion.training import adamw, load_checkpoint, save_checkpoint, train


@pytest.fixture(scope="module")
def torchao():
    """torchao's optimizers, their steps not compiled: that would take a compiler and a minute."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchao.optim")


def wide_numbers(count, seed=0):
    """Numbers that spread over many powers of ten, as gradients do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) * torch.exp(
        3 * torch.randn(count, generator=generator)
    )


@pytest.mark.parametrize("signed", [True, False])
def test_the_levels_are_torchaos(torchao, signed):
    theirs = torchao.quant_utils.create_dynamic_map(signed)
    ours = dynamic_levels(signed)
    assert ours.shape == (256,) and torch.equal(ours, torch.tensor(theirs))
    assert (ours == 0).sum() == 1 and ours.max() == 1


@pytest.mark.parametrize("format", LEVELS)
@pytest.mark.parametrize("signed", [True, False])
def test_each_number_gets_the_nearest_level(format, signed):
    numbers, levels = wide_numbers(1000), LEVELS[format](signed)
    numbers = numbers if signed else numbers.abs()
    codes, scales = encoded(numbers, levels, block=100)
    assert codes.dtype == torch.uint8 and scales.shape == (10,)
    assert torch.equal(scales, numbers.view(10, 100).abs().amax(1))
    found = decoded(codes, scales, levels, block=100)
    every = levels * scales[:, None]  # (10, 256): all that a block could become
    nearest = (numbers.view(10, 100, 1) - every[:, None]).abs().amin(-1)
    assert ((found - numbers).view(10, 100).abs() <= nearest + 1e-6 * scales[:, None]).all()


def test_a_ragged_block_and_a_block_of_zeros():
    numbers = torch.cat([torch.zeros(8), wide_numbers(5)])
    levels = dynamic_levels(True)
    codes, scales = encoded(numbers, levels, block=8)
    assert codes.shape == (13,) and scales.shape == (2,)
    found = decoded(codes, scales, levels, block=8)
    assert (found[:8] == 0).all() and (found[8:] - numbers[8:]).abs().max() < 0.04 * scales[1]


@pytest.mark.parametrize("block", [256, 2048])
def test_codes_are_torchaos_and_weights_agree(torchao, monkeypatch, block):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(9))
    options = {"betas": (0.9, 0.95)}
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine = EightBitAdamW([ours], 1e-2, decay=0.1, block=block, **options)
    other = torchao.AdamW8bit([theirs], 1e-2, weight_decay=0.1, block_size=block, **options)
    moved = torch.zeros_like(start)  # the way each weight went, to and fro
    for step in range(6):
        before = ours.detach().clone()
        ours.grad = wide_numbers(8192, seed=step + 1).view(64, 128)
        theirs.grad = ours.grad.clone()
        mine.step(), other.step()
        state, expected = mine.state[ours], other.state[theirs]
        for name, known in (("mean", "exp_avg"), ("square", "exp_avg_sq")):
            assert torch.equal(state[name], expected[known].codes)
            assert torch.equal(state[name + "_scales"], expected[known].scale)
        moved += (ours - before).abs()
    # they compute the corrections 1 - b^step in FP32, we in FP64: digits at the end of an update
    assert ((ours - theirs).abs() <= 1e-5 * moved + 1e-6 * (1 + ours.abs())).all()
    assert moved.median() > 1e-2


def test_a_training_stays_near_that_with_fp32_states():
    ends = {}
    for name, make in (("FP32", adamw), ("8 bits", eight_bit_adamw), ("other rate", adamw)):
        model = small().float()
        options = {"least": 0} if name == "8 bits" else {}
        optimizer = make(model, 1e-2 if name != "other rate" else 5e-3, **options)
        losses = train(model, some_batches() * 4, steps=20, optimizer=optimizer, progress=False)
        ends[name] = torch.tensor(losses), weights(model)
    drift = (ends["FP32"][0] - ends["8 bits"][0]).abs()
    assert drift[0] == 0 and 0 < drift.max() < 0.05  # nats of about 4
    assert drift.max() < 0.3 * (ends["FP32"][0] - ends["other rate"][0]).abs().max()


def test_bytes_are_those_predicted():
    for block, least in ((256, 4096), (100, 0), (2048, 512)):
        model = small().float()
        optimizer = eight_bit_adamw(model, block=block, least=least)
        train(model, some_batches(), steps=2, optimizer=optimizer, progress=False)
        sizes = [p.numel() for p in model.parameters()]
        assert held_bytes(optimizer) == state_bytes(sizes, block, least)
    assert state_bytes([2**20]) == 2 * 2**20 * (1 + 4 / 256)
    assert state_bytes([100]) == 800 and state_bytes([257], least=0) == 2 * (257 + 8)


def test_small_tensors_keep_fp32_averages():
    ours, theirs = small().float(), small().float()
    optimizer = eight_bit_adamw(ours, 1e-2, least=10**6)
    train(ours, some_batches(), steps=5, optimizer=optimizer, progress=False)
    train(theirs, some_batches(), steps=5, optimizer=adamw(theirs, 1e-2), progress=False)
    assert far(weights(ours), weights(theirs)) < 1e-5


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path):
    whole, part, again = (small().float() for _ in range(3))
    options = {"least": 0, "block": 100}
    optimizer = eight_bit_adamw(whole, **options)
    train(whole, some_batches(), steps=4, optimizer=optimizer, progress=False)
    optimizer, path = eight_bit_adamw(part, **options), tmp_path / "x.safetensors"
    train(part, some_batches(), steps=2, optimizer=optimizer, progress=False)
    save_checkpoint(path, part, optimizer, step=2)
    optimizer = eight_bit_adamw(again, **options)
    load_checkpoint(path, again, optimizer)
    assert {s["mean"].dtype for s in optimizer.state.values()} == {torch.uint8}
    train(again, some_batches(), steps=4, start=2, optimizer=optimizer, progress=False)
    assert far(weights(whole), weights(again)) == 0


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = small().float()
    optimizer = eight_bit_adamw(model, least=0)
    train(model, some_batches(), steps=1, optimizer=optimizer, progress=False)
    before = [t.clone() for s in optimizer.state.values() for t in s.values()], weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    parameter.grad[0] = torch.nan  # the last one: the others would have been updated by then
    (message,) = refusals([optimizer.step])
    assert "1 numbers" in message and "nothing was changed" in message
    after = [t for s in optimizer.state.values() for t in s.values()], weights(model)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert far(before[1], after[1]) == 0


def test_bad_input():
    model = small()
    found = refusals(
        [
            lambda: eight_bit_adamw(model, block=0),
            lambda: eight_bit_adamw(model, block=2.0),
            lambda: eight_bit_adamw(model, least=-1),
            lambda: eight_bit_adamw(model, format="int4"),
            lambda: eight_bit_adamw(model, rate=-1.0),
        ]
    )
    for message, words in zip(found, ("0", "2.0", "-1", "dynamic, linear", "-1.0"), strict=True):
        assert words in message

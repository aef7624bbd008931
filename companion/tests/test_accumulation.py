"""Accumulated microbatches against the large batch, and a training that stops in time."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from companion import cost, step_memory
from companion.accumulation import accumulate, accumulating_step, microbatches_of
from companion.model import LanguageModel, ModelConfig
from companion.tests.equalities import OPTIMIZERS, far, gradients, some_batches, weights
from companion.tests.test_model import small
from companion.training import adamw, plain_step, save_checkpoint, train

PAD, ROWS = 0, 8


def padded(steps=4):
    """Batches of rows with 2 to 9 tokens before the padding, very different from part to part."""
    batches = some_batches(ROWS, steps)
    for batch in batches:
        batch.clamp_(min=1)
        for row, tokens in enumerate(batch):
            tokens[2 + row :] = PAD
    return batches


def slow_loss(model, batch, ignored=-100):
    """The mean over all counted tokens, by torch, of the whole batch at once."""
    logits = model(batch)[:, :-1].flatten(0, 1)
    return cross_entropy(logits, batch[:, 1:].flatten(), ignore_index=ignored)


def slow_step(ignored):
    def step(model, optimizer, batch):
        loss = slow_loss(model, batch, ignored)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
@pytest.mark.parametrize(("batches", "ignored"), [(some_batches, None), (padded, PAD)])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_equals_the_large_batch(optimizer, batches, ignored, microbatches):
    ends = []
    for step in (slow_step(-100 if ignored is None else ignored),
                 accumulating_step(microbatches, ignored=ignored)):  # fmt: skip
        model = small()
        made, losses = OPTIMIZERS[optimizer](model), []
        losses = [step(model, made, batch).item() for batch in batches()]
        ends.append((losses, weights(model)))
    (expected, there), (losses, here) = ends
    assert losses == pytest.approx(expected, rel=0, abs=1e-12)
    assert far(here, there) < 1e-12


@pytest.mark.parametrize("ignored", [None, PAD])
def test_the_gradient_is_that_of_the_large_batch(ignored):
    one, other, batch = small(), small(), padded(1)[0]
    slow_loss(one, batch, -100 if ignored is None else ignored).backward()
    accumulate(other, batch, 4, ignored=ignored)
    assert far(gradients(one), gradients(other)) < 1e-12


def test_the_mean_of_means_is_another_gradient():
    """The test above can fail: what it guards against is far from the truth."""
    one, other, batch = small(), small(), padded(1)[0]
    accumulate(one, batch, 4, ignored=PAD)
    for part in microbatches_of(batch, 4):
        (slow_loss(other, part, PAD) / 4).backward()
    assert far(gradients(one), gradients(other)) > 1e-3


def test_without_parts_it_is_the_plain_step():
    one, other = small(), small()
    losses = train(one, some_batches(), steps=5, step=accumulating_step(1), progress=False)
    expected = train(other, some_batches(), steps=5, step=plain_step, progress=False)
    assert losses == pytest.approx(expected, abs=1e-12)
    assert far(weights(one), weights(other)) < 1e-12


def test_clips_once_and_last():
    """The length of the sum is 1; parts shortened one by one would add up to another direction."""
    model, seen = small(), []
    with torch.no_grad():
        model.head.weight.mul_(4)  # for a gradient longer than 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(model)))
    batch = padded(1)[0]
    accumulating_step(4, ignored=PAD)(model, optimizer, batch)
    slow_loss(model, batch, PAD).backward()
    length = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert length > 1.5
    expected = {name: gradient / length for name, gradient in gradients(model).items()}
    assert far(seen[0], expected) < 1e-6  # torch adds 1e-6 to the length


def test_another_loss_is_accumulated_too():
    one, other, batch = small(), small(), padded(1)[0]
    bent = lambda model, tokens: model(tokens)[:, :-1].square().mean(-1)  # noqa: E731
    total = accumulate(one, batch, 2, losses=bent, ignored=PAD)
    expected = bent(other, batch)[batch[:, 1:] != PAD].mean()
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), abs=1e-12)
    assert far(gradients(one), gradients(other)) < 1e-12


def test_an_infinite_loss_at_an_ignored_place_does_no_harm():
    model, batch = small(), padded(1)[0]

    def losses(model, tokens):
        each = model(tokens)[:, :-1].square().mean(-1)
        return torch.where(tokens[:, 1:] == PAD, each / 0, each)

    assert accumulate(model, batch, 2, losses=losses, ignored=PAD).isfinite()


def test_a_part_without_tokens_counts_nothing():
    batch = padded(1)[0]
    batch[:2, 1:] = PAD
    one, other = small(), small()
    slow_loss(one, batch, PAD).backward()
    loss = accumulate(other, batch, 4, ignored=PAD)
    assert loss.isfinite() and far(gradients(one), gradients(other)) < 1e-12


SHAPE = {"layers": 2, "heads": 2, "kv_heads": 1, "width": 32, "hidden": 64}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("microbatches", [1, 2, 8])
def test_memory_is_as_predicted(microbatches, tied):
    config = ModelConfig(vocab=60, context=16, tied=tied, **SHAPE)
    model, batch = LanguageModel(config), torch.randint(60, (8, 16))
    for optimizer, make in (("adamw", adamw), ("sgd", lambda m: torch.optim.SGD(m.parameters()))):
        found = step_memory.counted(model, make(model), accumulating_step(microbatches), batch)
        sizes = {"batch": 8, "microbatches": microbatches, "optimizer": optimizer}
        assert found == step_memory.predicted(config, 16, **sizes)
    assert found.total == sum([found.weights, found.gradients, found.states, found.kept])


def test_memory_falls_and_computing_stays():
    config = ModelConfig(vocab=60, context=16, **SHAPE)
    model, batch = LanguageModel(config), torch.randint(60, (8, 16))
    counts = []
    for microbatches in (1, 8):
        with FlopCounterMode(display=False) as counter:
            accumulating_step(microbatches)(model, adamw(model), batch)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    one, eight = (step_memory.predicted(config, 16, batch=8, microbatches=m) for m in (1, 8))
    assert one.kept / 8.2 < eight.kept < one.kept / 7.5
    assert one.kept == cost.activation_bytes(config, 16, batch=8)


def test_counting_needs_a_gradient():
    model, other = small(), small()
    with pytest.raises(ValueError, match="no weight of the optimizer"):
        step_memory.counted(model, adamw(other), accumulating_step(2), some_batches()[0])


def broken(at):
    """Losses that are NaN, or have an endless gradient, at the call number `at`, from 0."""
    calls = iter(range(1000))

    def losses(model, tokens):
        each = model(tokens)[:, :-1].square().mean(-1)
        return each * math.nan if next(calls) == at else each

    return losses


@pytest.mark.parametrize("saved", [False, True])
def test_stops_at_a_loss_that_is_no_number_and_changes_nothing(tmp_path, saved):
    model, path = small(), tmp_path / "good.safetensors"
    optimizer, states, kept = adamw(model, 0.25), [], []

    def after(index, loss):
        states.append(weights(model))
        if saved:
            save_checkpoint(path, model, optimizer, step=index + 1)
            kept.append(path.read_bytes())

    step = accumulating_step(2, losses=broken(at=7), checkpoint=path)  # step 3, second part
    with pytest.raises(FloatingPointError) as error:
        train(model, some_batches(), steps=5, optimizer=optimizer, step=step, after=after,
              schedule=lambda i: 1 / (i + 1), progress=False)  # fmt: skip
    text = str(error.value)
    assert "the loss is nan at step 3, rate 0.0625; weights and states are those after" in text
    assert "after step 2" in text
    assert (f"{path} holds those before step 3" if saved else "there is no checkpoint") in text
    assert far(weights(model), states[-1]) == 0 and len(states) == 3
    assert all(p.grad is None for p in model.parameters())
    assert not saved or path.read_bytes() == kept[-1]
    assert all(s["step"] == 3 for s in optimizer.state.values())


def test_stops_at_a_gradient_that_is_no_number():
    model, before = small(), weights(small())

    def losses(model, tokens):  # sqrt has the slope 1 / 0 at 0, and the chain makes it 0 x inf
        return (model(tokens)[:, :-1] * 0).square().sum(-1).sqrt()

    step = accumulating_step(2, losses=losses, start=40)
    with pytest.raises(FloatingPointError, match=r"length is nan at step 40, rate 0\.5"):
        step(model, torch.optim.SGD(model.parameters(), lr=0.5), some_batches()[0])
    assert far(weights(model), before) == 0


def test_a_damaged_checkpoint_does_not_hide_the_error(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"nothing of use")
    model = small()
    step = accumulating_step(1, losses=broken(at=0), checkpoint=path)
    with pytest.raises(FloatingPointError, match="is no checkpoint that can be read"):
        step(model, adamw(model), some_batches()[0])


def test_old_gradients_are_refused():
    model, batch = small(), some_batches()[0]
    slow_loss(model, batch).backward()
    with pytest.raises(ValueError, match="20 parameters still hold gradients"):
        accumulating_step(2)(model, adamw(model), batch)
    adamw(model).zero_grad(set_to_none=False)  # zeros are no harm
    accumulating_step(2)(model, adamw(model), batch)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accumulating_step(0), "microbatches is 0"),
        (lambda: accumulating_step(2.0), "microbatches is 2.0"),
        (lambda: accumulating_step(2, start=-1), "start is -1"),
        (lambda: accumulate(small(), some_batches()[0], 3), "8 rows do not divide into 3 equal"),
        (lambda: accumulate(small(), some_batches()[0], 16), "8 rows do not divide into 16"),
        (lambda: accumulate(small(), some_batches()[0][:0], 1), "0 rows"),
        (lambda: accumulate(small(), torch.zeros(2, 5).long(), 1, ignored=0), "0 of 8 tokens"),
        (lambda: step_memory.predicted(small().config, 9, batch=8, microbatches=3), "8 rows"),
        (lambda: step_memory.predicted(small().config, 9, batch=8, optimizer="best"), "'best'"),
    ],
)
def test_bad_input_names_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()

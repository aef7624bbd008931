"""Recomputed blocks against the plain model and against torch's own checkpointing."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from companion import cost, recomputation, step_memory
from companion.accumulation import accumulating_step
from companion.data import Batches
from companion.decoding import cache_for
from companion.hardware import best_device
from companion.kept import kept_bytes
from companion.losses import next_token_loss
from companion.model import LanguageModel, ModelConfig
from companion.recomputation import Recompute, recomputed
from companion.training import adamw, load_checkpoint, save_checkpoint, train

CONFIG = ModelConfig(vocab=60, context=16, layers=5, heads=4, kv_heads=2, width=32, hidden=48)
HERE = best_device()


@pytest.fixture(autouse=True)
def repeatable():
    """A GPU's fast attention adds up gradients in any order; equality needs one order."""
    with nullcontext() if HERE.type == "cpu" else sdpa_kernel(SDPBackend.MATH):
        yield


def model_of(**changes):
    torch.manual_seed(0)
    return LanguageModel(replace(CONFIG, **changes)).to(HERE)


def tokens_of(rows=4):
    random = torch.Generator().manual_seed(1)
    return torch.randint(60, (rows, 16), generator=random).to(HERE)


def gradients(model, tokens):
    loss = next_token_loss(model(tokens), tokens)
    return loss, torch.autograd.grad(loss, [*model.parameters()])


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_equals_the_plain_model_bit_for_bit(every, tied):
    model, tokens = model_of(tied=tied), tokens_of()
    (ours, slopes), (loss, expected) = (
        gradients(m, tokens) for m in (recomputed(model, every=every), model)
    )
    assert torch.equal(ours, loss) and same(slopes, expected)


def test_a_training_ends_at_the_same_weights():
    ends = []
    for change in (lambda model: model, lambda model: recomputed(model, every=2)):
        model = change(model_of())
        data = Batches(torch.arange(400) % 50, batch=4, context=16)
        losses = train(model, data, steps=5, step=accumulating_step(2), progress=False)
        ends.append((losses, [*model.parameters()]))
    assert ends[0][0] == ends[1][0] and same(ends[0][1], ends[1][1])


def test_equals_torchs_checkpoint_with_dropout():
    """The same random numbers are dropped again, and the next layer does not get them too."""
    layers = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 8)).to(HERE)
    weights, found = [*layers.parameters()], []
    ways = (
        lambda x: layers(x),
        lambda x: checkpoint(layers, x, use_reentrant=False),
        lambda x: Recompute.apply(layers, x, *weights),
    )
    for way in ways:
        torch.manual_seed(5)
        x = torch.arange(48.0, device=HERE).view(6, 8).requires_grad_()
        y = way(way(x))
        slopes = torch.autograd.grad(y.square().sum(), [x, *weights])
        found.append([y, *slopes, torch.rand(3)])
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_equals_the_plain_model_under_autocast():
    model, tokens = model_of(), tokens_of()
    found = []
    for each in (model, recomputed(model, every=2)):
        with torch.autocast(HERE.type, torch.bfloat16):
            loss = next_token_loss(each(tokens), tokens)
        found.append([loss, *torch.autograd.grad(loss, [*each.parameters()])])  # outside of it
    assert same(*found)
    assert not torch.equal(found[0][0], next_token_loss(model(tokens), tokens))


def test_frozen_weights_get_no_gradient():
    model, tokens = model_of(), tokens_of()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("blocks.3.mlp" in name or "blocks.1.attention.out" in name)
    twin = recomputed(model, every=2)
    for each in (model, twin):
        next_token_loss(each(tokens), tokens).backward()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


def test_a_block_that_stands_twice_gets_both_gradients():
    model, tokens = model_of(), tokens_of()
    model.blocks[3] = model.blocks[1]
    twin = recomputed(model, every=4)
    assert twin.blocks[3] is twin.blocks[1]
    assert same(gradients(twin, tokens)[1], gradients(model, tokens)[1])


def test_weights_changed_before_the_backward_pass_are_noticed():
    twin, tokens = recomputed(model_of()), tokens_of()
    loss = next_token_loss(twin(tokens), tokens)
    with torch.no_grad():
        twin.blocks[0].mlp.up.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_decodes_with_a_cache_and_leaves_the_model_alone():
    model, tokens = model_of(), tokens_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = recomputed(model, every=2)
    cache = cache_for(twin, batch=4)
    parts = [twin(tokens[:, :7], cache), twin(tokens[:, 7:], cache)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        assert torch.equal(twin(tokens), model(tokens))
    gradients(twin, tokens)
    assert type(model) is LanguageModel and not hasattr(model, "every")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_checkpoints_fit_both(tmp_path):
    model, twin = model_of(), recomputed(model_of(), every=2)
    with torch.no_grad():
        twin.norm.weight.mul_(3)
    path = save_checkpoint(tmp_path / "x.safetensors", twin, adamw(twin), step=0)
    load_checkpoint(path, model, adamw(model))
    assert torch.equal(model.norm.weight, twin.norm.weight)
    again = recomputed(twin, every=5)
    assert again.every == 5 and twin.every == 2


on_a_cpu = pytest.mark.skipif(HERE.type != "cpu", reason="the bytes are those of a CPU")


@on_a_cpu
@pytest.mark.parametrize("vocab", [60, 2000])
@pytest.mark.parametrize(("rows", "microbatches"), [(1, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("every", [1, 2, 3, 4, 5])
def test_memory_is_as_predicted(every, rows, microbatches, vocab):
    model = model_of(vocab=vocab)
    twin = recomputed(model, every=every)
    step = accumulating_step(microbatches)
    found = step_memory.counted(twin, adamw(twin), step, tokens_of(rows))
    sizes = {"batch": rows, "microbatches": microbatches, "every": every}
    assert found == step_memory.predicted(model.config, 16, **sizes)


@on_a_cpu
def test_memory_with_the_other_attention_and_fewer_bits():
    twin, tokens = recomputed(model_of(), every=2), tokens_of()
    with step_memory.KeptNow(twin) as kept, sdpa_kernel(SDPBackend.MATH):
        next_token_loss(twin(tokens), tokens).backward()
    assert kept.peak == recomputation.kept_bytes(CONFIG, 16, batch=4, every=2, attention="math")
    twin = twin.to(torch.bfloat16)
    with step_memory.KeptNow(twin) as kept:
        next_token_loss(twin(tokens), tokens).backward()
    assert kept.peak == recomputation.kept_bytes(CONFIG, 16, batch=4, every=2, bytes_per_number=2)


@on_a_cpu
def test_the_two_counters_agree_on_a_plain_step():
    model, tokens = model_of(), tokens_of()
    with step_memory.KeptNow(model) as kept:
        loss = next_token_loss(model(tokens), tokens)
        held = kept.now
        loss.backward()
    assert held == kept.peak == kept_bytes(model, lambda: next_token_loss(model(tokens), tokens))
    del loss
    assert kept.now == 0


@pytest.mark.parametrize("every", [1, 2, 5])
def test_flops_are_as_predicted(every):
    twin, tokens = recomputed(model_of(), every=every), tokens_of()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        next_token_loss(twin(tokens), tokens).backward()
    assert counter.get_total_flops() == recomputation.training_flops(CONFIG, 16, batch=4)
    assert step_memory.flops(CONFIG, 16, batch=4, every=every) == counter.get_total_flops()
    assert step_memory.flops(CONFIG, 16, batch=4) == cost.training_flops(CONFIG, 16, batch=4)


class Other(LanguageModel):
    def forward(self, tokens, cache=None):
        return super().forward(tokens, cache) * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recomputed(model_of(), every=0), "every is 0"),
        (lambda: recomputed(model_of(), every=1.5), "every is 1.5"),
        (lambda: recomputed(model_of(), every=6), "every is 6; the model has 5 blocks"),
        (lambda: recomputed(Other(CONFIG)), "Other has a forward pass of its own"),
        (lambda: recomputed(nn.Linear(2, 2)), "Linear has a forward pass of its own"),
        (lambda: recomputation.kept_bytes(CONFIG, 16, every=6), "every is 6"),
        (lambda: recomputation.kept_bytes(CONFIG, 17, every=2), "17 positions exceed"),
    ],
)
def test_bad_input_names_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()

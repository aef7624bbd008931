"""Mixed precision against torch.autocast, its two forms against each other, and how it stops."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from companion.data import Batches
from companion.hardware import best_device
from companion.losses import next_token_loss
from companion.model import LanguageModel, ModelConfig
from companion.precision import mixed as mixed_module
from companion.precision.masters import Masters, masters_step
from companion.precision.mixed import mixed_precision, mixed_step, supported
from companion.precision.policy import Policy
from companion.precision.scaling import LossScale, static
from companion.surgery import copied
from companion.training import adamw, load_checkpoint, plain_step, save_checkpoint, train

SHAPE = {"layers": 2, "heads": 4, "kv_heads": 2, "width": 32, "hidden": 64}
HERE = best_device()


@pytest.fixture(autouse=True)
def repeatable():
    """A GPU's fast attention adds up gradients in any order; equality needs one order."""
    with nullcontext() if HERE.type == "cpu" else sdpa_kernel(SDPBackend.MATH):
        yield


def small(tied=True):
    torch.manual_seed(0)
    config = ModelConfig(vocab=50, context=16, tied=tied, **SHAPE)
    return LanguageModel(config).to(HERE)


def batches():
    return Batches(torch.arange(400) % 50, batch=3, context=12)


def same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("tied", [True, False])
def test_equals_autocast_bit_for_bit(tied):
    model, tokens = small(tied), batches()[0].to(HERE)
    mixed = mixed_precision(model)
    with torch.autocast(HERE.type, torch.bfloat16):
        logits = model(tokens)
        expected = next_token_loss(logits, tokens)
    ours = mixed(tokens)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, logits)
    loss = next_token_loss(ours, tokens)
    assert torch.equal(loss, expected)
    for a, b in zip(gradients(mixed, loss), gradients(model, expected), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    assert not torch.equal(model(tokens), logits.float())


def test_equals_autocast_on_layers_with_a_bias():
    model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.LayerNorm(30), nn.Linear(30, 5)).to(HERE)
    x = torch.randn(7, 20, device=HERE)
    ours, labels = mixed_precision(model)(x), torch.arange(7, device=HERE) % 5
    with torch.autocast(HERE.type, torch.bfloat16):
        halves = model[1](model[0](x))
    with torch.autocast(HERE.type, torch.bfloat16):  # autocast on a CPU leaves this norm in BF16
        expected = model[3](model[2](halves.float()))
    assert torch.equal(ours, expected)
    assert F.cross_entropy(ours.float(), labels).isfinite()


def test_trains_as_autocast_and_gradscaler_do():
    model, data = small(), batches()
    mixed, scale = mixed_precision(model), LossScale(interval=4)
    losses = train(mixed, data, steps=10, step=mixed_step(scale), progress=False)
    model.train()
    optimizer, expected = adamw(model), []
    scaler = torch.amp.GradScaler(HERE.type, growth_interval=4)
    for step in range(10):
        batch = data[step].to(HERE)
        with torch.autocast(HERE.type, torch.bfloat16):
            loss = next_token_loss(model(batch), batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == expected and same(mixed, model) and scale.value == scaler.get_scale()


def test_without_a_scale_the_step_is_the_plain_step():
    one, other = small(), small()
    losses = train(one, batches(), steps=5, step=mixed_step(), progress=False)
    expected = train(other, batches(), steps=5, step=plain_step, progress=False)
    assert losses == expected and same(one, other)


def test_a_scale_of_a_power_of_two_changes_nothing_in_fp32():
    one, other = small(), small()
    losses = train(one, batches(), steps=5, step=mixed_step(static(2.0**10)), progress=False)
    assert losses == train(other, batches(), steps=5, progress=False) and same(one, other)


def test_clips_after_unscaling():
    model = small()
    scale, seen = static(2.0**10), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    look = lambda *_: seen.append(  # noqa: E731
        torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    )
    optimizer.register_step_pre_hook(look)
    batch = batches()[0].to(HERE)
    next_token_loss(model(batch), batch).backward()
    length = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    optimizer.zero_grad()
    mixed_step(scale)(model, optimizer, batch)
    assert seen[0] == pytest.approx(min(1.0, length), rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scale", [None, 2.0**8])
def test_the_textbook_form_gives_the_same_numbers(tied, scale):
    model = small(tied)
    one, two = mixed_precision(model), Masters(model)
    steps = [mixed_step(scale and static(scale)), masters_step(two, scale and static(scale))]
    losses = train(one, batches(), steps=6, step=steps[0], progress=False)
    optimizer = adamw(two.high)
    again = train(two.low, batches(), steps=6, step=steps[1], optimizer=optimizer, progress=False)
    assert losses == again and same(one, two.high)
    matrices = [m.weight for m in two.low.modules() if isinstance(m, nn.Linear)]
    assert all(weight.dtype == torch.bfloat16 for weight in matrices)
    assert torch.equal(two.low.blocks[0].mlp.up.weight, one.blocks[0].mlp.up.weight.bfloat16())


def test_what_stays_in_fp32():
    low = torch.randn(4, 8, device=HERE).bfloat16()
    with Policy(torch.bfloat16):
        assert (low @ low.T).dtype == torch.bfloat16
        assert F.linear(low.float(), low.float()).dtype == torch.bfloat16
        assert F.silu(low).dtype == torch.bfloat16
        for wide in (F.softmax(low, -1), F.rms_norm(low, (8,)), low.sum(), low.exp()):
            assert wide.dtype == torch.float32
        assert (low + low.float()).dtype == torch.float32
        assert (low.double() @ low.double().T).dtype == torch.float64
    assert F.linear(low.float(), low.float()).dtype == torch.float32  # and nothing after it


def test_the_model_given_is_not_changed_and_copies_work():
    model, tokens = small(), batches()[0].to(HERE)
    before, plain = copied(model), model(tokens)
    mixed = mixed_precision(model)
    train(mixed, batches(), steps=1, step=mixed_step(), progress=False)
    assert same(model, before) and torch.equal(model(tokens), plain)
    assert mixed.state_dict().keys() == model.state_dict().keys()
    twin = copied(mixed)
    assert torch.equal(twin(tokens), mixed(tokens))
    train(twin, batches(), steps=1, step=mixed_step(), progress=False)
    assert not same(twin, mixed) and not torch.equal(twin(tokens), mixed(tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, None])
def test_a_type_without_arithmetic_is_refused(dtype):
    with pytest.raises(ValueError, match=rf"{dtype} is not supported.*bfloat16.*emulated"):
        mixed_precision(small(), dtype)


def test_fp16_needs_units_on_a_cpu(monkeypatch):
    monkeypatch.setattr(mixed_module, "cpu_features", lambda: {"avx2": True})
    assert supported("cpu") == (torch.bfloat16,)
    with pytest.raises(ValueError, match=r"float16 is not supported on cpu.*supported: bfloat16"):
        mixed_precision(small().cpu(), torch.float16)
    monkeypatch.setattr(mixed_module, "cpu_features", lambda: {"amx_fp16": True})
    assert mixed_precision(small().cpu(), torch.float16).policy.dtype == torch.float16


def test_masters_must_be_fp32():
    with pytest.raises(ValueError, match=r"embedding.weight is torch.bfloat16; master weights"):
        mixed_precision(small().bfloat16())


class Poisoned:
    """Turns a model's logits, or the gradient of its head, into what is not finite at one step."""

    def __init__(self, model, *, at, what, value=math.nan):
        self.step, self.at, self.what, self.value = 0, at, what, value
        model.head.register_forward_hook(self)

    def __call__(self, module, inputs, output):
        now, self.step = self.step == self.at, self.step + 1
        if now and self.what == "loss":
            return output * self.value
        if now and self.what == "gradient":
            output.register_hook(lambda gradient: gradient * self.value)
        return output


def snapshot(model, optimizer):
    states = [value.clone() for state in optimizer.state.values() for value in state.values()]
    return [p.detach().clone() for p in model.parameters()] + states


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("scale", [None, LossScale, lambda: static(256.0)])
def test_a_loss_that_is_not_finite_stops_and_nothing_is_overwritten(tmp_path, scale, value):
    model, path = mixed_precision(small()), tmp_path / "kept.safetensors"
    Poisoned(model, at=4, what="loss", value=value)
    optimizer, kept = adamw(model), {}
    scale = scale and scale()

    def keep(step, loss):
        save_checkpoint(path, model, optimizer, step=step + 1)
        kept["file"], kept["numbers"] = path.read_bytes(), snapshot(model, optimizer)

    named = rf"at step 4.*{'no loss scale' if scale is None else f'loss scale {scale.value:g}'}"
    with pytest.raises(FloatingPointError, match=rf"{named}.*after step 3.*kept.*before step 4"):
        train(
            *(model, batches()), steps=9, optimizer=optimizer, after=keep, progress=False,
            step=mixed_step(scale, checkpoint=path),
        )  # fmt: skip
    assert path.read_bytes() == kept["file"]
    now = snapshot(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(now, kept["numbers"], strict=True))
    fresh = mixed_precision(small())
    assert load_checkpoint(path, fresh, adamw(fresh)).step == 4 and same(fresh, model)


def test_a_loss_that_is_not_finite_at_the_first_step():
    model = small()
    Poisoned(model, at=0, what="loss")
    with pytest.raises(FloatingPointError, match=r"at step 0.*those before the first"):
        train(model, batches(), steps=2, step=mixed_step(LossScale()), progress=False)
    assert same(model, small())


def test_a_damaged_checkpoint_does_not_hide_the_error(tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not a checkpoint")
    model = small()
    Poisoned(model, at=0, what="loss")
    with pytest.raises(FloatingPointError, match=r"loss is nan.*no checkpoint that can be read"):
        train(model, batches(), steps=2, step=mixed_step(checkpoint=path), progress=False)


def test_overflow_of_gradients_is_skipped_and_training_goes_on():
    model = mixed_precision(small())
    Poisoned(model, at=2, what="gradient", value=math.inf)
    optimizer, scale, kept = adamw(model), LossScale(1024.0), []
    train(
        *(model, batches()), steps=5, optimizer=optimizer, step=mixed_step(scale), progress=False,
        after=lambda *_: kept.append(snapshot(model, optimizer)),
    )  # fmt: skip
    assert (scale.value, scale.good, scale.skipped) == (512, 4, 1)
    assert all(torch.equal(a, b) for a, b in zip(kept[1], kept[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(kept[2], kept[3], strict=True))
    assert all(p.isfinite().all() for p in model.parameters())


def test_after_a_skip_the_error_names_the_last_step_that_counted():
    model = mixed_precision(small())
    Poisoned(model, at=2, what="gradient", value=math.inf)
    Poisoned(model, at=3, what="loss")
    with pytest.raises(FloatingPointError, match=r"step 3, loss scale 512.*after step 1"):
        train(model, batches(), steps=5, step=mixed_step(LossScale(1024.0)), progress=False)


def test_without_a_scale_gradients_that_are_not_finite_stop():
    model = mixed_precision(small())
    Poisoned(model, at=1, what="gradient", value=math.inf)
    with pytest.raises(
        FloatingPointError, match=r"gradients are not finite at step 1.*after step 0"
    ):
        train(model, batches(), steps=3, step=mixed_step(), progress=False)
    assert all(p.isfinite().all() for p in model.parameters())


def test_stops_when_every_step_is_skipped():
    model = small()
    model.head.register_forward_hook(
        lambda m, i, out: out.register_hook(lambda gradient: gradient * math.inf) and None
    )
    scale = LossScale(2.0**-8)
    with pytest.raises(FloatingPointError, match=r"all skipped; the loss scale is now 3.05176e-05"):
        train(model, batches(), steps=50, step=mixed_step(scale), progress=False)
    assert same(model, small()) and scale.skipped == 7


def test_a_resumed_training_goes_on_with_its_scale(tmp_path):
    whole, half = mixed_precision(small()), mixed_precision(small())
    scale, first = LossScale(16.0, interval=2), LossScale(16.0, interval=2)
    losses = train(whole, batches(), steps=6, step=mixed_step(scale), progress=False)
    optimizer = adamw(half)
    train(half, batches(), steps=3, optimizer=optimizer, step=mixed_step(first), progress=False)
    path = tmp_path / "half.safetensors"
    save_checkpoint(path, half, optimizer, step=3, about=first.state_dict())
    again, second = mixed_precision(small()), LossScale(interval=2)
    optimizer = adamw(again)
    found = load_checkpoint(path, again, optimizer)
    second.load_state_dict(found.about)
    options = {"optimizer": optimizer, "step": mixed_step(second), "progress": False}
    rest = train(again, batches(), steps=6, start=found.step, **options)
    assert rest == losses[3:] and same(again, whole)
    assert second.state_dict() == scale.state_dict()

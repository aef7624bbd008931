"""The study of formats: each way is what it says, starts alike, and counts what it lost."""

import math

import pytest
import torch
from torch import nn

from companion.data import documents, passage
from companion.losses import next_token_loss
from companion.precision.emulation import emulated
from companion.precision.float8 import Float8Linear
from companion.precision.pure import pure
from companion.studies import convergence as study
from companion.studies import size
from companion.studies.study import _check_results
from companion.tokenization import train_tokenizer
from companion.training import adamw, cosine, train

TINIER = {"layers": 1, "heads": 2, "kv_heads": 1, "width": 16, "hidden": 24}
STEPS = 8


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The study cut down: little text, a tokenizer learned on the spot, few steps."""
    text = "\n\n".join(list(documents("prose", "train").values())[:8])
    tokenizer = train_tokenizer([text], 300)
    values = {
        **{"SHAPE": TINIER, "STEPS": STEPS, "WARMUP": 2, "EARLY": 3, "PROBES": (2, 8)},
        **{"JUDGED": 300, "GLANCE": 200},
        "training_text": lambda: text,
        "tiny_tokenizer": lambda: tokenizer,
        "validation": lambda _, kind, characters: passage(text[:characters], tokenizer, window=31),
    }
    for name, value in values.items():
        monkeypatch.setattr(study, name, value)
    for module in (study, size):
        monkeypatch.setattr(module, "CONTEXT", 32)
    study.batch.cache_clear()
    yield
    study.batch.cache_clear()


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().float()


def advanced(name, steps=STEPS, seed=1):
    way = study.new_way(seed, name)
    losses = study._advance(way, seed, 0, steps, lambda step, loss: None)
    return way, losses


@pytest.mark.parametrize("name", study.WAYS)
def test_each_way_gives_a_whole_point_and_repeats(name):
    random = torch.get_rng_state()
    found = study.STUDY.point(seed=1, **study.STUDY.settings[name])
    assert torch.equal(random, torch.get_rng_state())
    _check_results(found)
    assert found["done"] == STEPS and len(found["losses"]) == 1
    assert found["losses"][0] == pytest.approx(math.log(300), abs=1.5)
    assert found["skipped"] == 0 and 0 <= found["underflowed"] < 0.2
    assert study.early(seed=1, way=name) == {"early": found["early"]}
    assert study.early(seed=2, way=name) != {"early": found["early"]}
    assert found["early"] != found["nats"] and 0 < found["nats"] < 8


def test_fp32_is_plain_training():
    model = study.new_model(1)
    how = {"optimizer": adamw(model, study.RATE), "progress": False}
    schedule = cosine(STEPS, warmup=2, floor=study.FLOOR)
    batches = [study.batch(1, step) for step in range(STEPS)]
    losses = train(model, batches, steps=STEPS, schedule=schedule, **how)
    way, found = advanced("FP32")
    assert found == losses and torch.equal(flat(model), flat(way.model))


def test_all_ways_start_from_the_same_weights():
    start = flat(study.new_model(3))
    for name in study.WAYS:
        weights = flat(study.new_way(3, name).model)
        near = 2**-8 if name.startswith("pure") else 2**-20
        assert torch.allclose(weights, start, rtol=near, atol=0)
        assert torch.equal(weights, start) == (name != "FP32, nudged" and "pure" not in name)


def test_the_formats_are_what_the_names_say():
    logits = {name: advanced(name, 1)[0].model(study.batch(1, 0)) for name in study.WAYS}
    for name, dtype in {
        "BF16 mixed": torch.bfloat16,
        "FP16 mixed, unscaled": torch.float16,
        "FP16 mixed, dynamic scale": torch.float16,
        "pure BF16, nearest": torch.bfloat16,
    }.items():
        seen = logits[name].float()
        assert torch.equal(seen, seen.to(dtype).float())
    assert not torch.equal(logits["FP32"], logits["FP32"].half().float())
    for name in study.WAYS:
        way, _ = advanced(name, 2)
        low = name.startswith("pure")
        kinds = {p.dtype for p in way.model.parameters()}
        kinds |= {s[k].dtype for s in way.optimizer.state.values() for k in s if k != "step"}
        assert kinds == {torch.bfloat16 if low else torch.float32}
        there = any(isinstance(module, Float8Linear) for module in way.model.modules())
        assert there == (name == "FP8 mixed")
    stochastic = [advanced(f"pure BF16, {kind}", 4)[0] for kind in ("nearest", "stochastic")]
    assert not torch.equal(*(flat(way.model) for way in stochastic))
    assert [way.optimizer.stochastic for way in stochastic] == [False, True]


def test_scales_are_as_said():
    scales = {name: study.new_way(0, name).scale for name in study.WAYS}
    assert {name for name, scale in scales.items() if scale is not None} == {
        "FP16 mixed, static scale",
        "FP16 mixed, dynamic scale",
    }
    scale = scales["FP16 mixed, static scale"]
    scale.update(finite=False)
    assert scale.value == study.SCALE and scale.skipped == 1
    scales["FP16 mixed, dynamic scale"].update(finite=False)
    assert scales["FP16 mixed, dynamic scale"].value == 2.0**15


def test_fp32_units_give_what_bf16_products_give():
    """The same loss and gradients as native BF16, within what the order of a sum changes."""
    model, tokens = pure(study.new_model(0)), study.batch(0, 0)
    fast = study.within(model, study.FP32Units())
    exact = study.plain_copy(model)
    gradients = []
    for each in (exact, model, fast):
        next_token_loss(each(tokens), tokens).backward()
        gradients.append(torch.cat([p.grad.flatten().float() for p in each.parameters()]))
    errors = [((g - gradients[0]).norm() / gradients[0].norm()).item() for g in gradients[1:]]
    assert errors[1] == pytest.approx(errors[0], rel=0.2) and errors[0] > 1e-3
    assert (gradients[1] - gradients[2]).norm() < errors[0] * gradients[0].norm()


def test_underflow_is_counted_against_fp32():
    """By hand: gradients of the loss divided by 2^12, in FP16 with and without a scale."""
    tokens = study.batch(0, 0)
    way = study.new_way(0, "FP16 mixed, unscaled")
    plain, low = study.new_model(0), emulated(study.new_model(0), "FP16")
    for model in (plain, low):
        next_token_loss(model(tokens), tokens).backward()
    pairs = zip(plain.parameters(), low.parameters(), strict=True)
    lost = sum(int(((q.grad == 0) & (p.grad != 0)).sum()) for p, q in pairs)
    there = sum(int((p.grad != 0).sum()) for p in plain.parameters())
    assert study.underflowed(way, tokens) == lost / there
    tiny = study.Way(way.model, way.optimizer, way.step, study.static(2.0**-12))
    large = study.Way(way.model, way.optimizer, way.step, study.static(2.0**10))
    shares = [study.underflowed(each, tokens) for each in (tiny, way, large)]
    assert shares[0] > 0.1 and shares[0] > shares[1] >= shares[2]
    assert study.underflowed(study.new_way(0, "FP32"), tokens) == 0
    assert all(p.grad is None for p in way.model.parameters())  # a look changes nothing


def test_a_training_that_breaks_off_is_a_result(monkeypatch):
    def breaks(model, optimizer, batch):
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        return torch.tensor(math.nan)

    make = study.WAYS["FP32"]
    wrong = {"FP32": lambda model, seed: study.Way(model, make(model, seed).optimizer, breaks)}
    monkeypatch.setattr(study, "WAYS", wrong)
    found = study.run(seed=1, way="FP32")
    assert found["done"] == 0 and found["nats"] == pytest.approx(math.log(300))
    assert found["underflowed"] == 1 and found["losses"] == []


def test_batches_are_the_same_for_every_way():
    batch = study.batch(0, 3).clone()
    study.batch.cache_clear()
    assert batch.shape == (4, 32) and torch.equal(batch, study.batch(0, 3))
    assert len({tuple(row) for step in (2, 3) for row in study.batch(0, step).tolist()}) == 8
    assert not torch.equal(batch, study.batch(1, 3))


def test_what_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="way is 'FP4'; known are: FP32, "):
        study.run(seed=0, way="FP4")
    with pytest.raises(ValueError, match="seed is -1"):
        study.new_way(-1, "FP32")

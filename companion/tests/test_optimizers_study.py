"""The studies of optimizers and schedules, cut down: equal tokens, tuned rates, whole points."""

import math

import pytest
import torch
from torch import nn

from companion.data import documents, passage
from companion.optimizers import OPTIMIZERS, make_optimizer
from companion.schedules import SCHEDULES
from companion.studies import convergence, schedules, size
from companion.studies import optimizers as study
from companion.studies.study import _check_results
from companion.tokenization import train_tokenizer
from companion.training import cosine, train

TINIER = {"layers": 1, "heads": 2, "kv_heads": 1, "width": 16, "hidden": 24}
WINDOWS = 64


@pytest.fixture(scope="module")
def text():
    return "\n\n".join(list(documents("prose", "train").values())[:8])


@pytest.fixture(scope="module")
def tokenizer(text):
    return train_tokenizer([text], 300)


@pytest.fixture(autouse=True)
def quick(monkeypatch, text, tokenizer):
    """The studies cut down: little text, a tokenizer learned on the spot, few windows."""

    def held_out(_, kind, characters):
        return passage(text[:characters], tokenizer, window=31)

    for module in (convergence, study):
        monkeypatch.setattr(module, "training_text", lambda: text)
        monkeypatch.setattr(module, "tiny_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(convergence, "validation", held_out)
    monkeypatch.setattr(convergence, "SHAPE", TINIER)
    for name, value in {"WINDOWS": WINDOWS, "JUDGED": 300, "GLANCE": 200, "LOOKS": 2}.items():
        monkeypatch.setattr(study, name, value)
    for name, value in {"STEPS": WINDOWS // 4, "WINDOWS": WINDOWS}.items():
        monkeypatch.setattr(schedules, name, value)
    for module in (convergence, size):
        monkeypatch.setattr(module, "CONTEXT", 32)
    caches = study.pair, study.tuned, schedules.tuned
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_every_optimizer_is_in_it_with_both_batches():
    assert set(study.STARTS) == set(OPTIMIZERS) and set(schedules.STARTS) == set(SCHEDULES)
    assert len(study.STUDY.settings) == 2 * len(OPTIMIZERS) and 0 not in study.STUDY.seeds
    assert set(study.STUDY.settings["LAMB, large"].values()) == {"LAMB", "large"}


@pytest.mark.parametrize(
    ("module", "setting"),
    [(study, "AdamW, small"), (study, "Lion, large"), (schedules, "warmup-stable-decay")],
)
def test_a_point_is_whole_repeats_and_is_tuned(module, setting):
    random = torch.get_rng_state()
    options = module.STUDY.settings[setting]
    found = module.STUDY.point(seed=1, **options)
    assert torch.equal(random, torch.get_rng_state())
    _check_results(found)
    assert found["rate"] in found["rates"][1:-1] and found["rates"] == sorted(found["rates"])
    assert min(found["scores"]) == found["scores"][found["rates"].index(found["rate"])]
    assert len(found["curve"]) == 2 and found["early"] == found["curve"][0] != found["nats"]
    plan = module.plan_of(**options)
    assert found["nats"] == convergence.nats(study.trained(plan, 1, found["rate"]), 300)
    assert found["rate"] != plan.start  # or the line above would not tell the two apart
    assert module.STUDY.point(seed=1, **options) == found
    other = module.STUDY.point(seed=2, **options)
    assert other["nats"] != found["nats"] and other["scores"] == found["scores"]


def test_a_training_is_the_plain_one_of_a_seed():
    plan = study.plan_of("RMSProp", "small")
    theirs, steps = convergence.new_model(3), WINDOWS // 4
    batches = [study.Steps(3, 4)[step] for step in range(steps)]
    how = {"optimizer": make_optimizer("RMSProp", theirs, 0.01), "progress": False}
    train(theirs, batches, steps=steps, schedule=cosine(steps, warmup=1, floor=0.01), **how)
    assert torch.equal(flat(study.trained(plan, 3, 0.01)), flat(theirs))


def test_the_ladder_is_climbed_with_seed_0():
    found = study.tuned("Adam", "small")
    model = study.trained(study.plan_of("Adam", "small"), 0, found.rate)
    assert min(found.scores) == convergence.nats(model, 300) and found.inside


def test_both_batches_read_the_same_windows():
    small, large = study.Steps(1, 4), study.Steps(1, 32)
    assert small[0].shape == (4, 32) and large[0].shape == (32, 32)
    assert torch.equal(torch.cat([small[k] for k in range(8)]), large[0])
    assert len({tuple(row) for row in large[1].tolist()} & {*map(tuple, large[0].tolist())}) == 0
    assert not torch.equal(study.Steps(2, 4)[0], small[0])


def test_a_look_early_is_the_first_of_the_curve():
    plan = study.plan_of("Muon", "small")
    curve = []
    study.trained(plan, 1, 0.02, looks=curve)
    assert study.early(plan, seed=1, rate=0.02) == curve[0] != curve[1]


def test_schedules_differ_and_only_the_constant_one_starts_high():
    factors = {}
    for name in schedules.STARTS:
        plan = schedules.plan_of(name)
        factors[name] = [plan.schedule(step) for step in range(schedules.STEPS + 1)]
        assert plan.size == 4 and plan.optimizer == "AdamW"
    assert len({tuple(row) for row in factors.values()}) == 5  # a warm-up of 1 step is none
    assert [name for name, row in factors.items() if row[-1] > 0.5] == ["constant", "warm-up"]
    assert all(row[-1] == pytest.approx(0.01) for row in factors.values() if row[-1] < 0.5)


def test_a_training_that_breaks_off_scores_as_guessing():
    plan = study.plan_of("SGD", "small")
    model = study.trained(plan, 0, 1e30)
    assert convergence.nats(model, 300) >= math.log(300) - 1e-6


def test_what_nobody_knows_is_refused():
    for options, message in (
        ({"optimizer": "adam", "batch": "small"}, "optimizer is 'adam'; known are: SGD"),
        ({"optimizer": "Adam", "batch": "huge"}, "batch is 'huge'; known are: small, large"),
    ):
        with pytest.raises(ValueError, match=message):
            study.run(seed=1, **options)
    with pytest.raises(ValueError, match="schedule is 'zigzag'; known are: constant"):
        schedules.run(seed=1, schedule="zigzag")

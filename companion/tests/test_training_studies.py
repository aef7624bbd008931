"""The studies of activations and of overfitting, cut down: pairing, looks, honest stopping."""

import pytest
import torch

from companion.data import documents, passage
from companion.mlp_variants import NAMES
from companion.studies import activation_functions, convergence, overfitting, size
from companion.studies.study import _check_results
from companion.tests.equalities import far, weights
from companion.tokenization import train_tokenizer

TINIER = {"layers": 1, "heads": 2, "kv_heads": 1, "width": 16, "hidden": 24}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Little text, a tokenizer learned on the spot, few steps."""
    text = "\n\n".join(list(documents("prose", "train").values())[:8])
    tokenizer = train_tokenizer([text], 300)

    def judged(_, kind, characters, window=31):
        return passage(text[:characters], tokenizer, window=window)

    common = {"tiny_tokenizer": lambda: tokenizer, "validation": judged}
    for module, values in (
        (convergence, {"SHAPE": TINIER, "CONTEXT": 32, "training_text": lambda: text, **common}),
        (size, {"CONTEXT": 32}),
        (activation_functions, {"STEPS": 6, "WARMUP": 1, "EARLY": 2, "JUDGED": 300, **common}),
        (overfitting, {"SHAPE": TINIER, "SMALLER": {**TINIER, "width": 8}, **common}),
        (overfitting, {"CONTEXT": 32, "STEPS": 6, "EVERY": 2, "WARMUP": 1, "CORPUS": 400}),
        (overfitting, {"LOOKED": 300, "JUDGED": 900}),
        (overfitting, {"documents": lambda kind, split: {"a": text, "b": text[::-1]}}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    caches = (convergence.batch, activation_functions.tuned, overfitting.corpus)
    caches += (overfitting.held_out,)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


# --- activations --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_activation_gives_a_whole_point_and_repeats(name, monkeypatch):
    found_rate = activation_functions.Tuned((1e-3, 2e-3, 4e-3), (3.0, 2.0, 2.5))
    monkeypatch.setattr(activation_functions, "tuned", lambda activation: found_rate)
    random = torch.get_rng_state()
    found = activation_functions.STUDY.point(seed=1, **activation_functions.STUDY.settings[name])
    assert torch.equal(random, torch.get_rng_state())
    _check_results(found)
    assert found["rate"] == 2e-3 and 0 < found["nats"] < 8
    assert activation_functions.early(seed=1, activation=name, rate=2e-3) == {
        "early": found["early"]
    }
    assert found["zero"] == pytest.approx(0.5, abs=0.2) if name == "ReLU" else found["zero"] == 0


def test_models_of_a_seed_share_what_they_can():
    models = {name: activation_functions.start(3, name) for name in NAMES}
    held = {name: weights(model) for name, model in models.items()}
    assert far(held["ReLU"], held["GELU"]) == far(held["SiLU"], held["Leaky ReLU"]) == 0
    shared = [name for name in held["SwiGLU"] if ".mlp." not in name]
    assert all(torch.equal(held["ReLU"][name], held["SwiGLU"][name]) for name in shared)
    sizes = {sum(p.numel() for p in model.parameters()) for model in models.values()}
    assert len(sizes) == 1


def test_the_rate_is_the_best_of_a_ladder(monkeypatch):
    monkeypatch.setattr(activation_functions, "trained", lambda seed, name, rate: rate)
    monkeypatch.setattr(activation_functions, "nats", lambda rate: abs(rate - 0.004))
    assert activation_functions.tuned("ReLU").rate == pytest.approx(0.004)


def test_a_training_that_breaks_off_is_judged_as_guessing():
    model = activation_functions.start(0, "ReLU")
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    assert activation_functions.nats(model) == pytest.approx(5.7, abs=0.1)  # ln 300
    with pytest.raises(ValueError, match="activation is 'Tanh'"):
        activation_functions.start(0, "Tanh")


# --- overfitting --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", overfitting.STUDY.settings)
def test_each_remedy_gives_a_whole_point_and_repeats(name):
    setting, random = overfitting.STUDY.settings[name], torch.get_rng_state()
    found = overfitting.STUDY.point(seed=1, **setting)
    assert torch.equal(random, torch.get_rng_state())
    _check_results(found)
    assert len(found["train"]) == len(found["validation"]) == 3
    first = overfitting.early(seed=1, **setting)
    assert first == {key: found[key][0] for key in ("train", "validation")}
    best = found["validation"].index(min(found["validation"]))
    assert found["stopped at"] == 2 * (best + 1)
    if name != "base":
        assert found["validation"] != overfitting.run(seed=1)["validation"]


def test_early_stopping_looks_at_validation_alone():
    """By hand: the second look is best on validation, the third on test."""
    looks = overfitting.Looks([3.0, 2.0, 1.0], [3.0, 2.5, 2.7], [3.1, 2.6, 2.4])
    found = looks.results()
    assert (found["test"], found["stopped"]) == (2.4, 2.6)
    assert found["stopped at"] == 2 * overfitting.EVERY


def test_texts_do_not_overlap_and_more_text_holds_the_less():
    held = overfitting.held_out()
    sizes = [len(held[name].tokens) for name in ("validation", "test")]
    whole = overfitting.validation(None, kind="source", characters=900)
    assert sum(sizes) == len(whole.tokens) and 0 < sizes[0] < sizes[1]
    assert torch.equal(torch.cat([held[n].tokens for n in ("validation", "test")]), whole.tokens)
    small, large = overfitting.corpus(1, 400), overfitting.corpus(1, 1600)
    assert len(small) == 400 and len(large) == 1600 and torch.equal(large[:400], small)
    start = overfitting.seen(1).tokens
    assert torch.equal(start[:50], small[1:51])
    with pytest.raises(ValueError, match="seed is -1"):
        overfitting.run(seed=-1)

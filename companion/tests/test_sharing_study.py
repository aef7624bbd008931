"""The study of sharing: what is equal is equal, all ways start alike, and points are whole."""

import math

import pytest
import torch

from companion.cost import parameters, training_flops
from companion.data import documents, passage
from companion.memory import unique_parameters
from companion.sharing import distinct_layers
from companion.studies import convergence, size
from companion.studies import sharing as study
from companion.studies.study import _check_results
from companion.tokenization import train_tokenizer

STEPS = 6


@pytest.fixture
def quick(monkeypatch):
    """The study cut down: little text, a tokenizer learned on the spot, few steps."""
    text = "\n\n".join(list(documents("prose", "train").values())[:8])
    tokenizer = train_tokenizer([text], 300)
    texts = {"training_text": lambda: text, "tiny_tokenizer": lambda: tokenizer}
    values = {"STEPS": STEPS, "WARMUP": 2, "EARLY": 3, "MORE": 9, "JUDGED": 300, "GLANCE": 200}
    for name, value in values.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "tiny_tokenizer", texts["tiny_tokenizer"])
    for name, value in texts.items():
        monkeypatch.setattr(convergence, name, value)
    for module in (study, size):
        monkeypatch.setattr(module, "CONTEXT", 32)
    held_out = lambda _, kind, characters: passage(text[:characters], tokenizer, window=31)  # noqa: E731
    monkeypatch.setattr(study, "validation", held_out)
    convergence.batch.cache_clear()
    yield
    convergence.batch.cache_clear()


@pytest.mark.parametrize("name", ["4 layers", "cycle, 2 x 2", "tied", "factors", "K = 1"])
def test_each_way_gives_a_whole_point_and_repeats(name, quick):
    random = torch.get_rng_state()
    found = study.STUDY.point(seed=1, **study.STUDY.settings[name])
    assert torch.equal(random, torch.get_rng_state())
    _check_results(found)
    assert len(found["losses"]) == 1 and found["early"] != found["nats"]
    assert found["losses"][0] == pytest.approx(math.log(300), abs=2)
    assert study.early(seed=1, way=name) == {"early": found["early"]}
    assert study.early(seed=2, way=name) != {"early": found["early"]}


def test_changes_of_a_trained_model_are_judged_before_and_after(quick):
    found = study.run(seed=0, way="from trained")
    _check_results(found)
    assert found["full, before"] == found["full"]
    assert len(found) == 1 + 2 * len(study.CHANGES)
    assert len(set(found.values())) == 2 * len(study.CHANGES)  # all others are different numbers
    assert all(found[f"{name}, after"] != found[f"{name}, before"] for name in study.CHANGES)


def test_what_is_called_equal_is_equal():
    held = {name: unique_parameters(study.new_model(0, name)) for name in study.WAYS}
    done = {name: study.step_flops(name) for name in study.WAYS}
    for way in ("repeat, 2 x 2", "cycle, 2 x 2"):
        assert held[way] == held["2 layers"] and done[way] == done["4 layers"]
    way = "1 block, 4 times"
    assert held[way] == held["1 layer"] and done[way] == done["4 layers"]
    for way in ("K = 2, as many", "K = 1, as many", "factors, as many"):
        assert held[way] == held["4 layers"] and done[way] == done["4 layers"]
        less = way.removesuffix(", as many")
        assert held[less] < held[way] and done[less] < done[way]
    assert done["tied"] == done["4 layers"] and held["tied"] < held["4 layers"]
    assert held["tied, as many"] == pytest.approx(held["4 layers"], rel=1e-3)
    assert done["tied, as many"] > done["tied"]
    full = study.new_model(0, "4 layers").config
    assert held["4 layers"] == parameters(full)
    assert done["4 layers"] == training_flops(full, 256, batch=4)


def test_ways_are_what_their_names_say():
    models = {name: study.new_model(3, name) for name in study.WAYS}
    layers = {name: (m.config.layers, distinct_layers(m)) for name, m in models.items()}
    assert layers["repeat, 2 x 2"] == layers["cycle, 2 x 2"] == (4, 2)
    assert layers["1 block, 4 times"] == (4, 1) and layers["2 layers"] == (2, 2)
    order = {name: [[*m.blocks].index(b) for b in m.blocks] for name, m in models.items()}
    assert order["repeat, 2 x 2"] == [0, 0, 2, 2] and order["cycle, 2 x 2"] == [0, 1, 0, 1]
    assert [models[name].config.kv_heads for name in ("4 layers", "K = 2", "K = 1")] == [4, 2, 1]
    assert {name for name, m in models.items() if m.config.tied} == {"tied", "tied, as many"}
    rates = {name: way["rate"] / study.RATE for name, way in study.WAYS.items()}
    assert {n: r for n, r in rates.items() if r != 1} == {
        **{"4 layers, half rate": 0.5, "4 layers, double rate": 2},
        **{"1 block, 4 times, half rate": 0.5, "1 block, 4 times, double rate": 2},
    }


def test_all_ways_start_with_the_spread_of_the_full_model():
    full = study.new_model(3, "4 layers")
    for name in study.WAYS:
        model = study.new_model(3, name)
        if study.WAYS[name]["shape"] == study.SHAPE:
            assert torch.equal(model.embedding.weight, full.embedding.weight)
        for part in ("query", "key", "value", "out"):
            own, theirs = (getattr(m.blocks[0].attention, part).weight for m in (model, full))
            shallow = part == "out" and model.config.layers < 4
            expected = theirs.std() * ((4 / model.config.layers) ** 0.5 if shallow else 1)
            assert own.std().item() == pytest.approx(expected.item(), rel=0.05)


def test_what_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="way is 'spiral'; known are: 4 layers, "):
        study.run(seed=0, way="spiral")
    with pytest.raises(ValueError, match="seed is -1"):
        study.new_model(-1, "tied")

"""Optimizers by name are torch's where it has them; states are counted, rates are tuned."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from companion.losses import next_token_loss
from companion.model import LanguageModel
from companion.optimizers import (
    OPTIMIZERS,
    VARIANTS,
    Lamb,
    Lion,
    Muon,
    counted_state_bytes,
    make_optimizer,
    race_updates,
    racing,
    state_bytes,
    tuned_rate,
    variants_of,
)
from companion.tests.test_model import small
from companion.tests.test_training import batches
from companion.training import adamw, train

TORCHS = {  # name: a torch optimizer of (matrices, vectors), written out
    "SGD": lambda m, v: torch.optim.SGD([*m, *v], lr=0.01),
    "momentum": lambda m, v: torch.optim.SGD([*m, *v], lr=0.01, momentum=0.9),
    "Adagrad": lambda m, v: torch.optim.Adagrad([*m, *v], lr=0.01),
    "RMSProp": lambda m, v: torch.optim.RMSprop([*m, *v], lr=0.01, alpha=0.95),
    "Adam": lambda m, v: torch.optim.Adam([*m, *v], lr=0.01, betas=(0.9, 0.95)),
    "AdamW": lambda m, v: torch.optim.AdamW(
        [{"params": m, "weight_decay": 0.1}, {"params": v, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
    ),
}


def trained(make, steps=4) -> LanguageModel:
    model = small()
    train(model, batches(), steps=steps, optimizer=make(model), progress=False)
    return model


def assert_alike(a: nn.Module, b: nn.Module, **close) -> None:
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("name", TORCHS)
def test_six_are_torchs(name):
    def theirs(model):
        sorted_out = ([p for p in model.parameters() if (p.ndim >= 2) == big] for big in (1, 0))
        return TORCHS[name](*sorted_out)

    ours = trained(lambda model: make_optimizer(name, model, 0.01))
    assert_alike(ours, trained(theirs), rtol=0, atol=0)
    if name == "AdamW":
        assert_alike(ours, trained(lambda model: adamw(model, 0.01)), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "kind"), [("LAMB", Lamb), ("Lion", Lion), ("Muon", Muon)])
def test_three_are_ours(name, kind):
    optimizer = make_optimizer(name, small(), 0.01)
    assert type(optimizer) is kind and [g["lr"] for g in optimizer.param_groups] == [0.01] * 2
    assert optimizer.param_groups[0]["decay"] == 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_decays(name):
    rate = {"SGD": 0.1, "momentum": 0.05, "Lion": 1e-3}.get(name, 1e-2)
    model, text = small(), batches()[0]
    before = next_token_loss(model(text), text).item()
    optimizer = make_optimizer(name, model, rate)
    train(model, [text] * 20, steps=20, optimizer=optimizer, progress=False)
    assert next_token_loss(model(text), text).item() < before - 0.05
    lengths = []
    for decay in (0.0, 2.0):
        model = trained(lambda m, d=decay: make_optimizer(name, m, rate, decay=d))
        lengths.append(model.blocks[0].mlp.up.weight.norm().item())
    assert lengths[1] < lengths[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_matrices_decay(name):
    for group in make_optimizer(name, small(), 0.01, decay=0.3).param_groups:
        decay = group.get("weight_decay", group.get("decay"))
        vectors = [p for p in group["params"] if p.ndim < 2]
        if name == "Muon":
            assert group["matrices"] != bool(vectors)
        else:
            assert decay == (0.0 if vectors else 0.3)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tied", [True, False])
def test_states_are_predicted_to_the_byte(name, tied):
    config = replace(small().config, tied=tied, layers=3)
    model = LanguageModel(config)
    optimizer = make_optimizer(name, model, 1e-3)
    train(model, batches(), steps=2, optimizer=optimizer, progress=False)
    assert counted_state_bytes(optimizer) == state_bytes(name, config)


@pytest.mark.parametrize("name", ["momentum", "LAMB", "Lion", "Muon"])
def test_states_of_other_types_are_predicted_too(name):
    model = small().double()
    optimizer = make_optimizer(name, model, 1e-3)
    train(model, batches(), steps=1, optimizer=optimizer, progress=False)
    assert counted_state_bytes(optimizer) == state_bytes(name, model.config, 8)


def test_the_table_of_states():
    """By hand: 1,000,000 numbers would be 0, 4 or 8 MB; LAMB needs twice what Lion needs."""
    config = small().config
    found = {name: state_bytes(name, config) for name in OPTIMIZERS}
    weights = sum(p.numel() for p in small().parameters()) * 4
    tensors = len(list(small().parameters()))
    assert found["SGD"] == 0 and found["momentum"] == found["Lion"] == weights
    assert found["Adagrad"] == found["RMSProp"] == weights + 4 * tensors
    assert found["Adam"] == found["AdamW"] == found["LAMB"] == 2 * weights + 4 * tensors
    assert weights < found["Muon"] < 2 * weights


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_variants_compute_the_same(name):
    plain = trained(lambda model: make_optimizer(name, model, 0.01, variant="loop"))
    for variant in variants_of(name):
        other = trained(lambda model, v=variant: make_optimizer(name, model, 0.01, variant=v))
        assert_alike(plain, other, rtol=1e-3, atol=1e-5)
    flags = {v: make_optimizer(name, small(), 0.01, variant=v).defaults for v in variants_of(name)}
    for variant, found in flags.items():
        foreach, fused = VARIANTS[variant]
        assert bool(found.get("foreach")) == foreach and bool(found.get("fused")) == fused


def test_updates_are_raced():
    ways = {name: ("AdamW", name) for name in variants_of("AdamW")} | {"Lion": ("Lion", None)}
    found = race_updates(small(), ways, rounds=6)
    assert set(found.seconds) == set(ways)
    assert all(times and min(times) > 0 for times in found.seconds.values()) or found.busy


def test_an_update_is_one_step_of_a_copy(monkeypatch):
    made = []

    def keep(*given, **options):
        made.append(make_optimizer(*given, **options))
        return made[-1]

    monkeypatch.setattr(racing, "make_optimizer", keep)
    model = small()
    before = [p.detach().clone() for p in model.parameters()]
    update = racing.update_call(model, "LAMB")
    update(), update()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert {state["step"].item() for state in made[0].state.values()} == {2}


@pytest.mark.parametrize(("name", "given", "message"), [
    ("adamw", {}, "optimizer is 'adamw'; known are: SGD, momentum, Adagrad, RMSProp, Adam, AdamW"),
    ("SGD", {"rate": -0.1}, "rate is -0.1; it must be a finite number above 0"),
    ("Muon", {"rate": 0}, "rate is 0"), ("Lion", {"rate": math.inf}, "rate is inf"),
    ("Adam", {"decay": -1.0}, "decay is -1.0"), ("Muon", {"decay": -1.0}, "decay is -1.0"),
    ("Adam", {"variant": "quick"}, "variant is 'quick'; known are: loop, foreach, fused"),
    ("Lion", {"variant": "fused"}, "Lion has no variant 'fused'; it has: loop"),
    ("RMSProp", {"variant": "fused"}, "RMSProp has no variant 'fused'; it has: loop, foreach"),
])  # fmt: skip
def test_what_nobody_knows_is_refused(name, given, message):
    given = {"rate": 0.1} | given
    with pytest.raises(ValueError, match=message):
        make_optimizer(name, small(), given.pop("rate"), **given)


def test_other_bad_input_is_refused():
    for call in (lambda: state_bytes("sgd", small().config), lambda: variants_of("sgd")):
        with pytest.raises(ValueError, match="optimizer is 'sgd'; known are: SGD"):
            call()
    with pytest.raises(ValueError, match="bytes_per_number is 0"):
        state_bytes("SGD", small().config, 0)
    with pytest.raises(ValueError, match="0 ways"):
        race_updates(small(), {})


@pytest.mark.parametrize(("start", "tried"), [(4.0, 3), (2.0, 4), (32.0, 6), (0.5, 6)])
def test_the_best_rate_is_found_from_anywhere(start, tried):
    calls = []

    def score(rate):
        calls.append(rate)
        return abs(math.log2(rate / 4.0))

    found = tuned_rate(score, start)
    assert found.rate == 4.0 and found.inside and len(calls) == tried == len(set(calls))
    assert found.rates == tuple(sorted(calls)) and found.scores == tuple(map(score, found.rates))


def test_a_ladder_without_an_end_is_left():
    with pytest.raises(RuntimeError, match="12 rates tried"):
        tuned_rate(lambda rate: rate, 1.0)
    with pytest.raises(ValueError, match="score at a rate of 2 is nan"):
        tuned_rate(lambda rate: 1.0 if rate == 1 else math.nan, 1.0, ratio=2.0)
    for given, message in (({"start": 0.0}, "start is 0.0"), ({"ratio": 1.0}, "ratio is 1.0")):
        with pytest.raises(ValueError, match=message):
            tuned_rate(abs, **{"start": 1.0} | given)


def test_muon_stands_where_it_stood():
    import companion.optimizers as package
    from companion.optimizers.muon import Muon as moved

    assert package.Muon is moved and package.orthogonalized.__module__.endswith("muon")

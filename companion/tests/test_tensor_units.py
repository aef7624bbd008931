"""The study of number formats in hardware: what runs is timed, what cannot says why."""

import pytest
import torch

from companion.cost import matrix_parameters, parameters
from companion.hardware import best_device
from companion.memory import LiveBytes
from companion.studies import tensor_units as study
from companion.studies.study import _check_results
from companion.timing import Race, once, race

SMALL = {"batch": 1, "rounds": 6}


def unguarded(*, rounds, patience, threads, **calls):
    """A race that takes every round as quiet."""
    seconds = {
        name: tuple(once(call, threads) for _ in range(rounds)) for name, call in calls.items()
    }
    return Race(seconds, threads, rounds)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in {"CONTEXT": 16, "HEAD": 16, "VOCAB": 64, "PATIENCE": 0.5}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "product_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(study, "race", unguarded)
    study._rate.cache_clear()
    yield
    study._rate.cache_clear()


def reasons(results, name):
    return [key for key in study.reasons(results) if key.startswith(f"{name}: ")]


def test_a_point_has_seconds_and_bytes_or_a_reason(monkeypatch):
    monkeypatch.setattr(study, "ROUNDS", 6)
    before = torch.random.get_rng_state()
    results = study.run(seed=0, width=32)
    assert torch.equal(before, torch.random.get_rng_state())
    for name in study.FORMATS:
        for what in ("product", "step"):
            missing = reasons(results, f"{name} {what}")
            assert missing or all(s > 0 for s in results[f"{name} {what}"])
        assert results.get(f"{name} bytes", 0) > 0 or reasons(results, f"{name} step")
    for name in ("FP32", "BF16"):
        assert not reasons(results, f"{name} step")
    _check_results(results)


def test_one_failing_format_costs_no_other(monkeypatch):
    make = study._product

    def broken(name, *rest):
        if name == "BF16":
            raise RuntimeError("no units for this\nand a long trace")
        return make(name, *rest)

    monkeypatch.setattr(study, "_product", broken)
    results = study.measured(32, "product", ("FP32", "BF16"), **SMALL)
    assert results["BF16 product: not measured, RuntimeError: no units for this"] == 1
    assert len(results["FP32 product"]) == 6 and "BF16 product" not in results


def test_a_call_that_fails_in_its_second_run_is_left_out(monkeypatch):
    def once(*_):
        runs = []

        def call():
            runs.append(None)
            if len(runs) == 2:
                raise MemoryError  # without a word

        return call

    monkeypatch.setattr(study, "_step", once)
    results = study.measured(32, "step", ("FP32",), **SMALL)
    assert results == {"FP32 step: not measured, MemoryError": 1}


def test_what_would_take_too_long_is_not_tried(monkeypatch):
    monkeypatch.setattr(study, "LONGEST", {best_device().type: 1e-3})
    results = study.measured(4096, "product", ("FP32",), **SMALL)  # 16 rows at 1 GFLOP/s: 0.54 s
    assert reasons(results, "FP32 product") == [
        "FP32 product: not measured, it would take about 1 s"
    ]
    assert study._expected("FP32", 4096, "product", 1, "cpu") == 2 * 16 * 4096**2 / 1e9


@pytest.mark.skipif(best_device().type == "cuda", reason="CUDA may have TF32")
def test_tf32_is_for_cuda_alone():
    results = study.measured(32, "step", ("TF32",), **SMALL)
    assert list(results) == [
        "TF32 step: not measured, TF32 is a mode of NVIDIA's units from Ampere on"
    ]


@pytest.mark.parametrize("name", ["FP32", "BF16", "FP16"])
def test_a_step_updates_fp32_masters_and_its_products_are_in_the_format(name):
    model = {}
    made = study.LanguageModel

    class Kept(made):
        def __init__(self, config):
            super().__init__(config)
            model["it"] = self

        def forward(self, tokens):
            model["logits"] = super().forward(tokens)
            return model["logits"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "LanguageModel", Kept)
        call = study._step(name, 32, 1, best_device())
    before = model["it"].head.weight.detach().clone()
    call()
    weight = model["it"].head.weight
    assert weight.dtype == torch.float32 and not torch.equal(before, weight)
    assert model["logits"].dtype == study.AUTOCAST.get(name, torch.float32)
    assert weight.grad is None  # given back, as in `plain_step`


def test_bytes_hold_weights_states_and_gradients():
    device = torch.device("cpu")
    with study._counted(device) as live:
        call = study._step("FP32", 64, 1, device)
        for _ in range(2):
            call()
    count = parameters(study.config_of(64))
    assert 16 * count < live[0] < 24 * count + 4 * 16 * 64 * 200  # and what a step keeps
    with LiveBytes() as seen, study._counted(device) as one:
        torch.ones(1000)
    assert one == [4000] and seen.peak >= 0


def test_the_model_is_as_wide_as_it_says():
    for width in study.WIDTHS:
        config = study.config_of(width)
        assert config.width == width
        assert matrix_parameters(config) == pytest.approx(12.25 * 2 * width**2 + 64 * width)


@pytest.mark.parametrize("chosen", [False, True])
def test_products_do_not_change_the_global_settings(chosen):
    here = torch.backends.cuda.matmul
    before, here.allow_tf32 = here.allow_tf32, chosen
    try:
        for name in ("TF32", "FP32"):
            with study._products_in(name):
                assert here.allow_tf32 == (name == "TF32")
            assert here.allow_tf32 == chosen
    finally:
        here.allow_tf32 = before


def test_speeds_are_read_as_ratios_within_a_round():
    slow, fast = [2.0, 4.0, 6.0, 8.0, 10.0, 12.0], [1.0, 2.0, 3.0, 4.0, 5.0, 4.0]
    results = {
        "FP32 step": slow,
        "BF16 step": fast,
        "FP16 step": fast[:5],
        "FP8 step: not measured, no": 1,
    }
    found = study.speedup(results, "BF16", "step")
    assert (found.estimate, found.low, found.high) == (2.0, 2.0, 3.0)
    for name, what in (("FP16", "step"), ("FP8", "step"), ("BF16", "product")):
        assert not study.speedup(results, name, what).known
    busy = {"steps: busy, noise": 1}
    assert study.reasons(results | busy) == ["FP8 step: not measured, no", "steps: busy, noise"]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="what is 'pass'; known are: product, step"):
        study.measured(32, "pass")
    with pytest.raises(ValueError, match="format is 'FP4'"):
        study.measured(32, "step", ("FP4",))


def test_a_busy_machine_is_tried_again_and_then_says_so(monkeypatch):
    tries = []

    def busy(*, rounds, patience, threads, **calls):
        tries.append(rounds)
        return Race(
            {name: (1.0,) * (rounds - 1) for name in calls}, threads, rounds, "1 of 6 noisy"
        )

    monkeypatch.setattr(study, "race", busy)
    results = study.measured(32, "product", ("FP32",), tries=2, **SMALL)
    assert results == {"products: busy, 1 of 6 noisy": 1, "FP32 product": [1.0] * 5}
    assert tries == [6, 6]


def test_the_real_race_takes_these_calls(monkeypatch):
    monkeypatch.setattr(study, "race", race)
    results = study.measured(32, "product", ("FP32", "BF16"), **SMALL)
    times = {len(results.get(f"{name} product", [])) for name in ("FP32", "BF16")}
    assert times == {6} or any("busy" in name for name in results)

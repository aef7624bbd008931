"""Counted columns against closed forms; timed ones against what their names promise."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn

from companion import cost, measurement, roofline
from companion.intervals import Interval
from companion.measurement import (
    compare,
    counted_flops,
    decode,
    decode_bytes,
    measure,
    prefill,
    products,
    reading,
)
from companion.quantization import quantize, symmetric
from companion.quantization.activations import integer
from companion.quantization.fused import fused
from companion.quantization.kernels import available
from companion.report import COLUMNS, Comparison, Report
from companion.tests.test_model import small
from companion.tests.test_quality import some_passage

TIMED = ("first_token", "prefill", "decode", "flops_share", "bandwidth_share")


@pytest.fixture(scope="module")
def comparison():
    models = {"small": small().float(), "wide": small(hidden=96).float()}
    return compare(some_passage(), columns=list(COLUMNS), prompt=16, new=4, rounds=6, **models)


def test_counted_columns_equal_closed_forms(comparison):
    for name, model in {"small": small(), "wide": small(hidden=96)}.items():
        report = comparison[name]
        assert report.parameters == cost.parameters(model.config)
        assert report.stored_bytes == cost.weight_bytes(model.config)
        assert report.peak_bytes > report.stored_bytes


def test_every_column_is_filled_and_renders(comparison):
    for report in comparison.reports.values():
        assert not [name for name in COLUMNS if getattr(report, name) is None]
    for text in (str(comparison), comparison._repr_html_()):
        assert all(heading in text for heading in ("bits per byte", "decode (tokens/s)", "wide"))
        assert comparison.machine.cpu in text
    assert json.loads(json.dumps(comparison.as_dict()))["tokens"] == 70


def test_the_first_is_what_the_others_are_compared_with(comparison):
    first, other = comparison.reports.values()
    assert (first.excess.estimate, first.divergence.estimate) == (0, 0)
    assert first.agreement.estimate == 1 and other.agreement.estimate < 1
    excess = other.bits_per_byte.estimate - first.bits_per_byte.estimate
    assert other.excess.estimate == pytest.approx(excess, abs=1e-6)


def test_a_report_says_what_multiplied():
    model = small().float()
    eight = quantize(model, mapping=symmetric, head=None)
    layers = 7 * model.config.layers
    assert products(model) == f"float32 x {layers + 1}"
    assert products(eight) == f"expanded x {layers}, float32 x 1"
    assert products(integer(eight)) == f"IntegerLinear x {layers}, float32 x 1"
    if available("Int8Weights"):
        fast = fused(quantize(model, mapping=symmetric), "Int8Weights")
        assert products(fast) == f"Int8Weights x {4 * model.config.layers + 1}"


def test_shares_of_the_peak_are_not_guessed_for_kernels():
    if not available("Int8Weights"):
        pytest.skip("torch has no such kernel here")
    fast = fused(quantize(small().float(), mapping=symmetric), "Int8Weights")
    columns = ["decode", "bandwidth_share", "flops_share"]
    report = measure(fast, some_passage(), columns=columns, prompt=16, new=4, rounds=6)
    assert not report.bandwidth_share.known and not report.flops_share.known


def test_a_ratio_of_speeds_is_the_ratio_of_times_turned_over(comparison):
    race = comparison.races["decode"]
    ratio = comparison.ratio("decode", "wide", "small")
    if race.busy:
        assert not ratio.known
    else:
        assert ratio.estimate == race.ratio("small", "wide").estimate


def test_what_was_not_asked_for_is_not_measured(monkeypatch):
    for name in ("judge", "race"):
        monkeypatch.setattr(measurement, name, None)
    report = measure(small(), some_passage(), columns=["parameters"], prompt=8)
    assert report.bits_per_byte is None and report.decode is None
    assert report.cell("decode") == "–"


def test_decoding_is_greedy_and_repeats():
    model, tokens = small(), some_passage().tokens[None, :9]
    from companion.decoding import generate

    call = decode(model, tokens, 5)
    written = generate(model, tokens[:, :9], 5, cached=False)
    assert call().tolist() == call().tolist()
    last = generate(model, torch.cat([tokens, tokens[:, -1:]], 1), 5, cached=False)[:, -1:]
    assert call().tolist() == last.tolist()
    assert prefill(model, tokens)().tolist() == written[:, 9].tolist()
    assert torch.equal(reading(model, tokens)(), model(tokens))


@pytest.mark.parametrize("tied", [True, False])
def test_flops_and_bytes_of_models_as_they_are_equal_the_formulas(tied):
    model = small(tied=tied).float()
    tokens = some_passage().tokens[None, :9]
    assert counted_flops(model, tokens) == cost.forward_flops(model.config, 9)
    untied_rows = 0 if tied else 4 * model.config.width  # the formula counts the row looked up
    moved = roofline.moved_bytes(model.config, 8) - untied_rows
    assert decode_bytes(model, 9) == moved


def test_models_without_shape_are_judged_all_the_same():
    class Uniform(nn.Module):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, 50)

    report = measure(Uniform(), some_passage(), columns=["bits_per_byte"], prompt=8)
    assert report.parameters == 0 and report.bits_per_byte.estimate > 0


def test_a_busy_machine_gives_words_not_numbers(comparison):
    report = replace(comparison["small"], decode=Interval.unknown())
    assert report.cell("decode") == "not measured"
    assert report.as_dict()["decode"] is None
    with pytest.raises(FrozenInstanceError):
        report.parameters = 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "0 models"),
        ({"columns": ["speed"], "m": 1}, "column is 'speed'; known are: parameters"),
        ({"prompt": 71, "m": 1}, "70 tokens, fewer than the prompt's 71"),
        ({"prompt": 0, "m": 1}, "prompt is 0"),
        ({"new": 0, "m": 1}, "new is 0"),
        ({"prompt": 8, "rounds": 2, "m": 1}, "rounds is 2"),
    ],
)
def test_bad_input_names_the_value(options, message):
    options = {k: small() if k == "m" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        compare(some_passage(), **options)


def test_ratios_and_names_that_are_not_there_are_refused():
    report = Report(parameters=1, stored_bytes=4)
    card = measurement.machine_card()
    comparison = Comparison({"a": report}, ("parameters",), {}, card, 1, 1)
    with pytest.raises(ValueError, match="column is 'decode'"):
        comparison.ratio("decode", "a", "a")
    with pytest.raises(ValueError, match="model is 'b'; known are: a"):
        comparison["b"]

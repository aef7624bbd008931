"""The benchmark of quantized models times what it says, with or without llama.cpp."""

import sys

import pytest
import torch

from companion.bench.quantized import alternate, candidates, llama
from companion.quantization.kernels import available
from companion.tests.test_replacing import small, tokens
from companion.timing import once


@pytest.fixture
def model():
    return small(width=64, hidden=96, vocab=64)


def test_candidates_compute_what_the_plain_model_does(model):
    found = candidates(model)
    assert found["FP32"] is model
    if available("Int8Products"):
        assert set(found) == {"FP32", "Int4Weights", "Int8Weights", "Int8Products"}
    expected = model(tokens())
    for name, one in found.items():
        near = 0.3 if name == "Int4Weights" else 0.08
        assert (one(tokens()).float() - expected).norm() < near * expected.norm(), name


def test_calls_alternate_and_their_own_seconds_count():
    log = []

    def call(name, seconds):
        return lambda: log.append(name) or seconds

    watch = alternate({"slow": call("slow", 0.4), "fast": call("fast", 0.2)}, rounds=8, threads=1)
    assert sorted(log) == ["fast"] * 9 + ["slow"] * 9  # a warm-up each
    assert all(set(log[i : i + 2]) == {"slow", "fast"} for i in range(0, 18, 2))
    assert watch.seconds["slow"] == (0.4,) * 8 and watch.ratio("slow", "fast").estimate == 2


def test_a_call_is_timed_from_outside():
    assert 0 < once(lambda: sum(range(1000))) < 1


def test_without_llama_cpp_it_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert llama(torch.tensor([[1, 2]]), 4, 1) is None

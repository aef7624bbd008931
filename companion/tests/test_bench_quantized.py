"""The benchmark of quantized models times what it says, with or without llama.cpp."""

import multiprocessing
import sys

import pytest
import torch

from companion.bench.quantized import Llama, alternate, candidates, peer
from companion.quantization.kernels import KERNELS, available
from companion.tests.test_fused import WIDE
from companion.tests.test_replacing import small, tokens
from companion.timing import once


@pytest.fixture
def model():
    return small(**WIDE)


def test_candidates_compute_what_the_plain_model_does(model):
    found = candidates(model)
    assert found["FP32"] is model
    if available("Int8Products"):
        assert set(found) == {"FP32", *KERNELS}
    expected = model(tokens())
    for name, one in found.items():
        near = 0.3 if "Int4" in name else 0.08
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
    with peer(1) as other:
        assert other is None


FAKE = """
from types import SimpleNamespace as Some
__version__ = "0"
def get_system_info(): return "made up"
def CommonParams():
    return Some(model=Some(), cpuparams=Some(), cpuparams_batch=Some())
class Server:
    def __init__(self, options): self.threads = options.cpuparams.n_threads
    def handle_completions(self, asked):
        found = {"predicted_n": asked["n_predict"], "prompt_n": len(asked["prompt"])}
        return {"timings": found | {"predicted_ms": 1000.0 * self.threads}}
"""


def test_llama_cpp_reports_its_own_seconds_from_a_process_that_ends(tmp_path, monkeypatch, capsys):
    (tmp_path / "xllamacpp.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    with peer(2) as other:
        assert isinstance(other, Llama)
        assert other.writes(torch.tensor([[1, 2, 3]]), 4)() == 2
    assert "xllamacpp 0: made up" in capsys.readouterr().out
    assert not multiprocessing.active_children()

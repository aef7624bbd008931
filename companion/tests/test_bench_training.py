"""The training benchmark: all candidates compute the same, and one that does not is caught."""

import pytest
import torch

from companion.bench import training as bench
from companion.tests.test_model import small

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    return small(kv_heads=2).float()


def test_all_candidates_have_the_same_losses(model):
    found = bench.candidates(model)
    names = ["plain", "fused AdamW", "no last position", "joined matrices", "and norms"]
    assert list(found) == [bench.THEIRS, *names, "and swiglu", "and attention", bench.OURS]
    batches = bench.some_batches(model, 3, 2, 16)
    assert 0 <= bench.checked(found, batches) < 1e-5
    assert found[bench.THEIRS].model.config._attn_implementation == "sdpa"
    fused = {name for name, one in found.items() if one.optimizer.defaults["fused"]}
    assert fused == found.keys() - {"plain"}


def test_one_that_trains_otherwise_is_caught(model):
    found = bench.candidates(model)
    found["plain"].optimizer.param_groups[0]["lr"] *= 30
    with pytest.raises(AssertionError, match="losses differ"):
        bench.checked(found, bench.some_batches(model, 3, 2, 16))


def test_the_race_and_the_profile_name_what_they_should(model):
    result, apart = bench.compare_with_transformers(model, batch=1, context=8, rounds=6)
    assert set(result.seconds) == set(bench.candidates(model)) and apart < 1e-5
    table = bench.profiled(bench.candidates(model)[bench.OURS], torch.ones(1, 8, dtype=torch.int64))
    assert "aten::mm" in table or "_linear_pointwise" in table

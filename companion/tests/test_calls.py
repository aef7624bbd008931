"""Operations that can be counted by hand."""

from dataclasses import replace

import torch

from companion.calls import TorchCalls, token_calls
from companion.model import LanguageModel
from companion.quantization.decoders import on_kernel
from companion.tests.test_fused import WIDE
from companion.tests.test_model import SMALL


def test_every_operation_counts_once():
    x = torch.ones(3)
    with TorchCalls() as calls:
        assert calls.count == 0
        (x + 1).mul_(2).view(3, 1)
    x + 1
    assert calls.count == 3


def test_each_block_makes_as_many():
    counts = [token_calls(LanguageModel(replace(SMALL, layers=n))) for n in (1, 2, 3)]
    assert counts[2] - counts[1] == counts[1] - counts[0] > 20


def test_a_block_of_compiled_code_makes_none():
    models = [LanguageModel(replace(SMALL, layers=n, **WIDE)) for n in (1, 2)]
    few, more = (token_calls(on_kernel(model, "Int8Compiled")) for model in models)
    assert few == more < 50

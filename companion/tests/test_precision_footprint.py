"""Predicted bytes of a step by precision, against what autograd and the optimizer hold."""

import pytest
import torch

from companion.cost import matrix_parameters, parameters
from companion.memory import storage_bytes
from companion.model import LanguageModel, ModelConfig
from companion.precision.counting import (
    Trainable,
    autocast_loss,
    counted,
    trainable,
)
from companion.precision.footprint import PRECISIONS, footprint
from companion.step_memory import StepMemory
from companion.training import adamw

SHAPES = [
    ({"layers": 2, "heads": 4, "kv_heads": 2, "width": 64, "hidden": 176}, 2, 32),
    ({"layers": 1, "heads": 2, "kv_heads": 1, "width": 32, "hidden": 80, "tied": False}, 1, 17),
    ({"layers": 3, "heads": 3, "kv_heads": 3, "width": 96, "hidden": 128}, 4, 64),
]


def model_of(shape):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(vocab=200, context=64, **shape))


def tokens_of(batch, positions):
    return torch.randint(200, (batch, positions), generator=torch.Generator().manual_seed(0))


def count(precision, model, tokens, autocast=None):
    """One step of what the precision is made of, or of the model under torch.autocast."""
    trained = trainable(model, precision)
    forward = autocast_loss(trained.model, tokens, autocast) if autocast else None
    return counted(trained, tokens, forward=forward)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("shape", "batch", "positions"), SHAPES)
def test_predicted_is_counted(precision, shape, batch, positions):
    model, tokens = model_of(shape), tokens_of(batch, positions)
    predicted = footprint(model.config, positions, batch=batch, precision=precision)
    assert predicted == count(precision, model, tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_keeps_what_torch_autocast_keeps(dtype):
    model, tokens = model_of(SHAPES[0][0]), tokens_of(2, 32)
    assert count("FP32", model, tokens, dtype) == count("autocast", model, tokens)


def test_the_model_given_is_left_alone():
    model, tokens = model_of(SHAPES[0][0]), tokens_of(2, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for precision in PRECISIONS:
        count(precision, model, tokens)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_large_model_by_hand():
    """Llama-2 7B, 4,096 tokens: 16 bytes a parameter in FP32, 18 with BF16 copies, 8 in BF16."""
    shape = {"layers": 32, "heads": 32, "kv_heads": 32, "width": 4096, "hidden": 11008}
    config = ModelConfig(vocab=32000, context=4096, tied=False, **shape)
    numbers = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 32000 * 4096 + 65 * 4096
    assert numbers == parameters(config) == 6_738_415_616
    found = {name: footprint(config, 4096, precision=name) for name in PRECISIONS}
    counters = 4 * (9 * 32 + 3)
    fixed = {name: f.weights + f.gradients + f.states for name, f in found.items()}
    assert fixed["FP32"] == fixed["autocast"] == 16 * numbers + counters
    assert fixed["pure BF16"] == 8 * numbers + counters
    assert fixed["8-bit states"] == pytest.approx(10 * numbers + 8 * numbers / 256, rel=1e-4)
    kept = 2 * matrix_parameters(config)
    row = 65 * (2 * 4096 + 1) * 4 + 32 * 32 * 4 + 8
    row += 2 * (32 * (9 * 4096 + 4 * 11008) + 4096)
    assert found["autocast"].kept == kept + 4096 * row + 4 * (4095 * 32000 + 1)
    assert found["masters"] == found["autocast"]
    layer = 5 * 4096 + 4096 + 11008 + 4 * (4 * 4096 + 3 * 11008)
    row = 65 * (2 * 4096 + 1) * 4 + 32 * 32 * 4 + 8 + 32 * layer + 4 * 4096
    codes = kept // 2 - 32000 * 4096 + 56 * 32
    assert found["FP8"].kept == codes + 4096 * row + 4 * (4095 * 32000 + 1)


def test_parts_add_up_and_shared_storages_count_once():
    found = StepMemory(1, 2, 3, 4)
    assert found.total == 10 and found.as_dict()["total"] == 10
    tensor = torch.ones(10)
    assert storage_bytes([tensor, tensor[2:], torch.ones(3, dtype=torch.bfloat16)]) == 46


def test_what_makes_no_sense_is_refused():
    model, tokens = model_of(SHAPES[0][0]), tokens_of(2, 32)
    with pytest.raises(ValueError, match="precision is 'FP4'; known are: FP32, autocast"):
        footprint(model.config, 32, precision="FP4")
    with pytest.raises(ValueError, match="65 positions exceed the context of 64"):
        footprint(model.config, 65)
    with pytest.raises(ValueError, match="no weight of the optimizer has a gradient"):
        other = Trainable(model, adamw(model_of(SHAPES[0][0])))
        counted(other, tokens)
    with pytest.raises(ValueError, match="precision is 'FP4'"):
        trainable(model, "FP4")

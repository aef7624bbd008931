"""A quantized model comes back bit by bit, and a file that does not fit is refused."""

from dataclasses import asdict

import pytest
import torch

from companion.calibration import observe
from companion.memory import stored_bytes
from companion.quantization import minimum, quantize, symmetric
from companion.quantization.activations import integer
from companion.quantization.awq import awq
from companion.quantization.fused import fused
from companion.quantization.kernels import available
from companion.quantization.saving import load_quantized, save_quantized
from companion.storage import load_tensors, save_tensors
from companion.tests.test_replacing import small, tokens

OPTIONS = [
    {"bits": 8},
    {"bits": 4, "group": 16, "mapping": minimum},
    {"bits": 3, "head": None},
    {"bits": "nf4", "group": 8, "head": "float8_e4m3fn"},
    {"bits": {"blocks.0.mlp.up": 4}},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_comes_back_bit_by_bit(options, tied, tmp_path):
    model = quantize(small(tied=tied), **options)
    again = load_quantized(save_quantized(tmp_path / "m.safetensors", model))
    assert torch.equal(again(tokens()), model(tokens()))
    assert stored_bytes(again) == stored_bytes(model) and again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_the_file_is_as_small_as_the_model(tmp_path):
    model = quantize(small(), 4, group=16)
    path = save_quantized(tmp_path / "m.safetensors", model)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + stored_bytes(model)


def test_scaled_columns_come_back_too(tmp_path):
    plain = small()
    model = quantize(plain, 4, rounding=awq(observe(plain, [tokens()])))
    again = load_quantized(save_quantized(tmp_path / "m.safetensors", model))
    assert torch.equal(again(tokens()), model(tokens()))


@pytest.fixture
def parts(tmp_path):
    path = save_quantized(tmp_path / "m.safetensors", quantize(small(), 4, group=16))
    return path, *load_tensors(path)


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t, a: (without(t, "norm.weight"), a),
        lambda t, a: (without(t, "blocks.0.mlp.up.matrix.codes"), a),
        lambda t, a: (without(t, "blocks.0.mlp.up.matrix.scale"), a),
        lambda t, a: (t | {"more": torch.ones(1)}, a),
        lambda t, a: (t | {"blocks.0.mlp.up.matrix.more": torch.ones(1)}, a),
        lambda t, a: (t | {"blocks.9.mlp.up.matrix.codes": torch.ones(1)}, a),
        lambda t, a: (without(t, "blocks.0.mlp.up.matrix.zero"), a),
        lambda t, a: (t | {"blocks.0.mlp.up.matrix.scale": torch.ones(48, 2, 1)}, a),
        lambda t, a: (t, a | {"config": asdict(small(width=64).config)}),
        lambda t, a: (t, a | {"layers": {"blocks.7.mlp.up": a["layers"]["head"]}}),
        lambda t, a: (t, a | {"layers": a["layers"] | {"head": {"layer": "Other"}}}),
    ],
)
def test_a_file_that_does_not_fit_is_refused(parts, spoil):
    path, tensors, about = parts
    save_tensors(path, *spoil(tensors, about))
    with pytest.raises(ValueError, match="does not hold the model that it says"):
        load_quantized(path)


@pytest.mark.parametrize("about", [None, {}, {"quantized": 2}, [1]])
def test_other_versions_and_other_files_are_refused(parts, about):
    path, tensors, _ = parts
    save_tensors(path, tensors, about)
    with pytest.raises(ValueError, match="1 is expected; save the model again"):
        load_quantized(path)


def test_what_is_not_quantized_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="no quantized layer"):
        save_quantized(tmp_path / "m.safetensors", small())
    with pytest.raises(FileNotFoundError):
        load_quantized(tmp_path / "m.safetensors")


def test_a_fused_model_is_not_saved(tmp_path):
    if available("Int8Weights"):
        with pytest.raises(ValueError, match="a FusedModel is no LanguageModel"):
            save_quantized(
                tmp_path / "m", fused(quantize(small(), mapping=symmetric), "Int8Weights")
            )
    assert not list(tmp_path.iterdir())


def test_integer_layers_are_refused_with_a_reason(tmp_path):
    model = integer(quantize(small(), mapping=symmetric))
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.query is an IntegerLinear"):
        save_quantized(tmp_path / "m.safetensors", model)
    assert not list(tmp_path.iterdir())

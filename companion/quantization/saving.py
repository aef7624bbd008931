"""A quantized model as one safetensors file: the codes as they lie in memory, and how to read them.

The header says what each layer is, so a file that does not fit (another version, a layer missing,
a shape that differs) is refused before anything is built from it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from companion.checks import require
from companion.model import LanguageModel, ModelConfig, rotary_angles
from companion.quantization.formats import Cast, Table
from companion.quantization.grids import Grid
from companion.quantization.layers import QuantizedEmbedding, QuantizedLinear, QuantizedMatrix
from companion.storage import distinct_tensors, load_tensors, save_tensors
from companion.surgery import outline

VERSION = 1  # of what the header says about layers
KINDS = {kind.__name__: kind for kind in (Grid, Cast, Table)}
LAYERS = {kind.__name__: kind for kind in (QuantizedLinear, QuantizedEmbedding)}


def save_quantized(path: str | Path, model: LanguageModel) -> Path:
    """Write a model that `quantize` made. Raises ValueError for a model that is not quantized."""
    require(isinstance(model, LanguageModel), f"a {type(model).__name__} is no LanguageModel")
    layers = {}
    for name, module in model.named_modules(remove_duplicate=False):
        matrix = getattr(module, "matrix", None)
        if isinstance(matrix, QuantizedMatrix):
            kind = type(module).__name__
            require(kind in LAYERS, f"{name} is an {kind}; save what quantize() returned")
            layers[name] = {
                "layer": kind,
                "kind": matrix.kind.__name__,
                "bits": matrix.bits,
                "inputs": matrix.inputs,
                "tensors": _described(matrix.state_dict()),
            }
    require(len(layers) > 0, "the model has no quantized layer; save what quantize() returned")
    about = {"quantized": VERSION, "config": asdict(model.config), "layers": layers}
    return save_tensors(path, distinct_tensors(model), about)


def load_quantized(path: str | Path) -> LanguageModel:
    """The model that `save_quantized` wrote, ready to read.

    Raises FileNotFoundError, or ValueError for a damaged file, another version, or other contents.
    """
    tensors, about = load_tensors(path)
    found = about.get("quantized") if isinstance(about, dict) else None
    wanted = f"{path} is of version {found} of quantized models; {VERSION} is expected"
    require(found == VERSION, f"{wanted}; save the model again")
    try:
        return _built(tensors, about)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not hold the model that it says: {error}") from error


def _built(tensors: dict[str, Tensor], about: dict) -> LanguageModel:
    model = outline(ModelConfig(**about["config"]))
    for name, facts in about["layers"].items():
        matrix = _matrix(f"{name}.matrix.", facts, tensors)
        if matrix is None:  # the head shares the embedding's
            require(name == "head" and model.config.tied, f"{name} has no codes")
            matrix = model.embedding.matrix
        rows, inputs = model.get_submodule(name).weight.shape
        require(matrix.shape == (rows, inputs), f"{name} is {matrix.shape}, not {(rows, inputs)}")
        dtype = [tensors["norm.weight"].dtype] * (facts["layer"] == "QuantizedEmbedding")
        model.set_submodule(name, LAYERS[facts["layer"]](matrix, *dtype))
    return _filled(model, tensors)


def _described(tensors: dict[str, Tensor]) -> dict[str, list]:
    return {name: [str(t.dtype), list(t.shape)] for name, t in tensors.items()}


def _matrix(start: str, facts: dict, tensors: dict[str, Tensor]) -> QuantizedMatrix | None:
    """The matrix whose tensors' names begin so, or None if there are none."""
    own = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    if not own:
        return None
    differ = f"tensors of {start} are not those the header describes"
    require(_described(own) == facts["tensors"], differ)
    return QuantizedMatrix.of(KINDS[facts["kind"]], facts["bits"], facts["inputs"], own)


def _filled(model: LanguageModel, tensors: dict[str, Tensor]) -> LanguageModel:
    """The weights that were not quantized, put in place; nothing may be missing or left over."""
    packed = {name for name in model.state_dict() if ".matrix." in name}
    plain = {name: t for name, t in tensors.items() if name not in packed}
    expected = {name for name, _ in model.named_parameters()}  # a tied head is named once
    require(plain.keys() == expected, f"other weights than expected: {plain.keys() ^ expected}")
    tied = model.config.tied and "embedding.weight" in plain
    model.load_state_dict(plain, assign=True, strict=False)
    if tied:
        model.head.weight = model.embedding.weight
    model.cos, model.sin = rotary_angles(model.config)
    return model.requires_grad_(False).eval()

"""A model that shares, as one safetensors file: each tensor once, and who uses it.

The plain ways lose something here. `safetensors` refuses tensors under two names; a pickled state
keeps one storage, but a model that loads it into parameters of its own shares nothing any more.
So the header tells which block each layer uses, which layers are factors or additions, and which
names are one parameter; loading builds that first and fills it then.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from companion.checks import require
from companion.model import LanguageModel, ModelConfig, rotary_angles
from companion.sharing.lora import LoRA
from companion.sharing.low_rank import LowRank
from companion.sharing.ties import place, ties
from companion.storage import distinct_tensors, load_tensors, save_tensors
from companion.surgery import outline


def save_shared(path: str | Path, model: LanguageModel) -> Path:
    """Write a model that `share`, `tie` or `lora` returned; a shared tensor takes its bytes once.

    Raises ValueError for a model with other layers (pruned, quantized: they have savers).
    """
    about = _plan(model)
    fits = type(model.config) is ModelConfig and _shapes(_built(about)) == _shapes(model)
    require(fits, "the model's tensors are not those of its config; only plain ones are saved here")
    return save_tensors(path, distinct_tensors(model), about)


def load_shared(path: str | Path) -> LanguageModel:
    """The model that `save_shared` wrote, sharing what it shared, ready to read.

    Raises FileNotFoundError, or ValueError for a damaged file or one that holds something else.
    """
    tensors, about = load_tensors(path)
    try:
        model = _built(about)
        _fill(model, tensors)
        for name in about["frozen"]:
            model.get_parameter(name).requires_grad_(False)
    except (AttributeError, IndexError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not hold a shared model: {error}") from error
    return model.eval()


def _plan(model: LanguageModel) -> dict:
    """What JSON has to say of a model beside its numbers."""
    blocks = list(model.blocks)
    named = list(model.named_modules())
    return {
        "config": asdict(model.config),
        "blocks": [blocks.index(block) for block in blocks],
        "factors": {name: layer.inner for name, layer in named if isinstance(layer, LowRank)},
        "additions": {
            name: [layer.inner, layer.scale] for name, layer in named if isinstance(layer, LoRA)
        },
        "ties": ties(model),
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
    }


def _built(about: dict) -> LanguageModel:
    """A model of shapes alone that shares as the plan says."""
    model = outline(ModelConfig(**about["config"]))
    model.blocks = nn.ModuleList(model.blocks[index] for index in about["blocks"])
    for name, inner in about["factors"].items():
        outputs, inputs = model.get_submodule(name).weight.shape
        sides = [torch.empty(shape, device="meta") for shape in ((outputs, inner), (inner, inputs))]
        model.set_submodule(name, LowRank(*sides))
    for name, (inner, scale) in about["additions"].items():
        base = model.get_submodule(name)
        down = torch.empty(inner, base.in_features, device="meta")
        model.set_submodule(name, LoRA(base, down, scale))
    for names in about["ties"]:
        one = model.get_parameter(names[0])
        for name in names[1:]:
            place(model, name, one)
    return model


def _fill(model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """Put the tensors in place of the outline's, for all who use them."""
    expected = dict(model.named_parameters())
    require(tensors.keys() == expected.keys(), "it holds other tensors than its header says")
    shared = {names[0]: names for names in ties(model)}
    for name, tensor in tensors.items():
        shapes = tuple(expected[name].shape), tuple(tensor.shape)
        require(shapes[0] == shapes[1], f"{name} has shape {shapes[1]}, not {shapes[0]}")
        one = nn.Parameter(tensor)
        for each in shared.get(name, (name,)):
            place(model, each, one)
    model.cos, model.sin = (t.to(model.norm.weight.dtype) for t in rotary_angles(model.config))


def _shapes(model: LanguageModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}

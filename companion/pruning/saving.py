"""A pruned model as one safetensors file: its weights and the shape that they have now.

Smaller matrices are smaller on the disk too; zeros among other numbers are stored like these.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from companion.checks import require
from companion.model import LanguageModel, ModelConfig, rotary_angles
from companion.pruning.config import ThinConfig, full_shape
from companion.pruning.narrowing import with_weights
from companion.storage import distinct_tensors, load_tensors, save_tensors
from companion.surgery import outline


def save_pruned(path: str | Path, model: LanguageModel) -> Path:
    """Write a model of plain weights, such as `shrink` or `prune` returned.

    Raises ValueError for one that is not (a quantized model has a saver of its own).
    """
    fits = _named_shapes(model) == _named_shapes(thin_outline(model.config))
    require(fits, "the model's tensors are not those of its config; only plain models are saved")
    return save_tensors(path, distinct_tensors(model), {"config": asdict(model.config)})


def load_pruned(path: str | Path) -> LanguageModel:
    """The model that `save_pruned` wrote, ready to read.

    Raises FileNotFoundError, or ValueError for a damaged file or one that holds something else.
    """
    tensors, about = load_tensors(path)
    try:
        kind = ThinConfig if "head_size" in about["config"] else ModelConfig
        return _filled(thin_outline(kind(**about["config"])), tensors)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not hold a pruned model: {error}") from error


def thin_outline(config: ModelConfig) -> LanguageModel:
    """A model of shapes alone, as `companion.surgery.outline` makes, also for a `ThinConfig`."""
    model = outline(full_shape(config))
    inner, kv_inner = (n * config.head_width for n in (config.heads, config.kv_heads))
    rows = {"query": inner, "key": kv_inner, "value": kv_inner}
    shapes = {name: (size, config.width) for name, size in rows.items()}
    shapes["out"] = (config.width, inner)
    thin = {
        f"blocks.{layer}.attention.{name}": torch.empty(shape, device="meta")
        for layer in range(config.layers)
        for name, shape in shapes.items()
    }
    model = with_weights(model, thin)
    model.config = config
    for block in model.blocks:
        block.attention.heads, block.attention.kv_heads = config.heads, config.kv_heads
    return model


def _filled(model: LanguageModel, tensors: dict[str, Tensor]) -> LanguageModel:
    """The weights put in place; load_state_dict raises RuntimeError for shapes that differ."""
    expected = {name for name, _ in model.named_parameters()}  # a tied head is named once
    require(tensors.keys() == expected, f"other tensors: {sorted(tensors.keys() ^ expected)[:3]}")
    model.load_state_dict(tensors, assign=True, strict=False)
    if model.config.tied:
        model.head.weight = model.embedding.weight
    model.cos, model.sin = (t.to(model.norm.weight.dtype) for t in rotary_angles(model.config))
    return model.eval()


def _named_shapes(model: LanguageModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}

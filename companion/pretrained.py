"""The two ready models: `tiny`, trained by this project and shipped, and SmolLM2 from PyPI.

`tiny` has about 5 million parameters and has read the Python library; `companion.pretraining` makes
it. SmolLM2-135M is a real language model that comes inside a package; `companion.smollm2` reads it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from companion.checks import require
from companion.data import documents, manifest
from companion.model import LanguageModel, ModelConfig
from companion.smollm2 import smollm2, smollm2_tokenizer
from companion.storage import load_json, load_tensors
from companion.surgery import assembled
from companion.tokenization import Tokenizer

__all__ = ["overlap", "smollm2", "smollm2_tokenizer", "tiny", "tiny_recipe", "tiny_tokenizer"]

FOLDER = Path(__file__).parent / "weights"


def tiny(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, folder: Path = FOLDER
) -> LanguageModel:
    """The shipped model, ready to use. Its BF16 weights are widened to `dtype`.

    Raises FileNotFoundError or ValueError where a file is missing, damaged, or not the one that
    the recipe describes.
    """
    recipe = tiny_recipe(folder=folder)
    tensors, about = load_tensors(_verified(folder, recipe, "tiny.safetensors"))
    return assembled(ModelConfig(**about["config"]), tensors, device=device, dtype=dtype)


def tiny_tokenizer(*, folder: Path = FOLDER) -> Tokenizer:
    """The byte-pair tokenizer of `tiny`: 1,024 tokens learned from its training texts."""
    return Tokenizer.load(_verified(folder, tiny_recipe(folder=folder), "tiny_tokenizer.json"))


def tiny_recipe(*, folder: Path = FOLDER) -> dict:
    """How `tiny` was made and what it reached: settings, versions, texts, loss curve, quality."""
    return load_json(folder / "tiny.json")


def overlap(recipe: dict, kind: str, split: str) -> float:
    """Share of the characters of this Python's texts that stood alike in the recipe's Python."""
    texts, here = documents(kind, split), manifest(kind, split)
    there = recipe["manifest"][kind][split]
    alike = sum(len(text) for name, text in texts.items() if there.get(name) == here[name])
    return alike / sum(map(len, texts.values()))


def _verified(folder: Path, recipe: dict, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; restore it from the repository")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    advice = "it is truncated or altered; restore it from the repository"
    require(digest == recipe["sha256"][name], f"{path} is not the file of its recipe: {advice}")
    return path

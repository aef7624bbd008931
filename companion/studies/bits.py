"""Bits against quality after training: SmolLM2 and `tiny`, rounded in three ways.

Each point quantizes a model anew (embedding and head at 8 bits) and judges it on held-out prose.
SmolLM2's weights were 4-bit numbers in groups of 32 before (its file holds them so), which the
groups of 64 and more, and grids that have no free offset, do not profit from; `tiny`, whose weights
never were, is beside it for comparison. GPTQ and AWQ see training prose.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from companion.calibration import Inputs, observe
from companion.data import Passage
from companion.memory import stored_bytes
from companion.model import LanguageModel
from companion.pretrained import FOLDER, smollm2, smollm2_tokenizer, tiny, tiny_tokenizer
from companion.quality import Quality, judge
from companion.quantization import nearest, quantize
from companion.quantization.awq import awq
from companion.quantization.gptq import gptq
from companion.quantization.replacing import Rounding
from companion.studies.study import Study
from companion.studies.texts import calibration, excess, first_tokens, held_out

MODELS = {"SmolLM2": (smollm2, smollm2_tokenizer), "tiny": (tiny, tiny_tokenizer)}
SIZES = {"SmolLM2": (4, 511), "tiny": (8, 511)}  # windows judged on a seed, tokens a window
CALIBRATED = 8  # windows
METHODS = ("nearest", "gptq", "awq")
BITS = (8, 6, 4, 3, 2)
GROUPS = {"SmolLM2": ("row", 192, 64, 32), "tiny": ("row", 64, 32)}  # what divides all widths


def run(
    *, seed: int, model: str, method: str, bits: int, group: int | str
) -> dict[str, float | list[float]]:
    """Nats per token more than the plain model, and stored bytes of the quantized one."""
    changed = quantize(loaded(model), bits, group=group, rounding=_rounding(model, method, seed))
    found = judge(text_of(model, seed), {"": changed})[""]
    return {"bytes": stored_bytes(changed), **excess(found, _judged(model, seed))}


def live(*, model: str, method: str, bits: int, group: int | str) -> dict[str, float | list[float]]:
    """The first window of the first seed: "first window", nats per token more than the plain."""
    plain = loaded(model)
    changed = quantize(plain, bits, group=group, rounding=_rounding(model, method, 0))
    found = judge(first_tokens(text_of(model, 0)), {"plain": plain, "changed": changed})
    return excess(found["changed"], found["plain"])


@lru_cache
def loaded(model: str) -> LanguageModel:
    return MODELS[model][0]()


@lru_cache
def text_of(model: str, seed: int) -> Passage:
    windows, length = SIZES[model]
    tokenizer = MODELS[model][1]()
    return held_out(tokenizer, kind="prose", seed=seed, windows=windows, length=length)


@lru_cache
def _judged(model: str, seed: int) -> Quality:
    return judge(text_of(model, seed), {"": loaded(model)})[""]


@lru_cache(maxsize=2)
def _seen(model: str, seed: int) -> dict[str, Inputs]:
    tokenizer, length = MODELS[model][1](), SIZES[model][1]
    options = {"kind": "prose", "windows": CALIBRATED, "length": length}
    with torch.inference_mode():
        return observe(loaded(model), calibration(tokenizer, seed=seed, **options))


@lru_cache(maxsize=4)
def _rounding(model: str, method: str, seed: int) -> Rounding:
    if method == "nearest":
        return nearest
    return {"gptq": gptq, "awq": awq}[method](_seen(model, seed))


STUDY = Study(
    title="Nats per token lost to fewer bits a weight, by method, bits and group",
    point=run,
    settings={
        f"{model}, {method}, {bits} bits, {group}": {
            **{"model": model, "method": method, "bits": bits, "group": group}
        }
        for model in MODELS
        for method in METHODS
        for bits in BITS
        for group in GROUPS[model]
    },
    seeds=(0, 1),
    files=(FOLDER / "tiny.safetensors", FOLDER / "tiny_tokenizer.json"),
)

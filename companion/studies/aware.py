"""Training after rounding: what it gives back to `tiny` at four, three and two bits.

`tiny` is rounded as it is (to the nearest code, and by GPTQ), trained on in FP32 and then rounded,
or trained on through its rounded weights (quantization-aware). The text is what it was trained on,
the same windows and rates for both; without the training in FP32 beside it, what any further
training gives would be counted for the rounding. Judged is held-out source, in bits per byte.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from companion.calibration import observe
from companion.data import Passage, validation
from companion.model import LanguageModel
from companion.pretrained import FOLDER, tiny, tiny_tokenizer
from companion.quality import judge
from companion.quantization import quantize
from companion.quantization.aware import aware_step
from companion.quantization.gptq import gptq
from companion.studies.size import TextWindows, training_text
from companion.studies.study import Study
from companion.studies.texts import calibration
from companion.surgery import copied
from companion.training import Step, adamw, cosine, plain_step, train

GROUP = 64
STEPS, WARMUP, EARLY = 240, 10, 12  # steps of 2 windows of 256 tokens
FLOOR = 0.05  # the last learning rate as a share of the highest
JUDGED, GLANCE = 60_000, 8_000  # characters; for the figures taken early


def run(*, seed: int, bits: int, rate: float) -> dict[str, float]:
    """Bits per byte of each way to `bits`, and of the models in FP32."""
    plain, more = tiny(), trained(seed, STEPS, rate)
    seen = observe(plain, calibration(tiny_tokenizer(), **_calibration(seed)))
    through = trained(seed, STEPS, rate, aware_step(bits, group=GROUP))
    models = {
        "plain": plain,
        "trained on": more,
        "nearest": quantize(plain, bits, group=GROUP),
        "gptq": quantize(plain, bits, group=GROUP, rounding=gptq(seen)),
        "trained on, nearest": quantize(more, bits, group=GROUP),
        "aware": quantize(through, bits, group=GROUP),
    }
    return _bits_per_byte(models, JUDGED) | early(seed=seed, bits=bits, rate=rate)


def early(*, seed: int, bits: int, rate: float) -> dict[str, float]:
    """The first steps of the aware training: bits per byte before and after them."""
    through = trained(seed, EARLY, rate, aware_step(bits, group=GROUP))
    models = {
        "early before": quantize(tiny(), bits, group=GROUP),
        "early aware": quantize(through, bits, group=GROUP),
    }
    return _bits_per_byte(models, GLANCE)


def trained(seed: int, steps: int, rate: float, step: Step = plain_step) -> LanguageModel:
    """`tiny` after the first steps of a training that is planned for all of them."""
    model = copied(tiny())
    schedule = cosine(STEPS, warmup=WARMUP, floor=FLOOR)
    windows = TextWindows(training_text(), tiny_tokenizer(), seed)
    optimizer = adamw(model, rate)
    train(model, windows, steps=steps, optimizer=optimizer, schedule=schedule, step=step)
    return model


def _calibration(seed: int) -> dict:
    return {"kind": "source", "seed": seed, "windows": 16, "length": 511}


@lru_cache
def _text(characters: int) -> Passage:
    return validation(tiny_tokenizer(), kind="source", characters=characters)


def _bits_per_byte(models: dict[str, torch.nn.Module], characters: int) -> dict[str, float]:
    found = judge(_text(characters), models)
    return {name: quality.bits_per_byte().estimate for name, quality in found.items()}


STUDY = Study(
    title="Bits per byte of `tiny` in few bits, rounded or trained through the rounding",
    point=run,
    settings={  # of 2e-4, 1e-3 and 3e-3, 60 steps liked the first at 3 bits, the second at 2
        "4 bits": {"bits": 4, "rate": 1e-4},
        "3 bits": {"bits": 3, "rate": 2e-4},
        "2 bits": {"bits": 2, "rate": 6e-4},
    },
    seeds=(0, 1, 2),
    files=(FOLDER / "tiny.safetensors", FOLDER / "tiny_tokenizer.json"),
)

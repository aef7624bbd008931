"""How far a student gets: a quarter of `tiny`, on a million tokens, with its teacher and without.

The short trainings of the study `distillation` compare ways of teaching; this one lets two of them
run seven times as long, to see whether what a teacher gives early is still there later. Plain
training is also given as much time as imitation takes. Judged is held-out source.
"""

from __future__ import annotations

import time
from functools import lru_cache

from companion.data import Passage, validation
from companion.distillation import QUARTER, imitation_step, new_student
from companion.model import LanguageModel
from companion.pretrained import FOLDER, tiny, tiny_tokenizer
from companion.quality import judge
from companion.studies.size import TextWindows, training_text
from companion.studies.study import Study
from companion.training import adamw, cosine, plain_step, train

RATE, WARMUP, FLOOR = 3e-3, 20, 0.05  # highest learning rate; steps; the last as a share of it
STEPS, AS_LONG = 2_000, 3_870  # of 2 windows of 256 tokens; plain ones in the time of imitation
JUDGED = 40_000  # characters


def run(*, seed: int, lesson: str, steps: int) -> dict[str, float]:
    """Bits per byte of student and teacher; agreement, a share of tokens; seconds of training."""
    model = new_student(tiny(), QUARTER, seed=seed)
    step = imitation_step(tiny()) if lesson == "imitation" else plain_step
    schedule = cosine(steps, warmup=WARMUP, floor=FLOOR)
    windows, start = _windows(seed), time.perf_counter()
    how = {"optimizer": adamw(model, RATE), "schedule": schedule, "step": step}
    train(model, windows, steps=steps, **how)
    seconds = time.perf_counter() - start
    return _judged(model) | {"seconds": seconds}


def _windows(seed: int) -> TextWindows:
    return TextWindows(training_text(), tiny_tokenizer(), seed)


def _judged(model: LanguageModel) -> dict[str, float]:
    found = judge(_text(), {"teacher": tiny(), "student": model})
    return {
        "source": found["student"].bits_per_byte().estimate,
        "teacher": found["teacher"].bits_per_byte().estimate,
        "agreement": found["student"].agreement().estimate,
    }


@lru_cache
def _text() -> Passage:
    return validation(tiny_tokenizer(), kind="source", characters=JUDGED)


STUDY = Study(
    title="Bits per byte of a quarter of `tiny` after a million tokens, taught by it or not",
    point=run,
    settings={
        "plain": {"lesson": "plain", "steps": STEPS},
        "imitation": {"lesson": "imitation", "steps": STEPS},
        "plain, as long": {"lesson": "plain", "steps": AS_LONG},
    },
    seeds=(0, 1, 2),
    files=(FOLDER / "tiny.safetensors", FOLDER / "tiny_tokenizer.json"),
)

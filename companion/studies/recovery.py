"""Training after pruning: what it gives back to `tiny` at half and at three quarters of zeros.

Every way takes the same number of steps on the same windows, at one rate for each sparsity: pruned
at once and trained on with its masks, with the labels or by imitating the dense model; pruned in
four rounds; pruned little by little; and without masks, where the zeros grow back. Beside them
stands the dense model trained on as long (the control): without it, what any further training gives
would be counted for the recovery. Judged is held-out source, in bits per byte.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor, nn

from companion.calibration import observe
from companion.data import Passage, validation
from companion.distillation import imitation_step
from companion.model import LanguageModel
from companion.pretrained import FOLDER, tiny, tiny_tokenizer
from companion.pruning import (
    gradual,
    iterative,
    one_shot,
    prune,
    prune_and_train,
    sparsegpt,
    total_sparsity,
)
from companion.pruning.schedules import Pruner
from companion.quality import judge
from companion.studies.size import TextWindows, training_text
from companion.studies.study import Study
from companion.studies.texts import calibration
from companion.surgery import copied
from companion.training import adamw, cosine, plain_step, train

STEPS, WARMUP, EARLY = 150, 10, 8  # steps of 2 windows of 256 tokens
FLOOR = 0.05  # the last learning rate as a share of the highest
RATES = {0.5: 3e-4, 0.75: 2e-3}  # twice as much was hardly better after 50 steps
JUDGED, GLANCE = 60_000, 8_000  # characters; for the figures taken early
PLANS = {"one shot": one_shot, "imitation": one_shot, "rounds": iterative, "gradual": gradual}


def run(*, seed: int, share: float, criterion: str, way: str) -> dict[str, float]:
    """Bits per byte: dense, dense trained on, pruned, and pruned and trained on; share of zeros."""
    recovered = trained(seed, share, criterion, way)
    found = {
        "dense": _dense(),
        "control": _control(seed, RATES[share]),
        "pruned": _pruned(seed, share, criterion),
        "recovered": _bits_per_byte(recovered),
        "zeros": total_sparsity(recovered),
    }
    first = (criterion, way) == ("magnitude", "one shot")
    return found | (early(seed=seed, share=share) if first else {})


def early(*, seed: int, share: float) -> dict[str, float]:
    """Pruned by magnitude at once: bits per byte before the first steps with masks, and after."""
    recovered = trained(seed, share, "magnitude", "one shot", EARLY)
    models = {"early before": prune(tiny(), share), "early": recovered}
    return {name: _bits_per_byte(model, GLANCE) for name, model in models.items()}


def trained(seed: int, share: float, criterion: str, way: str, steps: int = STEPS) -> LanguageModel:
    """`tiny`, pruned and trained on for the first `steps` of a training planned for all."""
    pruner, rate = _pruner(criterion, seed), RATES[share]
    if way == "no masks":
        return _trained_on(pruner(tiny(), share), seed, rate)
    return prune_and_train(
        tiny(),
        TextWindows(training_text(), tiny_tokenizer(), seed),
        PLANS[way](share, steps),
        pruner=pruner,
        rate=rate,
        schedule=cosine(STEPS, warmup=WARMUP, floor=FLOOR),
        step=imitation_step(tiny()) if way == "imitation" else plain_step,
    )


def _trained_on(model: LanguageModel, seed: int, rate: float) -> LanguageModel:
    new = copied(model)
    windows = TextWindows(training_text(), tiny_tokenizer(), seed)
    schedule = cosine(STEPS, warmup=WARMUP, floor=FLOOR)
    train(new, windows, steps=STEPS, optimizer=adamw(new, rate), schedule=schedule)
    return new


def _pruner(criterion: str, seed: int) -> Pruner:
    def by_sparsegpt(model: LanguageModel, share: float) -> LanguageModel:
        return prune(model, share, method=sparsegpt(observe(model, _windows(seed))))

    return by_sparsegpt if criterion == "SparseGPT" else prune


def _windows(seed: int) -> list[Tensor]:
    return calibration(tiny_tokenizer(), kind="source", seed=seed, windows=16, length=511)


@lru_cache
def _dense() -> float:
    return _bits_per_byte(tiny())


@lru_cache
def _control(seed: int, rate: float) -> float:
    return _bits_per_byte(_trained_on(tiny(), seed, rate))


@lru_cache
def _pruned(seed: int, share: float, criterion: str) -> float:
    return _bits_per_byte(_pruner(criterion, seed)(tiny(), share))


def _bits_per_byte(model: nn.Module, characters: int = JUDGED) -> float:
    return judge(_text(characters), {"": model})[""].bits_per_byte().estimate


@lru_cache
def _text(characters: int) -> Passage:
    return validation(tiny_tokenizer(), kind="source", characters=characters)


WAYS = (
    *(("magnitude", way) for way in ("one shot", "imitation", "rounds", "gradual")),
    *(("SparseGPT", way) for way in ("one shot", "imitation")),
)

STUDY = Study(
    title="Bits per byte of `tiny` after pruning and after training it on, by schedule",
    point=run,
    settings={
        f"{share:.0%}, {criterion}, {way}": {"share": share, "criterion": criterion, "way": way}
        for share in RATES
        for criterion, way in (*WAYS, *([("magnitude", "no masks")] if share > 0.5 else []))
    },
    seeds=(0, 1, 2),
    files=(FOLDER / "tiny.safetensors", FOLDER / "tiny_tokenizer.json"),
)

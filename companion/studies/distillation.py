"""When a teacher helps: students of `tiny`, a quarter and a tenth of its size, taught in many ways.

Every student starts untrained, and all of one size have the same learning rate and schedule. They
are judged on held-out source. The teacher's reading is not free, so the time of every training is
kept, and beside equal steps there is plain training for as long as imitation takes.

    quarter, tenth   on much text: plain, imitation, and plain for as long as imitation took
    few steps        the same, stopped early
    few labels       20,480 labelled tokens, round after round: plain and imitation; and text that
                     the teacher writes. Imitation of other text, without its labels, is "quarter,
                     imitation": it looks at no label
    short            temperature and share of the labels, other divergences, hidden states, stored
                     logits, text that the student writes; for most, the teacher reads ahead
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import Tensor

from companion.data import Passage, validation
from companion.decoding import generate
from companion.distillation import (
    QUARTER,
    TENTH,
    Remembering,
    Shuffled,
    TopLogits,
    hidden_step,
    imitation_step,
    in_turn,
    jensen_shannon,
    new_student,
    offline_step,
    on_policy_step,
    renormalised,
    reverse_kl,
    store_top,
    teacher_text,
    with_rest,
)
from companion.distillation.sequences import pieces
from companion.distillation.steps import scores
from companion.model import LanguageModel
from companion.pretrained import FOLDER, tiny, tiny_tokenizer
from companion.quality import judge
from companion.studies.size import TextWindows, training_text
from companion.studies.study import Study
from companion.training import Batched, Step, adamw, cosine, plain_step, train

SHAPES = {"quarter": QUARTER, "tenth": TENTH}
RATES = {"quarter": 3e-3, "tenth": 4e-3}  # the highest; twice as much was no better
LONG, SHORT, FEW = 300, 120, 60  # steps of 2 windows of 256 tokens
AS_LONG = {"quarter": 580, "tenth": 770}  # plain steps in the time of LONG with imitation
WARMUP, FLOOR = 20, 0.05  # steps; the last learning rate as a share of the highest
EARLY = 20  # steps after which quality is first taken
LABELLED = 40  # batches that have labels where labels are few
PROMPT, NEW = 16, 48  # tokens that lead in a text, and that the student writes
TEXTS = 320  # that the teacher writes, of 256 tokens with their prompt
KEPT = 8  # logits stored a position
OWN = 40  # steps at the end of a short training, on text that the student writes
JUDGED, GLANCE = 40_000, 8_000  # characters; the second for what is taken early


def run(
    *, seed: int, student: str, lesson: str, steps: int, text: str = "much", **options
) -> dict[str, float]:
    """Train one student and judge it, at the end and early on.

    "source" and "early source" are bits per byte, as is the "teacher"; see `_judged` for the rest.
    "seconds" are those of the training, "teacher seconds" those that the teacher took before it.
    """
    pupil = _Pupil(seed, student, lesson, steps, text, options)
    ahead = pupil.prepare()
    pupil.advance(EARLY)
    glance = _glance(pupil.model)
    pupil.advance(steps)
    return _judged(pupil.model) | glance | {"seconds": pupil.seconds, "teacher seconds": ahead}


def early(
    *, seed: int, student: str, lesson: str, steps: int, text: str = "much", **options
) -> dict[str, float]:
    """The first steps of `run` and what it takes there: "early source"."""
    pupil = _Pupil(seed, student, lesson, steps, text, options)
    pupil.advance(EARLY)
    return _glance(pupil.model)


class _Pupil:
    """One student in its training."""

    def __init__(
        self, seed: int, student: str, lesson: str, steps: int, text: str, options: dict
    ) -> None:
        self.seed, self.text = seed, text
        self.model = new_student(_teacher(), SHAPES[student], seed=seed)
        self.batches = _batches(text, seed)
        self.kept = {
            "optimizer": adamw(self.model, RATES[student]),
            "schedule": cosine(steps, warmup=WARMUP, floor=FLOOR),
            "step": _step(lesson, seed, text, options),
        }
        self.done, self.seconds = 0, 0.0

    def prepare(self) -> float:
        """Let the teacher do what it does before the training; the seconds that it took."""
        if self.text == "written":
            return _written(self.seed)[1]
        return _read(self.seed)[1] if self.text == "read" else 0.0

    def advance(self, steps: int) -> None:
        """Train until `steps` are done; only this time counts."""
        start = time.perf_counter()
        train(self.model, self.batches, start=self.done, steps=steps, **self.kept)
        self.done, self.seconds = steps, self.seconds + time.perf_counter() - start


def _batches(text: str, seed: int) -> Batched:
    """Windows (2, 256) of one kind of text."""
    if text == "few":
        return Shuffled(_few(seed), seed=seed)
    return Shuffled(_written(seed)[0], seed=seed) if text == "written" else _windows(seed)


def _step(lesson: str, seed: int, text: str, options: dict) -> Step:
    """The training step of a lesson. What is read again and again, the teacher reads once."""
    teacher = guide = _teacher()
    if text in ("few", "read"):
        guide = _guide(seed) if text == "read" else Remembering(teacher)
    made = {
        "plain": lambda: plain_step,
        "imitation": lambda: imitation_step(guide, **options),
        "reverse": lambda: imitation_step(guide, divergence=reverse_kl),
        "Jensen-Shannon": lambda: imitation_step(guide, divergence=jensen_shannon),
        "hidden": lambda: hidden_step(teacher, seed=seed),
        "stored": lambda: offline_step(_stored(seed), loss=with_rest),
        "renormalised": lambda: offline_step(_stored(seed), loss=renormalised),
        "own text": lambda: in_turn(  # a student that knows nothing would write noise
            imitation_step(guide),
            SHORT - OWN,
            on_policy_step(teacher, prompt=PROMPT, new=NEW, seed=seed),
        ),
    }
    return made[lesson]()


# --- text, and what the teacher makes of it -----------------------------------------------------


@lru_cache(maxsize=1)
def _teacher() -> LanguageModel:
    return tiny()


def _windows(seed: int | str) -> TextWindows:
    return TextWindows(training_text(), tiny_tokenizer(), seed)


def _few(seed: int) -> Tensor:
    """The few windows that have labels, (2 x LABELLED, 256)."""
    windows = _windows(f"{seed} few")
    return torch.cat([windows[index] for index in range(LABELLED)])


@lru_cache(maxsize=1)
def _written(seed: int) -> tuple[Tensor, float]:
    """Windows that the teacher wrote on from pieces of the few labelled ones, and the seconds."""
    few, start = _few(seed), time.perf_counter()
    prompts = pieces(few, PROMPT)
    prompts = prompts[:: len(prompts) // TEXTS][:TEXTS]
    texts = teacher_text(_teacher(), prompts, few.shape[1] - PROMPT, seed=seed, batch=40)
    return texts, time.perf_counter() - start


@lru_cache(maxsize=1)
def _guide(seed: int) -> Remembering:
    """The teacher of the short trainings with a seed, which all read the same text."""
    return Remembering(_teacher())


@lru_cache(maxsize=1)
def _read(seed: int) -> tuple[list[Tensor], float]:
    """The text of the short trainings, once the teacher has read it, and the seconds."""
    windows, start = [_windows(seed)[step] for step in range(SHORT)], time.perf_counter()
    for batch in windows:
        scores(_guide(seed), batch)
    return windows, time.perf_counter() - start


@lru_cache(maxsize=1)
def _stored(seed: int) -> TopLogits:
    return store_top(_guide(seed), _read(seed)[0], KEPT)


# --- judging ------------------------------------------------------------------------------------


@lru_cache
def _text(characters: int) -> Passage:
    return validation(tiny_tokenizer(), kind="source", characters=characters)


@lru_cache(maxsize=1)
def _judge_of_students() -> Remembering:
    return Remembering(_teacher())


def _glance(model: LanguageModel) -> dict[str, float]:
    found = judge(_text(GLANCE), {"": model})[""]
    return {"early source": found.bits_per_byte().estimate}


def _judged(model: LanguageModel) -> dict[str, float]:
    """On held-out source: bits per byte, and divergence (nats) and agreement with the teacher."""
    found = judge(_text(JUDGED), {"teacher": _judge_of_students(), "student": model})
    return {
        "source": found["student"].bits_per_byte().estimate,
        "teacher": found["teacher"].bits_per_byte().estimate,
        "divergence": found["student"].divergence().estimate,
        "agreement": found["student"].agreement().estimate,
        "own divergence": _own_divergence(model),
    }


def _own_divergence(model: LanguageModel) -> float:
    """KL(student || teacher) on what the student writes, in nats per token: does it make sense?"""
    prompts = pieces(_text(GLANCE).tokens[None], PROMPT + NEW)[:24, :PROMPT]
    texts = generate(model, prompts, NEW, temperature=1.0)
    with torch.no_grad():
        return reverse_kl(model(texts), _teacher()(texts))[:, PROMPT - 1 : -1].mean().item()


def _setting(student: str, lesson: str, steps: int = LONG, **options) -> dict:
    return {"student": student, "lesson": lesson, "steps": steps, **options}


def _short(lesson: str, **options) -> dict:
    return _setting("quarter", lesson, SHORT, text="read", **options)


STUDY = Study(
    title="Bits per byte of students of `tiny` on held-out source, by how they were taught",
    point=run,
    settings={
        "quarter, plain": _setting("quarter", "plain"),
        "quarter, imitation": _setting("quarter", "imitation"),
        "quarter, plain, as long": _setting("quarter", "plain", AS_LONG["quarter"]),
        "tenth, plain": _setting("tenth", "plain"),
        "tenth, imitation": _setting("tenth", "imitation"),
        "tenth, plain, as long": _setting("tenth", "plain", AS_LONG["tenth"]),
        "few steps, plain": _setting("quarter", "plain", FEW),
        "few steps, imitation": _setting("quarter", "imitation", FEW),
        "few labels, plain": _setting("quarter", "plain", text="few"),
        "few labels, imitation": _setting("quarter", "imitation", text="few"),
        "few labels, teacher's text": _setting("quarter", "plain", text="written"),
        "few labels, teacher's text, imitation": _setting("quarter", "imitation", text="written"),
        "short, plain": _setting("quarter", "plain", SHORT),
        **{
            f"short, T {temperature}, hard {hard}": _short(
                "imitation", temperature=float(temperature), hard=hard
            )
            for temperature in (1, 2, 4)
            for hard in (0.0, 0.5)
        },
        "short, reverse": _short("reverse"),
        "short, Jensen-Shannon": _short("Jensen-Shannon"),
        "short, hidden": _setting("quarter", "hidden", SHORT),
        "short, stored": _short("stored"),
        "short, stored, renormalised": _short("renormalised"),
        "short, own text": _short("own text"),
    },
    seeds=(0, 1, 2, 3, 4),
    files=(FOLDER / "tiny.safetensors", FOLDER / "tiny_tokenizer.json"),
)

"""A small corpus read many times: when does a model start to learn it by heart, and what helps?

The base is a model of 0.30 M parameters that reads 16,000 tokens forty times over. Everything else
changes one thing: eight times as much text, a smaller model, stronger weight decay, dropout; all
take the same number of steps. Early stopping needs no training of its own: it is any of these, left
at the look where the validation loss was lowest. All settings of a seed read the same corpus.

Two held-out texts keep this honest. Looks are taken on the first, "validation"; what is reported is
the second, "test", which chose nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from companion.checks import require_whole
from companion.data import Batches, Passage, documents, join_tokens, passage, validation
from companion.dropout import with_dropout
from companion.model import LanguageModel, ModelConfig
from companion.pretrained import FOLDER, tiny_tokenizer
from companion.quality import judge
from companion.studies.study import Study
from companion.training import adamw, cosine, train

CONTEXT, BATCH = 256, 4  # tokens a window, windows a step
CORPUS, MORE = 16_000, 8  # tokens of the small corpus; how many times as many the large one has
STEPS, EVERY, WARMUP, FLOOR = 640, 40, 40, 0.1  # 41 passes over the small corpus, 16 looks
SHAPE = {"layers": 2, "heads": 3, "kv_heads": 1, "width": 96, "hidden": 264}
SMALLER = {"layers": 1, "heads": 2, "kv_heads": 1, "width": 32, "hidden": 88}
RATE = 4e-3
LOOKED, JUDGED = 12_000, 60_000  # characters: of both texts together, the second has the rest


@dataclass(frozen=True)
class Looks:
    """Nats per token at every look: on what is trained on, and on held-out texts."""

    train: list[float]
    validation: list[float]
    test: list[float]

    def results(self) -> dict[str, float | list[float]]:
        """The curves, the test loss at the end, and at the look with the best validation loss."""
        best = self.validation.index(min(self.validation))
        return {
            **{"train": self.train, "validation": self.validation},
            **{"test": self.test[-1], "stopped": self.test[best]},
            "stopped at": (best + 1) * EVERY,
        }


def run(
    *, seed: int, more: bool = False, smaller: bool = False, decay: float = 0.1, drop: float = 0.0
) -> dict[str, float | list[float]]:
    """Train and look: see `Looks.results`. "stopped at" is a number of steps."""
    return looks(seed, STEPS, more=more, smaller=smaller, decay=decay, drop=drop).results()


def early(*, seed: int, **setting: bool | float) -> dict[str, float]:
    """What `run` sees at its first look: the first entries of its curves."""
    found = looks(seed, EVERY, texts=("train", "validation"), **setting)
    return {"train": found.train[0], "validation": found.validation[0]}


def looks(
    seed: int,
    steps: int,
    *,
    texts: tuple[str, ...] = ("train", "validation", "test"),
    more: bool = False,
    smaller: bool = False,
    decay: float = 0.1,
    drop: float = 0.0,
) -> Looks:
    """The first `steps` steps of a training, with a look at the texts after every `EVERY`."""
    require_whole("seed", seed, least=0)
    tokens = corpus(seed, CORPUS * (MORE if more else 1))
    known = {"train": seen(seed), **held_out()}
    looked_at = {name: known[name] for name in texts}
    found = Looks([], [], [])
    with torch.random.fork_rng(devices=[]):  # dropout draws from torch's random numbers
        torch.manual_seed(seed)
        model = with_dropout(new_model(SMALLER if smaller else SHAPE), drop)

        def look(step: int, loss: float) -> None:
            if (step + 1) % EVERY == 0:
                for name, nats in judged(model, looked_at).items():
                    getattr(found, name).append(nats)

        batches = Batches(tokens, batch=BATCH, context=CONTEXT, seed=seed)
        schedule = cosine(STEPS, warmup=WARMUP, floor=FLOOR)
        optimizer = adamw(model, RATE, decay=decay)
        train(model, batches, steps=steps, optimizer=optimizer, schedule=schedule, after=look)
    return found


def new_model(shape: dict[str, int]) -> LanguageModel:
    return LanguageModel(ModelConfig(vocab=tiny_tokenizer().vocab, context=CONTEXT, **shape))


def judged(model: LanguageModel, texts: dict[str, Passage]) -> dict[str, float]:
    """Nats per token of each text, with nothing dropped; the model trains on afterwards."""
    model.eval()
    found = {
        name: judge(text, {"": model})[""].nats_per_token().estimate for name, text in texts.items()
    }
    model.train()
    return {name: round(nats, 5) for name, nats in found.items()}


@lru_cache(maxsize=2)
def corpus(seed: int, tokens: int) -> Tensor:
    """A line of so many tokens of training sources; a longer one begins with the shorter."""
    texts = documents("source", "train")
    order = sorted(texts, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).hexdigest())
    line, count = [], 0
    for name in order:
        if count >= tokens:
            break
        line.append(join_tokens([texts[name]], tiny_tokenizer()))
        count += len(line[-1])
    return torch.cat(line)[:tokens]


def seen(seed: int) -> Passage:
    """The beginning of the small corpus, which every setting is trained on."""
    tokenizer = tiny_tokenizer()
    text = tokenizer.decode(corpus(seed, CORPUS).tolist()[1:])
    return passage(text[:LOOKED], tokenizer, window=CONTEXT - 1)


@lru_cache(maxsize=1)
def held_out() -> dict[str, Passage]:
    """Two texts from different documents: "validation", which is looked at, and "test"."""
    whole = validation(tiny_tokenizer(), kind="source", characters=JUDGED, window=CONTEXT - 1)
    first = len(whole.tokens) * LOOKED // JUDGED // whole.window * whole.window
    parts = {"validation": slice(0, first), "test": slice(first, None)}
    return {
        name: replace(whole, tokens=whole.tokens[part], byte_counts=whole.byte_counts[part])
        for name, part in parts.items()
    }


STUDY = Study(
    title="Nats per token on a small corpus and on held-out text, by what is done against it",
    point=run,
    settings={
        "base": {},
        "more text": {"more": True},
        "smaller model": {"smaller": True},
        "weight decay": {"decay": 1.0},
        "dropout": {"drop": 0.2},
        "decay and dropout": {"decay": 1.0, "drop": 0.2},
    },
    seeds=(0, 1, 2),
    files=(FOLDER / "tiny_tokenizer.json",),
)

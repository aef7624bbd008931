"""How the loss falls as a model grows, all else equal: four sizes of `tiny`, the same tokens.

Each model reads 400,000 tokens of the texts that `tiny` was trained on, with the same tokenizer,
schedule and batches. Only the shape differs, and with it the learning rate, which falls as
1 / width so that no size is at a disadvantage (arXiv:2203.03466). Quality is also taken early in
the run, so that a page can train the smallest model that far and compare like with like.
"""

from __future__ import annotations

import random
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim import Optimizer

from companion.checks import require_whole
from companion.cost import parameters
from companion.data import KINDS, documents, validation
from companion.model import LanguageModel, ModelConfig
from companion.pretrained import FOLDER, tiny_tokenizer
from companion.quality import judge
from companion.studies.study import Study
from companion.tokenization import Tokenizer
from companion.training import adamw, cosine, train

CONTEXT, BATCH = 256, 2  # tokens a window, windows a step
STEPS = 400_000 // (CONTEXT * BATCH)
EARLY = 40_000 // (CONTEXT * BATCH)  # steps after which quality is first taken
WARMUP, FLOOR = 50, 0.05  # steps; the last learning rate as a share of the highest
PROSE = 3  # how often the prose, twenty times shorter, stands beside the source
JUDGED = 60_000  # characters of held-out text of each kind


class TextWindows:
    """Random windows of a text: `windows[step]` is (batch, context) token ids.

    A window is encoded when it is asked for, so a short run need not encode the whole text. Which
    ones come depends on (seed, step) alone.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, seed: int) -> None:
        self.text, self.tokenizer, self.seed = text, tokenizer, seed

    def __getitem__(self, step: int) -> Tensor:
        chance = random.Random(f"{self.seed}/{step}")
        return torch.tensor([self._window(chance) for _ in range(BATCH)])

    def _window(self, chance: random.Random) -> list[int]:
        ids: list[int] = []
        while len(ids) < CONTEXT:  # a text of long tokens may be too short: take another
            start = chance.randrange(len(self.text))
            ids = self.tokenizer.encode(self.text[start : start + 6 * CONTEXT])
        return ids[:CONTEXT]


@lru_cache(maxsize=1)
def training_text() -> str:
    """All training texts as one: every source once, every prose text three times."""
    prose = documents("prose", "train").values()
    return "\n\n".join([*documents("source", "train").values(), *(list(prose) * PROSE)])


def run(*, seed: int, rate: float, **shape: int) -> dict[str, float | list[float]]:
    """Train one model of this shape to the end: bits per byte early and at the end, and the curve.

    `rate` is the highest learning rate; the curve is the mean loss of every 20 steps, in nats per
    token.
    """
    model, optimizer = _start(seed, rate, shape)
    losses = _advance(model, optimizer, seed, 0, EARLY)
    results = _bits_per_byte(model, "early ")
    losses += _advance(model, optimizer, seed, EARLY, STEPS)
    curve = [sum(part) / len(part) for part in (losses[i : i + 20] for i in range(0, STEPS, 20))]
    return {
        "parameters": parameters(model.config),
        **results,
        **_bits_per_byte(model, ""),
        "losses": [round(loss, 4) for loss in curve],
    }


def early(*, seed: int, rate: float, **shape: int) -> dict[str, float]:
    """The first steps of `run` and what it takes there: "early source" and "early prose"."""
    model, optimizer = _start(seed, rate, shape)
    _advance(model, optimizer, seed, 0, EARLY)
    return _bits_per_byte(model, "early ")


def _start(seed: int, rate: float, shape: dict) -> tuple[LanguageModel, Optimizer]:
    require_whole("seed", seed, least=0)
    config = ModelConfig(vocab=tiny_tokenizer().vocab, context=CONTEXT, **shape)
    with torch.random.fork_rng(devices=[]):  # leave the reader's random numbers as they are
        torch.manual_seed(seed)
        model = LanguageModel(config)
    return model, adamw(model, rate)


def _advance(
    model: LanguageModel, optimizer: Optimizer, seed: int, first: int, last: int
) -> list[float]:
    windows = TextWindows(training_text(), tiny_tokenizer(), seed)
    schedule = cosine(STEPS, warmup=WARMUP, floor=FLOOR)
    return train(model, windows, start=first, steps=last, optimizer=optimizer, schedule=schedule)


def _bits_per_byte(model: LanguageModel, prefix: str) -> dict[str, float]:
    tokenizer = tiny_tokenizer()
    found = {}
    for kind in KINDS:
        passage = validation(tokenizer, kind=kind, characters=JUDGED, window=CONTEXT - 1)
        found[f"{prefix}{kind}"] = judge(passage, {"": model})[""].bits_per_byte().estimate
    return found


def _shape(layers: int, heads: int, kv_heads: int, width: int, hidden: int, rate: float) -> dict:
    return {
        **{"layers": layers, "heads": heads, "kv_heads": kv_heads},
        **{"width": width, "hidden": hidden, "rate": rate},
    }


STUDY = Study(
    title="Bits per byte of held-out text by the number of parameters, after 400,000 tokens",
    point=run,
    settings={
        "0.16 M": _shape(2, 2, 1, 64, 176, 6e-3),
        "0.5 M": _shape(4, 3, 1, 96, 264, 4e-3),
        "1.6 M": _shape(5, 4, 2, 160, 440, 2.4e-3),
        "4.7 M": _shape(6, 4, 2, 256, 704, 1.5e-3),
    },
    seeds=(0, 1, 2),
    files=(FOLDER / "tiny_tokenizer.json",),
)

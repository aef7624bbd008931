"""Does a format learn as well as FP32? One small model trained from scratch in nine ways.

All trainings with a seed start from the same weights and read the same batches, so each is compared
with the FP32 one of its seed. "FP32, nudged" is a control: its weights start about one last digit
off, and a difference from FP32 that is no larger than its own means nothing. Every run is judged in
FP32 arithmetic on held-out source, so what counts is what was learned, not how it is read.

The plan was made by reasoning and not changed after: a step of 1,024 tokens, whose mean makes the
gradient of one logit as small as 1e-7, where FP16 runs out; a rate that falls to a hundredth, where
updates become smaller than BF16's spacing. The arithmetic is emulated, on a CPU and in FP32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from companion.checks import require_known, require_whole
from companion.data import validation
from companion.losses import next_token_loss
from companion.model import LanguageModel, ModelConfig
from companion.precision.emulation import emulated
from companion.precision.float8 import float8
from companion.precision.mixed import mixed_step
from companion.precision.policy import Policy, converted, within
from companion.precision.pure import pure, pure_adamw
from companion.precision.scaling import LossScale, static
from companion.pretrained import FOLDER, tiny_tokenizer
from companion.quality import judge
from companion.studies.size import CONTEXT, TextWindows, training_text
from companion.studies.study import Study
from companion.surgery import copied
from companion.training import Step, adamw, cosine, plain_step, train

SHAPE = {"layers": 2, "heads": 3, "kv_heads": 1, "width": 96, "hidden": 264}  # 0.30 M parameters
STEPS, WARMUP, EARLY = 400, 40, 20  # steps of 4 windows of 256 tokens
RATE, FLOOR = 4e-3, 0.01  # the `size` study's for this width; the last as a share of it
SCALE = 2.0**10  # the static one: lifts 1e-7 well above FP16's least, keeps 1 far below its most
PROBES = (80, 240, 400)  # steps after which gradients are compared with FP32's
JUDGED, GLANCE = 60_000, 8_000  # characters; the second for what is taken early


@dataclass(frozen=True)
class Way:
    """A model ready to be trained in some format, and how."""

    model: nn.Module
    optimizer: Optimizer
    step: Step = plain_step
    scale: LossScale | None = None


def run(*, seed: int, way: str) -> dict[str, float | list[float]]:
    """Train to the end: held-out nats per token, early and at the end, and what happened.

    "skipped" counts steps that loss scaling left out; "underflowed" is the share of the gradient's
    numbers that are 0 though FP32's are not, a mean over `PROBES`; "done" is below `STEPS` where a
    loss was not finite. "losses" are the means of every 10 steps, in nats per token.
    """
    trained = new_way(seed, way)
    shares: list[float] = []

    def probe(step: int, loss: float) -> None:
        if step + 1 in PROBES:
            shares.append(underflowed(trained, batch(seed, step)))

    losses = _advance(trained, seed, 0, EARLY, probe)
    results = {"early": nats(trained.model, GLANCE)}
    losses += _advance(trained, seed, EARLY, STEPS, probe) if len(losses) == EARLY else []
    tens = [losses[start : start + 10] for start in range(0, len(losses), 10)]
    return results | {
        "nats": nats(trained.model, JUDGED),
        "skipped": trained.scale.skipped if trained.scale is not None else 0,
        "underflowed": sum(shares) / len(shares) if shares else 1.0,
        "done": len(losses),
        "losses": [round(sum(ten) / len(ten), 4) for ten in tens],
    }


def early(*, seed: int, way: str) -> dict[str, float]:
    """The first steps of `run` and what it takes there: "early"."""
    trained = new_way(seed, way)
    _advance(trained, seed, 0, EARLY, lambda step, loss: None)
    return {"early": nats(trained.model, GLANCE)}


def _advance(
    way: Way, seed: int, first: int, last: int, after: Callable[[int, float], None]
) -> list[float]:
    """Losses of steps `first` to `last - 1`, or to the first that is not finite."""
    losses: list[float] = []

    def keep(step: int, loss: float) -> None:
        losses.append(loss)
        after(step, loss)

    how = {"optimizer": way.optimizer, "step": way.step, "after": keep}
    how["schedule"] = cosine(STEPS, warmup=WARMUP, floor=FLOOR)
    try:
        train(way.model, _Batches(seed), start=first, steps=last, **how)
    except FloatingPointError:  # a result too
        way.model.eval()
    return losses


# --- the ways -----------------------------------------------------------------------------------


def new_way(seed: int, way: str) -> Way:
    """A model, untrained, and how it is trained. Raises ValueError for an unknown way."""
    require_known("way", way, WAYS)
    return WAYS[way](new_model(seed), seed)


def new_model(seed: int) -> LanguageModel:
    """The untrained model of a seed, in FP32."""
    require_whole("seed", seed, least=0)
    config = ModelConfig(vocab=tiny_tokenizer().vocab, context=CONTEXT, **SHAPE)
    with torch.random.fork_rng(devices=[]):  # leave the reader's random numbers as they are
        torch.manual_seed(seed)
        return LanguageModel(config)


def _nudged(model: LanguageModel, seed: int) -> Way:
    """Every weight moved by about the spacing of FP32, up or down."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 2.0**-23 * torch.randn(weight.shape, generator=random))
    return Way(model, adamw(model, RATE))


def _mixed(format: str, make_scale: Callable[[], LossScale | None] = lambda: None):
    """Master weights in FP32, all arithmetic in the format, the loss scaled or not."""

    def make(model: LanguageModel, seed: int) -> Way:
        low, scale = emulated(model, format), make_scale()
        return Way(low, adamw(low, RATE), mixed_step(scale), scale)

    return make


class FP32Units(Policy):
    """BF16 products made by FP32 units and rounded once: the same numbers, far sooner on a CPU."""

    def __init__(self) -> None:
        super().__init__(torch.bfloat16)

    def product(self, func: Callable, inputs: tuple) -> object:
        args, kwargs = converted(inputs, Tensor.float)
        return converted(func(*args, **kwargs), Tensor.bfloat16)

    def wide(self, func: Callable, inputs: tuple) -> object:
        return self.other(func, inputs)


def _pure(stochastic: bool) -> Callable[[LanguageModel, int], Way]:
    """Weights, gradients and states in BF16; the update rounded to the nearest or by chance."""

    def make(model: LanguageModel, seed: int) -> Way:
        low, random = within(pure(model), FP32Units()), torch.Generator().manual_seed(seed)
        return Way(low, pure_adamw(low, RATE, stochastic=stochastic, generator=random))

    return make


def _float8(model: LanguageModel, seed: int) -> Way:
    low = float8(model)
    return Way(low, adamw(low, RATE))


WAYS: dict[str, Callable[[LanguageModel, int], Way]] = {
    "FP32": lambda model, seed: Way(model, adamw(model, RATE)),
    "FP32, nudged": _nudged,
    "BF16 mixed": _mixed("BF16"),
    "FP16 mixed, unscaled": _mixed("FP16"),
    "FP16 mixed, static scale": _mixed("FP16", lambda: static(SCALE)),
    "FP16 mixed, dynamic scale": _mixed("FP16", LossScale),
    "pure BF16, nearest": _pure(stochastic=False),
    "pure BF16, stochastic": _pure(stochastic=True),
    "FP8 mixed": _float8,
}


# --- text, and what is measured -----------------------------------------------------------------


@lru_cache(maxsize=STEPS)
def batch(seed: int, step: int) -> Tensor:
    """Four windows, (4, 256), the same for every way."""
    windows = TextWindows(training_text(), tiny_tokenizer(), seed)
    return torch.cat([windows[2 * step], windows[2 * step + 1]])


@dataclass(frozen=True)
class _Batches:
    seed: int

    def __getitem__(self, step: int) -> Tensor:
        return batch(self.seed, step)


def plain_copy(model: nn.Module, seed: int = 0) -> LanguageModel:
    """An ordinary FP32 model with these weights."""
    plain = new_model(seed)
    with torch.no_grad():
        for own, weight in zip(plain.parameters(), model.parameters(), strict=True):
            own.copy_(weight)
    return plain


def underflowed(way: Way, tokens: Tensor) -> float:
    """Of the numbers of FP32's gradient that are not 0, the share that this way makes 0."""
    low, plain = copied(way.model), plain_copy(way.model)
    scale = way.scale.value if way.scale is not None else 1.0
    for model, factor in ((low, scale), (plain, 1.0)):
        model.zero_grad()
        (next_token_loss(model(tokens), tokens) * factor).backward()
    lost = there = 0
    for own, exact in zip(low.parameters(), plain.parameters(), strict=True):
        there += int((exact.grad != 0).sum())
        lost += int(((own.grad == 0) & (exact.grad != 0)).sum())
    return lost / there


def nats(model: nn.Module, characters: int) -> float:
    """Held-out nats per token in FP32; ln(vocab), what guessing takes, if no number is left."""
    text = validation(tiny_tokenizer(), kind="source", characters=characters)
    found = judge(text, {"": plain_copy(model)})[""].nats_per_token().estimate
    return found if math.isfinite(found) else math.log(tiny_tokenizer().vocab)


STUDY = Study(
    title="Held-out nats per token after the same training in different formats",
    point=run,
    settings={name: {"way": name} for name in WAYS},
    seeds=(0, 1, 2, 3, 4),
    files=(FOLDER / "tiny_tokenizer.json",),
)

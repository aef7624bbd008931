"""Does the activation matter? One small model trained from scratch with five, parameters equal.

ReLU, Leaky ReLU, GELU and SiLU have two matrices and half as many neurons again as SwiGLU, which
has three. All models of a seed share every other initial weight and read the same windows; those
of two matrices share them all. Each activation is trained at its own rate, which seed 0 finds on a
ladder; further seeds are what counts, and each is compared with the SwiGLU model of its seed.

"zero" is the share of neurons, over held-out windows, whose activation is exactly 0: what a kernel
that skips them could save. "time" is left to the page, which races the activations live.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from companion.checks import require_known
from companion.data import validation
from companion.mlp_variants import NAMES, with_activation
from companion.model import LanguageModel
from companion.optimizers import Tuned, tuned_rate
from companion.pretrained import FOLDER, tiny_tokenizer
from companion.quality import judge
from companion.studies.convergence import STEPS, WARMUP, batch, new_model
from companion.studies.study import Study
from companion.training import adamw, cosine, train

START, FLOOR = 8e-3, 0.01  # the first rung; the last rate as a share of the highest
JUDGED = 60_000  # characters
EARLY = 40  # steps, after which a first look is taken


def run(*, seed: int, activation: str) -> dict[str, float | list[float]]:
    """Train at the rate that `tuned` finds: held-out nats per token, early and at the end.

    "zero" is the share of neurons that are exactly 0, "rates" and "scores" the ladder.
    """
    found = tuned(activation)
    looks: list[float] = []
    model = trained(seed, activation, found.rate, looks=looks)
    return {
        "early": looks[0],
        "nats": nats(model),
        "zero": zeros(model, batch(seed, 0)),
        "rate": found.rate,
        "rates": list(found.rates),
        "scores": list(found.scores),
    }


def early(*, seed: int, activation: str, rate: float) -> dict[str, float]:
    """The first steps of `run` at a rate, and what it takes there: "early"."""
    looks: list[float] = []
    trained(seed, activation, rate, steps=EARLY, looks=looks)
    return {"early": looks[0]}


@lru_cache
def tuned(activation: str) -> Tuned:
    """The ladder of rates, climbed once a process for all seeds."""
    return tuned_rate(lambda rate: nats(trained(0, activation, rate)), START)


def trained(
    seed: int, activation: str, rate: float, *, steps: int | None = None, looks: list | None = None
) -> LanguageModel:
    """A model after so many steps, if not all. Raises ValueError for an unknown activation."""
    model = start(seed, activation)

    def look(step: int, loss: float) -> None:
        if looks is not None and step + 1 == EARLY:
            looks.append(nats(model))

    schedule = cosine(STEPS, warmup=WARMUP, floor=FLOOR)
    how = {"optimizer": adamw(model, rate), "schedule": schedule, "after": look}
    try:
        train(model, _Batches(seed), steps=steps or STEPS, **how)
    except FloatingPointError:  # a rate too high is a result too: see `nats`
        model.eval()
    return model


def start(seed: int, activation: str) -> LanguageModel:
    """The untrained model of a seed with this activation."""
    require_known("activation", activation, NAMES)
    generator = torch.Generator().manual_seed(seed)
    return with_activation(new_model(seed), activation, generator=generator)


def nats(model: LanguageModel) -> float:
    """Held-out nats per token; what guessing takes, if the model gives no numbers."""
    tokenizer = tiny_tokenizer()
    text = validation(tokenizer, kind="source", characters=JUDGED)
    found = torch.tensor(judge(text, {"": model})[""].nats_per_token().estimate)
    guessing = torch.tensor(float(tokenizer.vocab)).log()
    return float(found if found.isfinite() else guessing)


@torch.inference_mode()
def zeros(model: LanguageModel, tokens: Tensor) -> float:
    """Share of the numbers that enter the last matrices of the MLPs and are exactly 0."""
    shares: list[float] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shares.append(float((inputs[0] == 0).double().mean()))

    hooks = [block.mlp.down.register_forward_pre_hook(look) for block in model.blocks]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(shares) / len(shares)


class _Batches:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __getitem__(self, step: int) -> Tensor:
        return batch(self.seed, step)


STUDY = Study(
    title="Held-out nats per token with five activations at equal parameters, each at its own rate",
    point=run,
    settings={name: {"activation": name} for name in NAMES},
    seeds=(1, 2, 3),  # not 0, which chose the rates
    files=(FOLDER / "tiny_tokenizer.json",),
)

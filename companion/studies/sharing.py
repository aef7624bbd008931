"""What does sharing cost, at equal parameters and at equal FLOPs? Small models from scratch.

The full model has four layers, a head of its own and as many key-value heads as query heads. Each
way of sharing is held against two models that share nothing: one that computes as much (the full
model, which holds more) and one that holds as much (fewer layers, which computes less). Grouped
heads and low-rank factors save numbers and FLOPs together; put into a wider MLP, both come back
exactly. All read the same 409,600 tokens in the same order, at the rate found for this width by the
study `size`; the full model and one block four times are trained at two other rates too, so that a
difference can be told from a rate that suits one of them better.

The last setting starts from a trained full model and changes it: before and after up-training of a
fifth of the steps, beside the full model trained on for as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.checks import require_known, require_whole
from companion.data import validation
from companion.memory import unique_parameters
from companion.model import LanguageModel, ModelConfig
from companion.pretrained import FOLDER, tiny_tokenizer
from companion.quality import judge
from companion.sharing import average, costs, cycle, first, share
from companion.studies.convergence import batch
from companion.studies.size import CONTEXT
from companion.studies.study import Study
from companion.surgery import copied
from companion.training import adamw, cosine, train

SHAPE = {"layers": 4, "heads": 4, "kv_heads": 4, "width": 96, "hidden": 264, "tied": False}
STEPS, WARMUP, EARLY = 400, 40, 20  # steps of 4 windows of 256 tokens
RATE, FLOOR = 4e-3, 0.05  # the last rate as a share of the highest
MORE, AGAIN = 80, 0.5  # steps of up-training; its highest rate as a share of `RATE`
JUDGED, GLANCE = 60_000, 8_000  # characters; the second for what is taken early
INNER, ROOM = 48, 432  # of the MLP's factors: R (W + M) is then 96 x 264, as without them

MLP = {"inner": INNER, "where": lambda name, _: name.startswith("blocks.") and ".mlp." in name}


def _way(sharing: Mapping | None = None, *, rate: float = 1.0, **shape: int) -> dict:
    return {"shape": SHAPE | shape, "sharing": dict(sharing or {}), "rate": rate * RATE}


def _heads(kv_heads: int) -> dict:
    """Untrained heads: the first of a group, for a mean would start with too small a spread."""
    return {"kv_heads": kv_heads, "pool": first}


WAYS: dict[str, dict] = {
    "4 layers": _way(),
    "2 layers": _way(layers=2),
    "1 layer": _way(layers=1),
    "repeat, 2 x 2": _way({"layers": 2}),
    "cycle, 2 x 2": _way({"layers": 2, "order": cycle}),
    "1 block, 4 times": _way({"layers": 1}),
    "tied": _way({"tied": True}),
    "tied, as many": _way({"tied": True}, hidden=349),  # 1,024 x 96 numbers are 85 neurons a layer
    "K = 2": _way(_heads(2)),
    "K = 1": _way(_heads(1)),
    "K = 2, as many": _way(_heads(2), hidden=296),  # 2 x 2 x 24 rows are 32 neurons
    "K = 1, as many": _way(_heads(1), hidden=312),
    "factors": _way(MLP),
    "factors, as many": _way(MLP, hidden=ROOM),
    "4 layers, half rate": _way(rate=0.5),
    "4 layers, double rate": _way(rate=2.0),
    "1 block, 4 times, half rate": _way({"layers": 1}, rate=0.5),
    "1 block, 4 times, double rate": _way({"layers": 1}, rate=2.0),
}

CHANGES: dict[str, Callable[[LanguageModel], LanguageModel]] = {
    "full": copied,
    "K = 2": lambda model: share(model, kv_heads=2),
    "K = 1": lambda model: share(model, kv_heads=1),
    "K = 1, first": lambda model: share(model, kv_heads=1, pool=first),
    "repeat, first": lambda model: share(model, layers=2),
    "repeat, average": lambda model: share(model, layers=2, take=average),
    "factors": lambda model: share(model, **MLP),
}


def run(*, seed: int, way: str) -> dict[str, float | list[float]]:
    """Train to the end: held-out nats per token, early and at the end, and what it took.

    "parameters" are different ones, "flops" those of a training step. "losses" are the means of
    every 10 steps, in nats per token.
    """
    if way == "from trained":
        return from_trained(seed)
    model, optimizer = _start(seed, way)
    losses = _advance(model, optimizer, seed, 0, EARLY)
    results = {"early": nats(model, GLANCE)}
    losses += _advance(model, optimizer, seed, EARLY, STEPS)
    tens = [losses[start : start + 10] for start in range(0, STEPS, 10)]
    return results | {
        "nats": nats(model, JUDGED),
        "parameters": unique_parameters(model),
        "flops": step_flops(way),
        "losses": [round(sum(ten) / len(ten), 4) for ten in tens],
    }


def early(*, seed: int, way: str) -> dict[str, float]:
    """The first steps of `run` and what it takes there: "early"."""
    model, optimizer = _start(seed, way)
    _advance(model, optimizer, seed, 0, EARLY)
    return {"early": nats(model, GLANCE)}


def from_trained(seed: int) -> dict[str, float]:
    """Nats per token of a trained full model, and of each change before and after up-training."""
    full, optimizer = _start(seed, "4 layers")
    _advance(full, optimizer, seed, 0, STEPS)
    results = {"full": nats(full, JUDGED)}
    for name, change in CHANGES.items():
        model = change(full)
        results[f"{name}, before"] = nats(model, JUDGED)
        up_train(model, seed)
        results[f"{name}, after"] = nats(model, JUDGED)
    return results


def up_train(model: LanguageModel, seed: int) -> list[float]:
    """Train on for `MORE` steps, in place, on windows that were not among those of the training."""
    windows = [batch(seed, STEPS + step) for step in range(MORE)]
    how = {"optimizer": adamw(model, AGAIN * RATE), "schedule": cosine(MORE, warmup=8, floor=FLOOR)}
    return train(model, windows, steps=MORE, **how)


def new_model(seed: int, way: str) -> LanguageModel:
    """The untrained model of a seed and a way. Raises ValueError for an unknown way."""
    require_known("way", way, WAYS)
    require_whole("seed", seed, least=0)
    shape, sharing = (WAYS[way][name] for name in ("shape", "sharing"))
    config = ModelConfig(vocab=tiny_tokenizer().vocab, context=CONTEXT, **shape)
    with torch.random.fork_rng(devices=[]):  # leave the reader's random numbers as they are
        torch.manual_seed(seed)
        model = LanguageModel(config)
    return share(model, **sharing) if sharing else model


def step_flops(way: str) -> int:
    """FLOPs of a forward and a backward pass over one batch."""
    require_known("way", way, WAYS)
    config, inner = new_model(0, way).config, WAYS[way]["sharing"].get("inner")
    rows, positions = batch(0, 0).shape
    return 3 * costs.forward_flops(config, positions, batch=rows, inner=inner, factors=costs.MLP)


def nats(model: LanguageModel, characters: int) -> float:
    """Held-out nats per token of source."""
    text = validation(tiny_tokenizer(), kind="source", characters=characters)
    return judge(text, {"": model})[""].nats_per_token().estimate


def _start(seed: int, way: str) -> tuple[LanguageModel, torch.optim.Optimizer]:
    model = new_model(seed, way)
    return model, adamw(model, WAYS[way]["rate"])


def _advance(
    model: LanguageModel, optimizer: torch.optim.Optimizer, seed: int, first: int, last: int
) -> list[float]:
    """Losses of steps `first` to `last - 1`."""
    schedule = cosine(STEPS, warmup=WARMUP, floor=FLOOR)
    how = {"optimizer": optimizer, "schedule": schedule, "start": first, "steps": last}
    return train(model, _Batches(seed), **how)


@dataclass(frozen=True)
class _Batches:
    seed: int

    def __getitem__(self, step: int) -> Tensor:
        return batch(self.seed, step)


STUDY = Study(
    title="Held-out nats per token of models that share, at equal parameters and at equal FLOPs",
    point=run,
    settings={name: {"way": name} for name in (*WAYS, "from trained")},
    seeds=(0, 1, 2),
    files=(FOLDER / "tiny_tokenizer.json",),
)

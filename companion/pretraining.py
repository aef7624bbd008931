"""How `tiny` is made: one recipe, one command, no loss when interrupted.

`python -m companion.pretraining` reads the texts of this Python, learns a tokenizer, trains, rounds
to BF16, judges and samples the rounded model, and only then replaces the shipped files. Started
again after an interruption, it goes on from its last checkpoint; given one more cycle than before,
it goes on from where the earlier cycles ended.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from companion.acceptance import accepted, sample_sources
from companion.data import KINDS, SPLITS, Batches, documents, join_tokens, manifest, passage
from companion.hardware import machine_card
from companion.model import LanguageModel, ModelConfig
from companion.optimizers import Muon
from companion.pretrained import FOLDER
from companion.quality import judge
from companion.storage import distinct_tensors, save_json, save_tensors
from companion.surgery import copied
from companion.tokenization import Tokenizer, train_tokenizer
from companion.training import load_checkpoint, restarts, save_checkpoint, train

SAVE_EVERY = 25  # steps; about a minute at one thread


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a trained `tiny` depends on, apart from the texts of the Python that trains it."""

    vocab: int = 1024
    context: int = 512
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    width: int = 256
    hidden: int = 704
    seed: int = 0
    cycles: tuple[int, ...] = (1600, 3600)  # steps from one restart of the schedule to the next
    batch: int = 6  # windows of `context` tokens a step
    rate: float = 1e-2  # of Muon
    warmup: int = 60  # steps, at the start of each cycle
    floor: float = 0.03  # the last learning rate of a cycle, as a share of `rate`
    prose: int = 3  # how often the prose, twenty times shorter, stands beside the source

    @property
    def config(self) -> ModelConfig:
        names = ("vocab", "context", "layers", "heads", "kv_heads", "width", "hidden")
        return ModelConfig(**{name: getattr(self, name) for name in names})

    @property
    def steps(self) -> int:
        return sum(self.cycles)

    def as_dict(self) -> dict:
        """The recipe as JSON can hold it."""
        return asdict(self) | {"cycles": list(self.cycles)}

    def continues(self, found: dict) -> bool:
        """Whether a checkpoint's recipe is this one, perhaps with fewer cycles."""
        done = found.get("cycles", [])
        ours = self.as_dict() | {"cycles": list(self.cycles[: len(done)])}
        return found == ours


def training_texts(recipe: Recipe) -> list[str]:
    """The texts `tiny` reads: every source once, every prose text `recipe.prose` times."""
    prose = list(documents("prose", "train").values())
    return [*documents("source", "train").values(), *(prose * recipe.prose)]


def prepare(recipe: Recipe) -> tuple[Tokenizer, Tensor]:
    """The tokenizer learned from the training texts, and those texts as one line of tokens."""
    texts = training_texts(recipe)
    tokenizer = train_tokenizer(texts, recipe.vocab)
    return tokenizer, join_tokens(texts, tokenizer)


def pretrain(recipe: Recipe, tokens: Tensor, checkpoint: Path) -> tuple[LanguageModel, dict]:
    """Train to the recipe's end, from `checkpoint` if it is there. The model, and its curve.

    Raises ValueError if the checkpoint belongs to another recipe.
    """
    torch.manual_seed(recipe.seed)
    model = LanguageModel(recipe.config)
    optimizer = Muon(model, recipe.rate)
    kept = {"recipe": recipe.as_dict(), "losses": [], "seconds": 0.0}
    start = 0
    if checkpoint.is_file():
        found = load_checkpoint(checkpoint, model, optimizer)
        if not recipe.continues(found.about["recipe"]):
            raise ValueError(f"{checkpoint} belongs to another recipe; move it away to start anew")
        start, kept = found.step, found.about | {"recipe": recipe.as_dict()}
    batches = Batches(tokens, batch=recipe.batch, context=recipe.context, seed=recipe.seed)
    clock = time.monotonic()

    def keep(step: int, loss: float) -> None:
        nonlocal clock
        kept["losses"].append(round(loss, 4))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == recipe.steps:
            now = time.monotonic()
            kept["seconds"], clock = kept["seconds"] + now - clock, now
            save_checkpoint(checkpoint, model, optimizer, step=step + 1, about=kept)

    if start < recipe.steps:
        schedule = restarts(recipe.cycles, warmup=recipe.warmup, floor=recipe.floor)
        train(
            model,
            batches,
            steps=recipe.steps,
            start=start,
            optimizer=optimizer,
            schedule=schedule,
            after=keep,
        )
    return model.eval(), kept


def rounded(model: nn.Module) -> nn.Module:
    """A copy whose weights are rounded to BF16, as they are stored, and widened again."""
    model = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def report(model: LanguageModel, tokenizer: Tokenizer) -> dict:
    """Bits per byte on all held-out texts of each kind, with standard error; samples that parse."""
    found = {"accepted": accepted(sample_sources(model, tokenizer))}
    for kind in KINDS:
        whole = "\n\n".join(documents(kind, "validation").values())
        text = passage(whole, tokenizer, window=model.config.context - 1)
        bits = judge(text, {"tiny": model})["tiny"].bits_per_byte()
        error = (bits.high - bits.low) / 2 / 1.96
        found[kind] = {
            "bits_per_byte": round(bits.estimate, 4),
            "standard_error": round(error, 4),
            "bytes": text.bytes,
        }
    return found


def ship(
    recipe: Recipe, model: LanguageModel, tokenizer: Tokenizer, kept: dict, folder: Path = FOLDER
) -> dict:
    """Write weights in BF16, tokenizer and recipe into `folder`; the recipe comes last."""
    folder.mkdir(exist_ok=True)
    model = rounded(model)
    weights = {name: t.bfloat16() for name, t in distinct_tensors(model).items()}
    save_tensors(folder / "tiny.safetensors", weights, {"config": asdict(recipe.config)})
    tokenizer.save(folder / "tiny_tokenizer.json")
    names = ("tiny.safetensors", "tiny_tokenizer.json")
    about = {
        "recipe": recipe.as_dict(),
        "config": asdict(recipe.config),
        "quality": report(model, tokenizer),
        "losses": every(kept["losses"], 20),
        "losses_are": "training loss in nats per token, mean of each 20 steps",
        "seconds": round(kept["seconds"]),
        "tokens": recipe.steps * recipe.batch * recipe.context,
        "versions": {name: version(name) for name in ("torch", "tokenizers", "safetensors")},
        "python": platform.python_version(),
        "machine": machine_card().as_dict(),
        "manifest": {kind: {split: manifest(kind, split) for split in SPLITS} for kind in KINDS},
        "sha256": {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names},
    }
    save_json(folder / "tiny.json", about)
    return about


def every(values: list[float], size: int) -> list[float]:
    """Means of each `size` values in a row."""
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    return [round(sum(group) / len(group), 4) for group in groups]


def main() -> None:
    """`python -m companion.pretraining`: train, or go on training, and ship."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="keeps checkpoints")
    options.add_argument("--into", type=Path, default=FOLDER, help="where the files are put")
    options.add_argument("--cycles", type=int, nargs="+", default=Recipe.cycles, metavar="STEPS")
    options.add_argument("--seed", type=int, default=Recipe.seed)
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.set_flush_denormal(True)
    recipe = Recipe(cycles=tuple(chosen.cycles), seed=chosen.seed)
    chosen.runs.mkdir(parents=True, exist_ok=True)
    print("reading the library and learning the tokenizer: about a minute")
    tokenizer, tokens = prepare(recipe)
    model, kept = pretrain(recipe, tokens, chosen.runs / "checkpoint.safetensors")
    print("judging the rounded model: about two minutes")
    about = ship(recipe, model, tokenizer, kept, chosen.into)
    print(f"{chosen.into}: {about['quality']}")


if __name__ == "__main__":
    main()

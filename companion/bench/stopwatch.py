"""Is the stopwatch itself to be trusted? `python -m companion.bench.stopwatch [--busy | --quiet]`

A small model is raced against its own copy a hundred times: at a nominal 5 % at most 10 of these
may be called a difference. Then the copy does 11 passes for every 10: a difference of 10 % that at
least 90 of 100 races must find. Races that the busy-machine guard refuses are counted apart, at
most 10 where the machine is quiet. The first question is asked again beside one and two programs
that burn a core each. A wide model, which waits for memory, is shown without a goal: where its copy
lies there can make a true difference. Nothing is written. Run it on a machine that does nothing
else; it takes some minutes.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from tqdm.auto import tqdm

from companion.hardware import machine_card
from companion.model import LanguageModel, ModelConfig
from companion.timing import Race, race

SMALL = ModelConfig(vocab=256, context=16, layers=1, heads=2, kv_heads=1, width=64, hidden=192)
WIDE = ModelConfig(vocab=256, context=1, layers=1, heads=8, kv_heads=4, width=1024, hidden=3072)

# A burner stops when its parent has gone, however that went
BURN = "import os\np = os.getppid()\nwhile os.getppid() == p: sum(range(100000))"


@dataclass(frozen=True)
class Trial:
    """One question to the stopwatch, asked many times."""

    title: str
    config: ModelConfig
    passes: tuple[int, int]  # forward passes a call of the model, and of its copy
    tokens: int
    burners: int = 0
    judged: bool = True

    @property
    def same(self) -> bool:
        return self.passes[0] == self.passes[1]


QUIET = [
    Trial("small model, its copy", SMALL, (10, 10), 16),
    Trial("small model, its copy with 10% more work", SMALL, (10, 11), 16),
    Trial("one token, wide model, its copy", WIDE, (1, 1), 1, judged=False),
]
BUSY = [
    Trial("small model, its copy, beside 1 burner", SMALL, (10, 10), 16, burners=1),
    Trial("small model, its copy, beside 2 burners", SMALL, (10, 10), 16, burners=2),
]


@contextmanager
def burning(count: int) -> Iterator[None]:
    """Other programs, `count` of them, that use a core each until the block ends in any way."""
    burners: list[subprocess.Popen] = []
    try:
        burners += (subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(count))
        time.sleep(0.5 * bool(count))  # until they are up
        yield
    finally:
        for burner in burners:
            burner.kill()
        for burner in burners:
            burner.wait()


def ask(trial: Trial, seed: int) -> Race:
    """Race a fresh model against its own fresh copy."""
    torch.manual_seed(seed)
    model = LanguageModel(trial.config)
    twin = copy.deepcopy(model)
    tokens = torch.randint(trial.config.vocab, (1, trial.tokens))

    def passes(network: LanguageModel, count: int) -> None:
        for _ in range(count):
            network(tokens)

    first, second = trial.passes
    with torch.inference_mode():
        return race(
            patience=0.5,  # no race may hold up the hundred
            seed=seed,
            model=lambda: passes(model, first),
            copy=lambda: passes(twin, second),
        )


def row(trial: Trial, races: Sequence[Race], seconds: float) -> tuple[str, ...]:
    """Counts and the verdict on one trial; shares are of the races that gave a number."""
    ratios = [result.ratio("copy", "model") for result in races if not result.busy]
    refused, called = len(races) - len(ratios), sum(ratio.excludes(1) for ratio in ratios)
    found = called / max(1, len(ratios))
    verdict = "good" if (found <= 0.1 if trial.same else found >= 0.9) else "BAD"
    if trial.burners == 0 and refused > 0.1 * len(races):
        verdict = "MACHINE NOT QUIET"
    elif not ratios:
        verdict = "all refused"
    elif not trial.judged:
        verdict = "shown"
    reach = f"{median((r.high - r.low) / 2 for r in ratios):.1%}" if ratios else "-"
    centre = f"{median(r.estimate for r in ratios):.3f}" if ratios else "-"
    goal = "at most 10%" if trial.same else "at least 90%"
    counts = (str(len(races)), str(refused), str(called), goal, centre, reach, f"{seconds:.0f}")
    return (trial.title, *counts, verdict)


HEAD = ("trial", "races", "refused", "differ", "goal", "ratio", "+-", "seconds", "verdict")


def measure(trials: Sequence[Trial], races: int) -> list[tuple[str, ...]]:
    """A row for each trial."""
    rows = []
    with tqdm(total=len(trials) * races, desc="races") as bar:
        for trial in trials:
            results, start = [], time.perf_counter()
            with burning(trial.burners):
                for seed in range(races):
                    results.append(ask(trial, seed))
                    bar.update()
            rows.append(row(trial, results, time.perf_counter() - start))
    return rows


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 0 if every verdict is good."""
    parser = argparse.ArgumentParser(description="Test the stopwatch on this machine.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quiet", action="store_true", help="only with nothing beside")
    which.add_argument("--busy", action="store_true", help="only beside programs that burn a core")
    parser.add_argument("--races", type=positive, default=100, help="races a trial (default 100)")
    chosen = parser.parse_args(arguments)
    trials = QUIET * (not chosen.busy) + BUSY * (not chosen.quiet)
    rows = [HEAD, *measure(trials, chosen.races)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)))
    print(machine_card())
    return int(any(cells[-1] in ("BAD", "MACHINE NOT QUIET") for cells in rows))


if __name__ == "__main__":
    sys.exit(main())

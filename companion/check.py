"""Is this machine ready for the course? `python -m companion.check` says so in half a minute.

Made for a room of laptops: every line is one question, its answer, and what to do if it is no. The
exit status is 0 if all is well and 1 if not.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from companion.data import KINDS, documents
from companion.decoding import generate
from companion.hardware import machine_card, peaks, physical_memory, usable_cores
from companion.measurement import decode
from companion.pretrained import overlap, smollm2, tiny, tiny_recipe, tiny_tokenizer
from companion.timing import race

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
PYTHON = (3, 11)
DISK, MEMORY = 2e9, 4e9  # bytes: free for a build of the book; in the machine, for SmolLM2
WORDS = {True: "ok", False: "NO", None: "--"}


@dataclass(frozen=True)
class Answer:
    """One question; `good` is None where there is something to know but nothing to mend."""

    question: str
    good: bool | None
    found: str

    def __str__(self) -> str:
        return f"{WORDS[self.good]:>3}  {self.question}: {self.found}"


def python_version() -> Answer:
    version = ".".join(map(str, sys.version_info[:3]))
    needed = f"{PYTHON[0]}.{PYTHON[1]} or newer"
    return Answer("Python", sys.version_info >= PYTHON, f"{version} ({needed} is needed)")


def packages(requirements: Path = REQUIREMENTS) -> Answer:
    """Whether the pinned packages are installed, each in its pinned version."""
    if not requirements.is_file():
        return Answer("packages", None, f"{requirements.name} is not beside the package")
    wrong = []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        name, pinned, version = line.split("#")[0].strip().partition("==")
        if pinned and (found := _installed(name)) != version:
            wrong.append(f"{name} is {found}, not {version}")
    advice = "; ".join(wrong[:3]) + "; run `make setup`"
    return Answer("packages", not wrong, advice if wrong else "all in their pinned versions")


def _installed(name: str) -> str:
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        return "missing"


def disk() -> Answer:
    free = shutil.disk_usage(Path.cwd()).free
    return Answer("disk", free >= DISK, f"{free / 1e9:.1f} GB free ({DISK / 1e9:.0f} are needed)")


def memory() -> Answer:
    size = physical_memory()
    return Answer("memory", size >= MEMORY, f"{size / 1e9:.1f} GB ({MEMORY / 1e9:.0f} are needed)")


def cores() -> Answer:
    count, load = usable_cores(), _load()
    busy = f", of which {load:.1f} are busy" if load is not None else ""
    return Answer("cores", True if load is None or load < 0.5 else None, f"{count}{busy}")


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def texts() -> Answer:
    """Whether this Python has the texts, and how much of them `tiny` knows."""
    recipe = tiny_recipe()
    shares = [overlap(recipe, kind, "validation") for kind in KINDS]
    count = sum(len(documents(kind, "validation")) for kind in KINDS)
    found = f"{count} held out; {min(shares):.0%} as in the Python that `tiny` was judged with"
    return Answer("texts", count > 0, found)


def shipped_model() -> Answer:
    model, tokenizer = tiny(), tiny_tokenizer()
    prompt = torch.tensor([tokenizer.encode("def ")])
    same = torch.equal(generate(model, prompt, 16), generate(model, prompt, 16, cached=False))
    return Answer("tiny", same, "loads and writes")


def real_model() -> Answer:
    """Whether SmolLM2 loads, and how fast it writes here."""
    model = smollm2()
    torch.set_num_threads(1)
    times = race(rounds=6, decode=decode(model, torch.tensor([[1, 2, 3, 4]]), 2)).interval("decode")
    found = f"loads and writes {times.map(lambda s: 2 / s)} tokens/s"
    return Answer("SmolLM2", True if times.known else None, found)


def ceilings() -> Answer:
    best = peaks("cpu")
    product, memory = best.flops["float32"] / 1e9, best.bandwidth / 1e9
    return Answer("speed", True, f"{product:.0f} GFLOP/s in FP32, {memory:.1f} GB/s, one thread")


CHECKS = (
    python_version,
    packages,
    disk,
    memory,
    cores,
    texts,
    shipped_model,
    ceilings,
    real_model,
)


def answers(checks: tuple[Callable[[], Answer], ...] = CHECKS) -> Iterator[Answer]:
    """Ask one after the other; an error is an answer too, and stops none of the rest."""
    for check in checks:
        try:
            yield check()
        except Exception as error:
            yield Answer(check.__name__.replace("_", " "), False, str(error))


def main() -> int:
    """Print every answer as it comes. 0 if nothing has to be mended."""
    torch.set_num_threads(1)
    print(machine_card())
    good = True
    for answer in answers():
        print(answer, flush=True)
        good = good and answer.good is not False
    print("This machine is ready." if good else "Mend the lines marked NO, then run this again.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

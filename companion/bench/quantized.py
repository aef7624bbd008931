"""Does fewer bits mean faster writing? `python -m companion.bench.quantized [--threads N]`

SmolLM2 writes 64 tokens after a prompt of 16, decode time only, in alternation: in FP32, on each
kernel, and, where `xllamacpp` can be imported, in llama.cpp on the Q4_1 file from which all of them
come. The 4-bit models hold the file's own codes in their blocks. Then 512 tokens are read at once.
What each kernel costs in quality is a study, shown at the end. Nothing is written.

llama.cpp is no requirement of the course: `pip install --no-deps xllamacpp` brings a built one. Its
decode time is what it reports itself, since a call of it reads the prompt too.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from companion import studies
from companion.bench.decoding import continued
from companion.hardware import machine_card
from companion.measurement import decode, prefill
from companion.memory import stored_bytes
from companion.model import LanguageModel
from companion.pretrained import smollm2, smollm2_tokenizer
from companion.quantization.decoders import on_kernel
from companion.quantization.kernels import KERNELS, available
from companion.smollm2 import smollm2_file
from companion.studies.texts import held_out
from companion.timing import Race, once, race

PROMPT, NEW, READ = 16, 64, 512
FEWEST = 6  # rounds
OWN = "llama.cpp"


def candidates(model: LanguageModel) -> dict[str, nn.Module]:
    """FP32, and the same model on each kernel that runs on this processor."""
    usable = [name for name in KERNELS if available(name)]
    return {"FP32": model} | {name: on_kernel(model, name) for name in usable}


class Llama:
    """llama.cpp on SmolLM2's file, in a process of its own: threads of two libraries would wait
    for each other in one. `with Llama(threads) as llama:`."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> Llama:
        self.child = ProcessPoolExecutor(1, get_context("spawn"), _serve, (self.threads,))
        print(self.child.submit(_described).result())
        return self

    def __exit__(self, *error: object) -> None:
        self.child.shutdown()

    def writes(self, tokens: Tensor, new: int) -> Callable[[], float]:
        """Seconds in which it writes `new` tokens after (1, T)."""
        return lambda: self.child.submit(_write, tokens[0].tolist(), new).result()


def peer(threads: int) -> AbstractContextManager[Llama | None]:
    """llama.cpp for a `with` statement, or None where it is missing."""
    return Llama(threads) if find_spec("xllamacpp") else nullcontext()


def _serve(threads: int) -> None:
    global _server
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(smollm2_file())
    options.n_ctx, options.n_parallel = 1024, 1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    _server = xllamacpp.Server(options)


def _described() -> str:
    import xllamacpp

    return f"llama.cpp, xllamacpp {xllamacpp.__version__}: {xllamacpp.get_system_info()}"


def _write(tokens: list[int], new: int) -> float:
    asked = {"prompt": tokens, "n_predict": new + 1, "temperature": 0}  # its clock starts when
    asked |= {"cache_prompt": False, "ignore_eos": True}  # the first one is there
    timings = _server.handle_completions(asked)["timings"]
    assert timings["predicted_n"] == new + 1 and timings["prompt_n"] == len(tokens)
    return timings["predicted_ms"] / 1e3


def alternate(calls: Mapping[str, Callable[[], float]], rounds: int, threads: int) -> Race:
    """A race of calls that say themselves how many seconds they took."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for index in range(rounds + 1):  # the first is a warm-up
        for name in order.sample([*calls], len(calls)):
            took = calls[name]()
            if index:
                seconds[name].append(took)
    return Race({name: tuple(times) for name, times in seconds.items()}, threads, rounds)


def show(title: str, watch: Race, tokens: int, against: str) -> None:
    """Tokens a second, and how many times as fast as one of them."""
    print(f"\n{title}")
    for name in watch.seconds:
        speed = watch.interval(name).map(lambda s: tokens / s)
        print(f"  {name:<22}{speed} tokens/s; {watch.ratio(against, name)} x {against}")
    print(f"  {watch}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; always 0."""
    parser = argparse.ArgumentParser(description="Time SmolLM2 in fewer bits.")
    parser.add_argument("--threads", type=int, default=1, choices=(1, 2, 4, 8))
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args(arguments)
    if given.rounds < FEWEST:
        parser.error(f"{given.rounds} rounds are too few for an interval; {FEWEST} are needed")
    torch.set_num_threads(given.threads)
    model = smollm2()
    text = held_out(smollm2_tokenizer(), kind="prose", seed=0, windows=1, length=READ)
    models, tokens = candidates(model), text.tokens[None]
    prompt = tokens[:, :PROMPT]
    timed = {"rounds": given.rounds, "threads": given.threads}
    calls = {name: decode(one, prompt, NEW) for name, one in models.items()}
    writing = {name: partial(once, call, given.threads) for name, call in calls.items()}
    with peer(given.threads) as other:
        every = writing | ({OWN: other.writes(prompt, NEW)} if other else {})
        watch = alternate(every, given.rounds, given.threads)
    show(f"writing {NEW} tokens after {PROMPT}", watch, NEW, OWN if other else "FP32")
    whole = {"transformers": continued(model, prompt, NEW)}
    show("the same, transformers reading its prompt too", race(**timed, **calls, **whole), NEW,
         "transformers")  # fmt: skip
    reads = {name: prefill(one, tokens) for name, one in models.items()}
    show(f"reading {READ} tokens", race(**timed, **reads), READ, "FP32")
    sizes = {name: f"{stored_bytes(one) / 1e6:.0f} MB" for name, one in models.items()}
    print(f"\nstored: {sizes}\n{studies.load('kernels')}\n{machine_card()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

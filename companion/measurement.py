"""Measure models side by side: quality, bytes, speed, and how near the speed is to the machine's.

`compare(passage, baseline=model, thin=other)` looks at all models in one run: on the same tokens,
and timed in alternation. What is exact is counted; what is timed carries an interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from companion.checks import require, require_known, require_whole
from companion.data import Passage
from companion.decoding import Cache, cache_for
from companion.hardware import machine_card, peaks
from companion.intervals import Interval
from companion.memory import forward_peak_bytes, stored_bytes, unique_parameters
from companion.quality import Quality, judge
from companion.quantization.activations import IntegerLinear
from companion.quantization.layers import QuantizedLinear
from companion.quantization.packed import Kernel
from companion.report import COLUMNS, QUALITY, Comparison, Report
from companion.timing import Race, race

DEFAULT = ("parameters", "stored_bytes", "bits_per_byte", "perplexity", "prefill", "decode")


def compare(
    passage: Passage,
    *,
    columns: Sequence[str] | None = None,
    prompt: int = 64,
    new: int = 8,
    rounds: int = 8,
    threads: int = 1,
    **models: nn.Module,
) -> Comparison:
    """Judge and time the models named; the first one is what the others are compared with.

    `columns` names what to find out (`companion.report.COLUMNS`), at no cost for the rest. Prefill
    reads `prompt` tokens of the passage, decode writes `new` tokens after them, one at a time.
    Raises ValueError for no models, unknown columns, and a passage shorter than the prompt.
    """
    columns = tuple(DEFAULT if columns is None else columns)
    require(len(models) > 0, "there are 0 models; name some, as in compare(text, baseline=model)")
    for column in columns:
        require_known("column", column, COLUMNS)
    wanted = set(columns)
    for name, number in (("prompt", prompt), ("new", new)):
        require_whole(name, number)
    tokens = passage.tokens[None, :prompt]
    length = tokens.shape[1]
    require(length == prompt, f"the passage has {length} tokens, fewer than the prompt's {prompt}")

    judged = judge(passage, models) if wanted & QUALITY.keys() else {}
    timed = {"rounds": rounds, "threads": threads}
    speeds = Speeds(models, tokens, new, wanted, **timed)
    reports = {
        name: Report(
            parameters=unique_parameters(model),
            stored_bytes=stored_bytes(model),
            peak_bytes=_peak_bytes(model, tokens) if "peak_bytes" in wanted else None,
            products=products(model),
            **_quality(judged.get(name), judged.get(next(iter(models)))),
            **speeds.of(name),
        )
        for name, model in models.items()
    }
    card = machine_card(_device(next(iter(models.values()))))
    return Comparison(reports, columns, speeds.races, card, len(passage.tokens), passage.bytes)


def measure(model: nn.Module, passage: Passage, **options) -> Report:
    """The `Report` of one model; the options are those of `compare`."""
    return compare(passage, model=model, **options).reports["model"]


def products(model: nn.Module) -> str:
    """What multiplies vectors by the weights, with the number of layers: "Int8Weights x 121".

    Kernels go by their name; "expanded" is a layer that makes its weight anew at each call.
    """
    kinds = Counter(name for module in model.modules() if (name := _product(module)))
    return ", ".join(f"{name} x {count}" for name, count in kinds.most_common())


def _product(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return str(module.weight.dtype).removeprefix("torch.")
    if isinstance(module, QuantizedLinear):
        return "expanded"
    return type(module).__name__ if isinstance(module, (Kernel, IntegerLinear)) else ""


def _quality(own: Quality | None, first: Quality | None) -> dict[str, Interval]:
    if own is None:
        return {}
    return {
        "bits_per_byte": own.bits_per_byte(),
        "perplexity": own.perplexity(),
        "excess": own.excess(first),
        "divergence": own.divergence(),
        "agreement": own.agreement(),
    }


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _peak_bytes(model: nn.Module, tokens: Tensor) -> int:
    return forward_peak_bytes(model, tokens.to(_device(model)))


READS = {"first_token", "prefill", "flops_share"}  # columns for which a prompt is read
WRITES = {"decode", "bandwidth_share"}  # columns for which tokens are written


class Speeds:
    """Prefill and decode of all models, each raced in alternation, and their share of the peaks."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        tokens: Tensor,
        new: int,
        wanted: Set[str],
        **options: int,
    ) -> None:
        """Race as `wanted` columns ask; options are those of `race`."""
        self.models, self.tokens, self.new, self.wanted = models, tokens, new, wanted
        self.races: dict[str, Race] = {}
        if wanted & READS:
            calls = {name: prefill(model, tokens) for name, model in models.items()}
            self.races["prefill"] = race(**options, **calls)
        if wanted & WRITES:
            calls = {name: decode(model, tokens, new) for name, model in models.items()}
            self.races["decode"] = race(**options, **calls)

    def of(self, name: str) -> dict[str, Interval]:
        """The timed fields of one model's report."""
        found, took = {}, {kind: watch.interval(name) for kind, watch in self.races.items()}
        if "prefill" in took:
            found["first_token"] = took["prefill"]
            found["prefill"] = took["prefill"].map(lambda s: self.tokens.shape[1] / s)
        if "decode" in took:
            found["decode"] = took["decode"].map(lambda s: self.new / s)
        return found | self._shares(self.models[name], took)

    def _shares(self, model: nn.Module, took: Mapping[str, Interval]) -> dict[str, Interval]:
        """Of the machine's peaks; unknown for kernels, whose work torch cannot count."""
        wanted = self.wanted & {"flops_share", "bandwidth_share"}
        if not wanted or any(isinstance(module, Kernel) for module in model.modules()):
            return dict.fromkeys(wanted, Interval.unknown())
        best, found = peaks(_device(model)), dict.fromkeys(wanted, Interval.unknown())
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        if "flops_share" in wanted and dtype in best.flops:
            least = counted_flops(model, self.tokens) / best.flops[dtype]  # seconds
            found["flops_share"] = took["prefill"].map(lambda s: least / s)
        if "bandwidth_share" in wanted:
            moved = decode_bytes(model, self.tokens.shape[1]) * self.new
            found["bandwidth_share"] = took["decode"].map(lambda s: moved / s / best.bandwidth)
        return found


def reading(model: nn.Module, tokens: Tensor) -> Callable[[], Tensor]:
    """A call that reads tokens (B, T) in one forward pass, without a cache: any model will do."""
    tokens = tokens.to(_device(model))

    @torch.inference_mode()
    def call() -> Tensor:
        return model(tokens)

    return call


def prefill(model: nn.Module, tokens: Tensor) -> Callable[[], Tensor]:
    """A call that reads a prompt (B, T) into a new cache and takes the first token after it."""
    tokens = tokens.to(_device(model))

    @torch.inference_mode()
    def call() -> Tensor:
        cache = cache_for(model, batch=len(tokens), capacity=tokens.shape[1])
        return model(tokens, cache)[:, -1].argmax(-1)

    return call


def decode(model: nn.Module, tokens: Tensor, new: int) -> Callable[[], Tensor]:
    """A call that writes `new` tokens greedily after a prompt (B, T) that the cache holds."""
    tokens = tokens.to(_device(model))
    length = tokens.shape[1]
    cache = _filled(model, tokens, length + new)

    @torch.inference_mode()
    def call() -> Tensor:
        cache.rewind(length)
        token = tokens[:, -1:]
        for _ in range(new):
            token = model(token, cache)[:, -1:].argmax(-1)
        return token

    return call


@torch.inference_mode()
def _filled(model: nn.Module, tokens: Tensor, capacity: int) -> Cache:
    cache = cache_for(model, batch=len(tokens), capacity=capacity)
    model(tokens, cache)
    return cache


@torch.inference_mode()
def counted_flops(model: nn.Module, tokens: Tensor) -> int:
    """FLOPs of a forward pass over tokens (B, T), as torch counts them: 2 a multiply-add.

    Attention is computed by plain matrix products for the count, which include its masked half.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens.to(_device(model)))
    return counter.get_total_flops()


def decode_bytes(model: nn.Module, past: int, batch: int = 1) -> int:
    """Bytes one decoding step must read: all stored ones, and the keys and values of `past`.

    An untied embedding is not read but looked up, and left out.
    """
    weights = stored_bytes(model)
    if not model.config.tied:
        weights -= stored_bytes(model.embedding)
    cache = cache_for(model, batch=batch, capacity=1)
    return weights + cache.bytes * past

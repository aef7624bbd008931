"""What a number format costs in time and bytes: one matrix product, and one whole training step.

A processor is fast in a format only if it has units for it. So the same product and the same step
(forward, backward, AdamW) are timed in each format in alternation, at five widths. FP32 is the
reference, with TF32 off; TF32 rounds the factors of FP32 products; BF16 and FP16 run under
`torch.autocast` (FP16 with loss scaling); FP8 is that of `companion.precision`. The record is a
GPU's; `measured` does the same on the best device there is. What a device cannot do, or would take
too long over, is left out, and a result whose name says why stands in its place: "FP8 step: not
measured, ...".
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn

from companion.checks import require_known
from companion.cost import training_flops
from companion.hardware import best_device, product_rate, synchronize
from companion.intervals import Interval, median_ratio
from companion.losses import next_token_loss
from companion.memory import LiveBytes
from companion.model import LanguageModel, ModelConfig
from companion.precision.float8 import float8
from companion.studies.study import Study
from companion.timing import race
from companion.training import adamw

FORMATS = ("FP32", "TF32", "BF16", "FP16", "FP8")
AUTOCAST = {"BF16": torch.bfloat16, "FP16": torch.float16, "FP8": torch.bfloat16}
WIDTHS = (256, 512, 1024, 2048, 4096)
LAYERS, HEAD, VOCAB = 2, 64, 1024
BATCH, CONTEXT = 16, 256  # 4,096 tokens a step
ROUNDS, PATIENCE, TRIES = 9, 5.0, 3  # quiet rounds of a race, seconds to wait for them; races
LONGEST = {"cpu": 2.0}  # seconds a call may be expected to take; no limit on other devices
EMULATED = 4  # how many times as long as in FP32 a call may take in an emulated format, roughly

Results = dict[str, float | list[float]]


def run(*, seed: int, width: int) -> Results:
    """Seconds of a product and of a step in each format, a list of rounds; bytes of the step.

    Names are such as "BF16 product", "BF16 step" and "BF16 bytes", the most that is alive at once.
    """
    how = {"seed": seed, "tries": TRIES}
    return measured(width, "product", **how) | measured(width, "step", **how)


def measured(
    width: int,
    what: str,
    formats: tuple[str, ...] = FORMATS,
    *,
    seed: int = 0,
    batch: int = BATCH,
    rounds: int = ROUNDS,
    patience: float = PATIENCE,
    tries: int = 1,
) -> Results:
    """Seconds of a "product" or a "step" in some formats, on `batch` rows of 256 tokens.

    `rounds` and `patience` are those of `race`, which is run `tries` times until one is quiet.
    Raises ValueError for unknown names.
    """
    require_known("what", what, ("product", "step"))
    calls: dict[str, Callable[[], object]] = {}
    results: Results = {}
    for name in formats:
        require_known("format", name, FORMATS)
        reason = _unfit(name, width, what, batch)
        if not reason:
            try:
                calls[name], size = _tried(name, width, what, batch, seed)
                results |= {f"{name} bytes": size} if what == "step" else {}
            except Exception as error:  # one format must not cost the others
                reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])[:110]
        if reason:
            results[f"{name} {what}: not measured, {reason}"] = 1
    return results | _raced(calls, what, tries, rounds=rounds, patience=patience)


def _raced(calls: dict[str, Callable[[], object]], what: str, tries: int, **how: float) -> Results:
    if not calls:
        return {}
    for _ in range(tries):
        found = race(threads=torch.get_num_threads(), **how, **calls)
        if not found.busy:
            break
    busy = {f"{what}s: busy, {found.busy}": 1} if found.busy else {}
    return busy | {f"{name} {what}": list(times) for name, times in found.seconds.items() if times}


def _unfit(name: str, width: int, what: str, batch: int) -> str:
    """Why a format is not even tried here; empty if it is."""
    device = best_device()
    if name == "TF32":
        cuda = device.type == "cuda"
        able = cuda and torch.cuda.get_device_capability(device)[0] >= 8
        return "" if able else "TF32 is a mode of NVIDIA's units from Ampere on"
    if device.type not in LONGEST:
        return ""
    seconds = _expected(name, width, what, batch, device.type)
    late = seconds > LONGEST[device.type]
    return f"it would take about {seconds:.0f} s" if late else ""


def _expected(name: str, width: int, what: str, batch: int, device: str) -> float:
    """Seconds that a call takes at the rate of small products."""
    dtype = torch.float32 if name == "FP8" else AUTOCAST.get(name, torch.float32)
    work = 2 * batch * CONTEXT * width**2
    if what == "step":
        work = training_flops(config_of(width), CONTEXT, batch=batch)
    return work / _rate(device, dtype) * (EMULATED if name == "FP8" else 1)


@lru_cache
def _rate(device: str, dtype: torch.dtype) -> float:
    return product_rate(torch.device(device), dtype)


def _tried(
    name: str, width: int, what: str, batch: int, seed: int
) -> tuple[Callable[[], object], int]:
    """A call that has run twice without an error, and the most bytes that were alive."""
    device, make = best_device(), _step if what == "step" else _product
    with _counted(device) as live, torch.random.fork_rng(_forked(device)):
        torch.manual_seed(seed)
        call = make(name, width, batch, device)
        for _ in range(2):
            call()
        synchronize()
    return call, live[0]


def _forked(device: torch.device) -> list[int]:
    return [torch.cuda.current_device()] if device.type == "cuda" else []


@contextmanager
def _counted(device: torch.device) -> Iterator[list[int]]:
    """The most bytes alive at once beyond those before, put into the list at the end.

    On CUDA the allocator knows, scratch space of the kernels included; elsewhere tensors count.
    """
    found: list[int] = []
    if device.type == "cuda":
        gc.collect()
        torch.cuda.init()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
    else:
        with LiveBytes() as live:
            yield found
        found.append(live.peak)


@contextmanager
def _products_in(name: str) -> Iterator[None]:
    """FP32 products on CUDA in TF32 or not; as it was afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "TF32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _product(name: str, width: int, batch: int, device: torch.device) -> Callable[[], Tensor]:
    """(tokens, width) times (width, width), the factors in the format already."""
    left = torch.randn(batch * CONTEXT, width, device=device)
    right = torch.randn(width, width, device=device)
    if name == "FP8":
        e4m3, one = torch.float8_e4m3fn, torch.ones((), device=device)
        left, right = left.to(e4m3), right.to(e4m3).t()  # the second has to stand column by column
        return lambda: torch._scaled_mm(
            left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        )
    dtype = AUTOCAST.get(name, torch.float32)
    left, right = left.to(dtype), right.to(dtype)

    def call() -> Tensor:
        with _products_in(name):
            return left @ right

    return call


def _step(name: str, width: int, batch: int, device: torch.device) -> Callable[[], None]:
    """Forward, backward and AdamW on a model of two blocks, whose master weights are FP32."""
    with torch.device(device):
        model: nn.Module = LanguageModel(config_of(width))
        tokens = torch.randint(VOCAB, (batch, CONTEXT))
    model = float8(model) if name == "FP8" else model
    optimizer, dtype = adamw(model, 1e-4), AUTOCAST.get(name)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=name == "FP16")
    on = {"device_type": device.type, "dtype": dtype, "enabled": dtype is not None}

    def call() -> None:
        with _products_in(name):
            with torch.autocast(**on):
                loss = next_token_loss(model(tokens), tokens)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return call


def config_of(width: int) -> ModelConfig:
    """The model of the step: two blocks, as many key-value heads as query heads."""
    heads, hidden = width // HEAD, 11 * width // 4
    shape = {"layers": LAYERS, "heads": heads, "kv_heads": heads, "width": width, "hidden": hidden}
    return ModelConfig(vocab=VOCAB, context=CONTEXT, **shape)


# --- reading results ----------------------------------------------------------------------------


def speedup(results: Results, name: str, what: str) -> Interval:
    """How many times as fast as FP32 a format is in a "product" or "step"; unknown if not measured.

    The median over rounds of the ratios within one.
    """
    times = [results.get(f"{each} {what}", []) for each in ("FP32", name)]
    enough = all(len(rounds) >= 6 for rounds in times)  # for a 95 % interval
    return median_ratio(*times) if enough else Interval.unknown()


def reasons(results: Results) -> list[str]:
    """What was not measured, and why; a machine that was busy counts too."""
    return [name for name in results if ": not measured, " in name or ": busy, " in name]


STUDY = Study(
    title="Seconds of a product and of a training step, and bytes, by number format and width",
    point=run,
    settings={f"width {width}": {"width": width} for width in WIDTHS},
    seeds=(0,),
    needs="cuda",
)

"""What few bits buy on a GPU: single layers over width and number of vectors, then SmolLM2 writing.

Each layer is timed in BF16, on the kernels of `companion.quantization.cuda_kernels` and as torchao
quantizes it, in alternation; so is a token of SmolLM2. "called" is as Python calls it; "graph" is
the same kernels recorded as a CUDA graph, which starts them without Python; "compiled" went through
torch.compile before, which joins small kernels into one. Copies of a layer take turns, more than
the GPU's cache holds, so that each is read from memory, as the layers of a large model are.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle

import torch
from torch import Tensor, nn

from companion.decoding import cache_for
from companion.model import LanguageModel
from companion.pretrained import smollm2
from companion.quantization.cuda_kernels import CODINGS, CUDA_KERNELS, on_cuda
from companion.quantization.layers import QuantizedMatrix
from companion.quantization.replacing import nearest
from companion.studies.study import Study
from companion.timing import race

PAST = 128  # positions that the cache holds when a token is written
GROUP = CODINGS["Int4Cuda"].group
TRIES = 3  # until the machine is quiet
CALLS = 10  # in one graph, at least
HELD = 120e6  # bytes of 4-bit copies of one layer


def run(*, seed: int, width: int = 0, vectors: int = 0) -> dict[str, float]:
    """Seconds a call of each way to do it: of one layer, or with width 0 of a token of SmolLM2."""
    torch.manual_seed(seed)
    torch.compiler.reset()
    times = max(CALLS, math.ceil(HELD / (5 / 8 * width**2))) if width else CALLS
    with torch.inference_mode():
        steps = layer_steps(width, vectors, times) if width else token_steps()
        fit = [name for name in steps if name != "torchao int8"]  # it asks the GPU for a number
        graphs = {name: captured(steps[name], times) for name in fit}
        calls = {f"{name}, called": step for name, step in steps.items()}
        for _ in range(TRIES):
            found = race(rounds=8, patience=1.0, **calls, **graphs)
            if not found.busy:
                break
    seconds = {name: found.median(name) for name in calls}
    return seconds | {f"{name}, graph": found.median(name) / times for name in graphs}


def layer_steps(width: int, vectors: int, copies: int) -> dict[str, Callable[[], Tensor]]:
    """A square layer in BF16 and packed, each to be called on the same vectors."""
    plain = nn.Linear(width, width, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(vectors, width, device="cuda", dtype=torch.bfloat16)
    layers: dict[str, nn.Module] = {"BF16": plain}
    for name, kind in CUDA_KERNELS.items():
        rounded = nearest("", plain.weight.detach().float(), CODINGS[name])
        layers[name] = kind(QuantizedMatrix(rounded.codes, rounded.scheme, width).cpu())
    layers |= torchao_layers(plain)
    ways = {name: in_turn(layer, x, copies) for name, layer in layers.items()}
    for name in ("Int8Cuda", "torchao int8"):
        with suppress(KeyError, RuntimeError):  # torchao's, at 16 vectors or fewer, with torch 2.11
            ways[f"{name}, compiled"] = in_turn(layers[name], x, copies, compiled=True)
    return ways


def in_turn(
    layer: nn.Module, x: Tensor, copies: int, *, compiled: bool = False
) -> Callable[[], Tensor]:
    """A call that gives x to one of several copies of a layer, each time to another."""
    every = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]
    if compiled:
        every = [torch.compile(one, dynamic=False) for one in every]
    for one in every:
        one(x)  # a compiler works at the first call
    turn = cycle(every)
    return lambda: next(turn)(x)


def torchao_layers(plain: nn.Linear) -> dict[str, nn.Module]:
    """The same layer as torchao quantizes it, where it is installed."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    from torchao import quantization

    four = quantization.Int4WeightOnlyConfig(
        group_size=GROUP, int4_packing_format="tile_packed_to_4d"
    )
    eight = quantization.Int8DynamicActivationInt8WeightConfig()
    made = {}
    for name, config in (("torchao int4", four), ("torchao int8", eight)):
        holder = nn.Sequential(nn.Linear(*plain.weight.shape, bias=False).to(plain.weight))
        holder[0].load_state_dict(plain.state_dict())
        quantization.quantize_(holder, config)
        made[name] = holder
    return made


def token_steps() -> dict[str, Callable[[], Tensor]]:
    """Writing one token after `PAST` others: BF16 and each kernel."""
    models = {"BF16": smollm2(device="cuda", dtype=torch.bfloat16)}
    models |= {name: on_cuda(smollm2(), name) for name in CUDA_KERNELS}
    return {name: token_step(model) for name, model in models.items()}


def token_step(model: LanguageModel) -> Callable[[], Tensor]:
    """A call that reads one token behind `PAST` others, always at the same place."""
    cache = cache_for(model, capacity=PAST + 1)
    token = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    model(token.expand(1, PAST).contiguous(), cache)

    def step() -> Tensor:
        cache.rewind(PAST)
        return model(token, cache)

    return step


def captured(step: Callable[[], Tensor], times: int) -> Callable[[], None]:
    """The kernels of so many calls, recorded once; calling the result starts them all at once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first calls choose and load kernels
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            step()
    return graph.replay


WIDTHS, VECTORS = (2048, 4096, 8192), (1, 16, 256, 2048)
STUDY = Study(
    title="Seconds a call on a GPU: layers in BF16, 8 and 4 bits, and SmolLM2 writing a token",
    point=run,
    settings={
        **{
            f"width {width}, {vectors} vectors": {"width": width, "vectors": vectors}
            for width in WIDTHS
            for vectors in VECTORS
        },
        "SmolLM2, one token": {},
    },
    seeds=(0,),
    needs="cuda",
)

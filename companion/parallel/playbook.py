"""A published scaling curve, and what the closed form of a step makes of it.

Hugging Face's Ultra-Scale Playbook (2025, https://huggingface.co/spaces/nanotron/ultrascale-playbook)
shows tokens/s of each GPU for data parallelism on 8 to 256 GPUs. The text gives 4,096 tokens a
sequence, 1M tokens a step *for any number of GPUs*, and nodes of 8 H100 joined by EFA; the
data behind its figures (assets/data/benchmarks: dp_scaling, banner, benchmarks_interactive and
pp_comm_bandwidth .html) name model, micro-batch and accumulation of each run; the code that trained
(github.com/huggingface/nanotron: scripts/scaling_benchmarks.py for the model's shape) adds up
gradients in FP32.

So the curve is one of strong scaling: 32 sequences a GPU and step on 8 GPUs, one on 256, with the
same gradients to add up. Two numbers are fitted on 16 to 64 GPUs and tried on 128 and 256. The
latency between nodes is not known; `network.H100` has a guess, and 256 GPUs depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from companion.parallel.network import H100, Network
from companion.parallel.scaling import Work, slowest, step_seconds
from companion.parallel.traffic import Link


class Run(NamedTuple):
    """GPUs; sequences in a micro-batch; micro-batches of each GPU in a step; tokens/s of each."""

    ranks: int
    sequences: int
    batches: int
    speed: float


# Runs of the model of 1.34 B parameters with data parallelism only, without ZeRO, from banner.html:
# one each, so that nobody knows how often 64 GPUs with 2 sequences would be half as fast as with 1.
RUNS = (
    Run(8, 1, 32, 39273.41),
    Run(8, 2, 16, 40149.94),
    Run(16, 1, 16, 37609.69),
    Run(32, 1, 8, 35367.61),
    Run(64, 1, 4, 31112.23),
    Run(64, 2, 2, 16056.64),
    Run(128, 1, 2, 24493.82),
    Run(128, 2, 1, 26446.44),
    Run(256, 1, 1, 15700.38),
)
FITTED = tuple(run for run in RUNS if 8 < run.ranks <= 64 and run.sequences == 1)
# What the figure shows, the fastest for each number of GPUs: tokens/s of each, dp_scaling.html.
CHART = {8: 40149.94, 16: 37609.69, 32: 35367.61, 64: 31112.23, 128: 26446.44, 256: 15700.38}
# Median all-reduce bandwidth (GB/s) of 256 MB on so many nodes, from pp_comm_bandwidth.html. It is
# not said whether bus bandwidth is meant; inside a node nothing else could be as fast.
ALL_REDUCE = {1: 436.0, 2: 361.7, 4: 160.1, 8: 99.6, 16: 84.7, 32: 64.9, 64: 32.9}

CONTEXT = 4096
LAYERS, WIDTH, HIDDEN, VOCAB = 16, 2048, 8192, 131_072
EMBEDDING = VOCAB * WIDTH  # parameters; it is the output head, too
# A layer's buckets in the order of backward, (parameters, FLOPs a token): down; gate and up; the
# attention. DDP closes a bucket when it has 25 MiB (nanotron's setting) of BF16 gradients.
LAYER = (
    (WIDTH * HIDDEN, 6 * WIDTH * HIDDEN),
    (2 * WIDTH * HIDDEN, 12 * WIDTH * HIDDEN),
    (4 * WIDTH**2, 24 * WIDTH**2 + 12 * WIDTH * CONTEXT),
)
PARAMETERS = LAYERS * sum(parameters for parameters, _ in LAYER) + EMBEDDING
FLOPS = LAYERS * sum(flops for _, flops in LAYER) + 6 * EMBEDDING  # as the playbook counts them

# Bytes a parameter that an update reads and writes at least: AdamW 28 (weight, gradient and two
# averages in, three of them out, FP32), clipping 12, the copy in BF16 6, zeroing gradients 4.
UPDATE = 50
MEMORY = 3.35e12  # bytes a second of an H100 SXM, NVIDIA's data sheet

LONGEST = torch.tensor([0.5, 0.03], dtype=torch.float64)  # step in log(bandwidth) and in spread
NUDGE = 1e-5

Networks = Callable[[int], Network]  # the network for so many ranks


def work(seconds: float, batches: int) -> Work:
    """A step of that model whose micro-batches take `seconds` each, forward a third of it.

    Backward begins with the output head and takes as long for each part as its FLOPs say. The
    embedding is the head, so its gradients are complete last, with nothing to hide their sum.
    """
    each = seconds * 2 / 3 / FLOPS
    times = [each * flops for _, flops in LAYERS * LAYER] + [0.0]
    times[0] += each * 6 * EMBEDDING
    sizes = [4.0 * parameters for parameters, _ in LAYERS * LAYER] + [4.0 * EMBEDDING]
    return Work(seconds / 3, tuple(times), tuple(sizes), UPDATE * PARAMETERS / MEMORY, batches)


def speeds(runs: Sequence[Run], networks: Networks, spread: float = 0.0) -> list[float]:
    """Predicted tokens/s of each GPU for some runs.

    What a micro-batch takes is not predicted: it is what the run on 8 GPUs with micro-batches of
    that size needs to come out as published.
    """
    sizes = {run.sequences for run in runs}
    seconds = {size: _micro_batch(size, networks, spread) for size in sizes}
    return [_speed(run, seconds[run.sequences], networks, spread) for run in runs]


def between(bandwidth: float) -> Networks:
    """H100s with so many bytes a second for each GPU between nodes."""
    network = Network(H100.inside, Link(H100.between.latency, bandwidth))
    return lambda ranks: network


def measured(ranks: int) -> Network:
    """One ring over all GPUs as fast as the playbook found all-reduce on so many of its nodes."""
    return Network(Link(0.0, ALL_REDUCE[ranks // H100.node] * 1e9))


class Fit(NamedTuple):
    """Bytes a second for each GPU between nodes, and the stragglers' spread."""

    bandwidth: float
    spread: float


def fit(runs: Sequence[Run] = FITTED) -> Fit:
    """The bandwidth and spread whose speeds come nearest, in squares of the relative errors.

    Gauss-Newton: the errors are taken as straight lines in the spread and the bandwidth's
    logarithm, solved, and looked at again there; no step is longer than LONGEST.
    """

    def errors(at: Tensor) -> Tensor:
        found = speeds(runs, between(math.exp(at[0])), float(at[1]))
        pairs = zip(found, runs, strict=True)
        return torch.tensor([speed / run.speed - 1 for speed, run in pairs], dtype=torch.float64)

    at = torch.tensor([math.log(H100.between.bandwidth), 0.05], dtype=torch.float64)
    for _ in range(20):
        here = errors(at)
        slopes = [(errors(at + nudge) - here) / NUDGE for nudge in NUDGE * torch.eye(2)]
        step = torch.linalg.lstsq(torch.stack(slopes, dim=1), here[:, None]).solution[:, 0]
        at -= step.clamp(-LONGEST, LONGEST)
        at[1].clamp_(min=0)
        if step.abs().max() < 1e-7:
            break
    return Fit(math.exp(at[0]), float(at[1]))


def table(fitted: Fit) -> list[dict[str, float]]:
    """Every run with its published speed and three predictions (tokens/s of each GPU).

    sheet: from the network's data sheet. fitted: from `fit`. measured: from the playbook's own
    times of all-reduce, nothing fitted. On 8 GPUs all are as published, see `speeds`.
    """
    columns = {
        "sheet": speeds(RUNS, lambda ranks: H100),
        "fitted": speeds(RUNS, between(fitted.bandwidth), fitted.spread),
        "measured": speeds(RUNS, measured),
    }
    return [
        {**run._asdict(), **{name: column[i] for name, column in columns.items()}}
        for i, run in enumerate(RUNS)
    ]


def _speed(run: Run, seconds: float, networks: Networks, spread: float) -> float:
    factor, network = slowest(run.ranks, spread), networks(run.ranks)
    step = step_seconds(work(seconds, run.batches), run.ranks, network, factor=factor)
    return run.sequences * run.batches * CONTEXT / step


def _micro_batch(sequences: int, networks: Networks, spread: float) -> float:
    """Seconds of a micro-batch with which the run on 8 GPUs comes out as published."""
    run = next(run for run in RUNS if run.sequences == sequences)
    seconds = sequences * CONTEXT / run.speed
    for _ in range(6):  # most of the step is computing: a few hundredths of the error stay
        seconds *= _speed(run, seconds, networks, spread) / run.speed
    return seconds

"""What a rank holds between the backward pass and the optimizer's step, predicted and counted.

Symbols: S bytes of all parameters, n ranks. The units of `companion.parallel.shards`, each block
and the rest, are padded to multiples of n numbers, so S is a little larger where something is
sharded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer

from companion.checks import next_multiple, require_known, require_whole
from companion.cost import OPTIMIZERS, parameters
from companion.memory import storage_bytes
from companion.model import ModelConfig
from companion.parallel import traffic

STAGES = (0, 1, 2, 3)  # 0 is data parallelism without shards


def held_bytes(
    config: ModelConfig,
    ranks: int,
    stage: int,
    optimizer: str = "adamw",
    *,
    bytes_per_number: int = 4,
) -> dict[str, int]:
    """Bytes one rank holds, {"weights", "gradients", "states"}; ZeRO, arXiv:1910.02054, section 5.

    weights    S, in stage 3 S / n
    gradients  S, in stages 2 and 3 S / n
    states     0, 1 or 2 times S (sgd, momentum, adam and adamw), in stages 1 to 3 the n-th part

    What stages 2 and 3 hold of one unit for an instant comes on top; so do Adam's step counters,
    4 bytes a tensor, and buffers. Raises ValueError for unknown stages and optimizers, and less
    than one rank.
    """
    require_known("optimizer", optimizer, OPTIMIZERS)
    whole = bytes_per_number * _numbers(config, ranks, stage)
    kept = {"weights": whole, "gradients": whole, "states": OPTIMIZERS[optimizer] * whole}
    sharded = {0: (), 1: ("states",), 2: ("states", "gradients"), 3: tuple(kept)}[stage]
    return {kind: size // ranks if kind in sharded else size for kind, size in kept.items()}


def step_bytes(config: ModelConfig, ranks: int, stage: int, *, bytes_per_number: int = 4) -> float:
    """Bytes one rank sends in a step, clipping left out (an all-reduce of one number).

    2 (n - 1) / n S in stages 0 to 2, 3 (n - 1) / n S in stage 3. Raises ValueError as `held_bytes`.
    """
    size = bytes_per_number * _numbers(config, ranks, stage)
    kinds = ["all_reduce"] if stage == 0 else ["reduce_scatter", "all_gather"]
    kinds += ["all_gather"] if stage == 3 else []
    return sum(traffic.sent_bytes(kind, size, ranks) for kind in kinds)


def _numbers(config: ModelConfig, ranks: int, stage: int) -> int:
    """All parameters, padded by units where something is sharded."""
    require_whole("ranks", ranks)
    require_known("stage", stage, STAGES)
    every = parameters(config)
    if stage == 0:
        return every
    block = parameters(replace(config, layers=config.layers + 1)) - every
    rest = every - config.layers * block
    return config.layers * next_multiple(block, ranks) + next_multiple(rest, ranks)


def held(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """What `held_bytes` predicts, counted on a model and its optimizer after a backward pass.

    Bytes of distinct storages, whatever a view shows of them. Works for replicas, for shards and
    for torch's DDP and FSDP2. States exist only after a first step. Whole weights that are not in
    use have empty storages and count as such.
    """
    found = list(model.parameters())
    states = [value for p in found for value in optimizer.state.get(p, {}).values()]
    return {
        "weights": _stored(found),
        "gradients": _stored(p.grad for p in found if p.grad is not None),
        "states": _stored(s for s in states if isinstance(s, Tensor) and s.ndim > 0),
    }


def _stored(tensors: Iterable[Tensor]) -> int:
    return storage_bytes([t.to_local() if hasattr(t, "to_local") else t for t in tensors])

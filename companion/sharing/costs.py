"""Closed forms: what sharing does to parameters, FLOPs, saved activations and optimizer states.

With n different blocks of L, and some matrices (O, I) of a block as factors of inner width R:

  parameters         n (sum of O I, or of R (O + I) for factors, + 2 W) + W + V W (2 V W if untied)
  FLOPs              depend on L alone: a shared block is computed at each use
  saved activations  the same: each use keeps its own; factors add R numbers a position
  optimizer states   follow the parameters, as gradients and the file do

Fewer key-value heads and a tied head stand in the config itself, so `companion.cost` knows them.
Symbols as there: L layers, W width, M hidden, V vocab, B batch, T positions.
"""

from __future__ import annotations

from collections.abc import Collection

from companion import cost
from companion.checks import require_known, require_whole
from companion.model import ModelConfig
from companion.sharing.low_rank import require_inner

ATTENTION = ("attention.query", "attention.key", "attention.value", "attention.out")
MLP = ("mlp.gate", "mlp.up", "mlp.down")
MATRICES = ATTENTION + MLP  # of a block


def matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the matrices of one block."""
    width, hidden, keys = config.width, config.hidden, config.kv_heads * config.head_width
    shapes = [(width, width), (keys, width), (keys, width), (width, width)]
    shapes += [(hidden, width), (hidden, width), (width, hidden)]
    return dict(zip(MATRICES, shapes, strict=True))


def parameters(
    config: ModelConfig,
    *,
    layers: int | None = None,
    inner: int | None = None,
    factors: Collection[str] = MATRICES,
) -> int:
    """Different numbers to learn, with `layers` different blocks and the factors named."""
    different = config.layers if layers is None else layers
    require_whole("layers", different)
    block = (cost.parameters(config) - _outside(config)) // config.layers
    return _outside(config) + different * (block - _saved(config, inner, factors))


def forward_flops(
    config: ModelConfig,
    positions: int,
    *,
    batch: int = 1,
    inner: int | None = None,
    factors: Collection[str] = MATRICES,
) -> int:
    """FLOPs of `model(tokens)`, however many blocks differ: factors spare 2 B T L a number."""
    saved = config.layers * _saved(config, inner, factors)
    return cost.forward_flops(config, positions, batch=batch) - 2 * batch * positions * saved


def activation_bytes(
    config: ModelConfig,
    positions: int,
    *,
    batch: int = 1,
    inner: int | None = None,
    factors: Collection[str] = MATRICES,
) -> int:
    """Bytes that autograd keeps for the backward pass, in FP32: 4 B T L R more for each factor."""
    more = 0 if inner is None else config.layers * inner * len(_chosen(factors))
    return cost.activation_bytes(config, positions, batch=batch) + 4 * batch * positions * more


def optimizer_bytes(
    config: ModelConfig,
    optimizer: str = "adamw",
    *,
    layers: int | None = None,
    inner: int | None = None,
    factors: Collection[str] = MATRICES,
) -> int:
    """Bytes of the optimizer's running averages in FP32, without Adam's step counters."""
    require_known("optimizer", optimizer, cost.OPTIMIZERS)
    learned = parameters(config, layers=layers, inner=inner, factors=factors)
    return 4 * cost.OPTIMIZERS[optimizer] * learned


def lora_parameters(config: ModelConfig, inner: int, *, layers: int | None = None) -> int:
    """Numbers that `lora` on all matrices of the blocks learns: n x sum of R (O + I)."""
    different = config.layers if layers is None else layers
    for shape in matrices(config).values():
        require_inner(inner, *shape)
    return different * inner * sum(map(sum, matrices(config).values()))


def lora_activation_bytes(
    config: ModelConfig, positions: int, inner: int, *, batch: int = 1
) -> int:
    """Bytes that autograd keeps with `lora` on all matrices of the blocks, in FP32.

    A position adds R numbers a matrix, 7 L R, and spares 2 L W + 3 W + 1: what only the frozen
    norms, head and embedding would have needed (its id too, unless the targets are a view of the
    ids). The rest stays: to reach the first layer's addition the gradient goes back through all of
    the model.
    """
    added = len(MATRICES) * config.layers * inner
    spared = 4 * (2 * config.layers * config.width + 3 * config.width + 1)
    spared += 8 if batch > 1 and positions > 2 else 0
    whole = cost.activation_bytes(config, positions, batch=batch)
    return whole + batch * positions * (4 * added - spared)


def _outside(config: ModelConfig) -> int:
    """Numbers outside the blocks: the last norm, the embedding, and a head that is not tied."""
    return config.width + config.vocab * config.width * (1 if config.tied else 2)


def _saved(config: ModelConfig, inner: int | None, factors: Collection[str]) -> int:
    """Numbers that factors save in one block (below 0 where they cost some)."""
    if inner is None:
        return 0
    shapes = [matrices(config)[name] for name in _chosen(factors)]
    for shape in shapes:
        require_inner(inner, *shape)
    return sum(outputs * inputs - inner * (outputs + inputs) for outputs, inputs in shapes)


def _chosen(factors: Collection[str]) -> Collection[str]:
    for name in factors:
        require_known("matrix", name, MATRICES)
    return factors

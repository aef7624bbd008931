"""Bytes of a training step by precision, worked out from the shape alone.

A step holds weights, gradients, the optimizer's states, and what the forward pass keeps for the
backward pass. A format of 16 bits does not halve the sum: it adds copies, and some things stay
FP32. In bytes a number:

    precision      weights   copies of matrices   gradients   states
    FP32              4              -                4          8
    autocast          4       2 (kept)                4          8
    masters           4       2 (held)                4          8
    pure BF16         2              -                2          4
    8-bit states      4              -                4          2 and 8 / 256
    FP8               4       1 (blocks, kept)        4          8

"autocast" is torch.autocast or `mixed_precision`, "masters" is `Masters`, both in BF16 or FP16. The
copies are those of the matrices in products: an embedding is looked up in FP32, norms stay FP32.
`companion.precision.counting` counts what these formulas predict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from companion import cost
from companion.checks import require_known
from companion.model import ModelConfig
from companion.precision.eight_bit import state_bytes
from companion.step_memory import StepMemory
from companion.surgery import outline

SCALES = 7 * 2 * 4  # bytes a block: each FP8 layer keeps two scales


@dataclass(frozen=True)
class Precision:
    """What a number takes: bytes of weights and gradients, of their averages, of activations."""

    weight: int
    state: int  # of one average; 0 for 8 bits in blocks
    copies: Callable[[ModelConfig], int]  # bytes of copies of all matrices
    activations: Callable[[ModelConfig, int, int], int]  # from shape, positions and batch


def footprint(
    config: ModelConfig, positions: int, *, batch: int = 1, precision: str = "FP32"
) -> StepMemory:
    """Predicted bytes of a step with AdamW on `batch` texts of `positions` tokens each.

    Low copies of weights count as kept. Exact for this code on a CPU. Raises ValueError for unknown
    names and impossible shapes.
    """
    require_known("precision", precision, PRECISIONS)
    found = PRECISIONS[precision]
    sizes = [weight.numel() for weight in outline(config).parameters()]
    averages = 2 * found.state * sum(sizes) if found.state else state_bytes(sizes)
    return StepMemory(
        weights=found.weight * sum(sizes),
        gradients=found.weight * sum(sizes),
        states=averages + 4 * len(sizes),
        kept=found.copies(config) + found.activations(config, positions, batch),
    )


# --- what the forward pass keeps ----------------------------------------------------------------


def plain_activations(bytes_per_number: int) -> Callable[[ModelConfig, int, int], int]:
    """`cost.activation_bytes` for a model whose weights all have this many bytes."""

    def count(config: ModelConfig, positions: int, batch: int) -> int:
        how = {"batch": batch, "bytes_per_number": bytes_per_number}
        return cost.activation_bytes(config, positions, **how)

    return count


def autocast_activations(config: ModelConfig, positions: int, batch: int) -> int:
    """As `cost.activation_bytes`, but only what products read and give is in 16 bits.

    For each position, in numbers of 16 bits (n) and of FP32 (f):
      each of 2 L + 1 norms  (2 W + 1) f         input, 1 / rms and scaled input
      each block             5 W n               the norms' results: each of query, key, value, gate
                                                 and up casts its input for itself
                             (2 H D + 2 K D) n   query, key, value; input of `out`
                             4 M n, H f          as in FP32; log of the softmax's sum
      head                   W n                 its input, cast
      loss                   as in FP32
    """
    own = config.layers * (5 * config.width + _heads(config) + 4 * config.hidden) + config.width
    return 2 * batch * positions * own + _in_fp32(config, positions, batch)


def float8_activations(config: ModelConfig, positions: int, batch: int) -> int:
    """As `cost.activation_bytes`, but the inputs of the blocks' linear layers are E4M3 codes.

    For each position, in codes of one byte (c) and numbers of FP32 (f):
      each block   (5 W + H D + M) c   inputs of the seven layers
                   (2 H D + 2 K D) f   query, key, value; result of the attention
                   3 M f               gate, silu(gate), up
      head         W f                 its input: the head is not in FP8
    """
    heads_width = config.heads * config.head_width
    codes = config.layers * (5 * config.width + heads_width + config.hidden)
    own = config.layers * (_heads(config) + 3 * config.hidden) + config.width
    return batch * positions * (codes + 4 * own) + _in_fp32(config, positions, batch)


def _heads(config: ModelConfig) -> int:
    """Numbers of query, key, value and the attention's result in one block, for a position."""
    return 2 * (config.heads + config.kv_heads) * config.head_width


def _in_fp32(config: ModelConfig, positions: int, batch: int) -> int:
    """What is FP32 in every mixed precision: inside norms, softmax and loss; and the token ids.

    It is what is left of `cost.activation_bytes` when a number of the model's type takes 0 bytes.
    """
    four, two = (plain_activations(size)(config, positions, batch) for size in (4, 2))
    return 2 * two - four


def _matrices(config: ModelConfig) -> int:
    return cost.matrix_parameters(config)


def _block_matrices(config: ModelConfig) -> int:
    return cost.matrix_parameters(config) - config.width * config.vocab


def _no_copies(config: ModelConfig) -> int:
    return 0


PRECISIONS = {
    "FP32": Precision(4, 4, _no_copies, plain_activations(4)),
    "autocast": Precision(4, 4, lambda config: 2 * _matrices(config), autocast_activations),
    "masters": Precision(4, 4, lambda config: 2 * _matrices(config), autocast_activations),
    "pure BF16": Precision(2, 2, _no_copies, plain_activations(2)),
    "8-bit states": Precision(4, 0, _no_copies, plain_activations(4)),
    "FP8": Precision(
        4, 4, lambda config: _block_matrices(config) + SCALES * config.layers, float8_activations
    ),
}

"""Bytes of an optimizer's states: worked out from the model's shape, and counted in an optimizer.

With N parameters in T tensors, N' of them in T' tensors outside the blocks' matrices (embedding,
norms, an untied head), and b bytes a number:

    SGD                       0
    momentum, Lion            b N
    Adagrad, RMSProp          b N + 4 T
    Adam, AdamW, LAMB         2 b N + 4 T
    Muon                      b N + b N' + 4 T'

The 4 bytes are a count of steps in FP32, one for each tensor.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer

from companion import cost
from companion.checks import require_known, require_number
from companion.memory import storage_bytes
from companion.model import ModelConfig

STEP = 4  # bytes of a count of steps
# Bytes from: numbers, tensors, both outside the blocks' matrices, bytes a number.
_FORMULAS: dict[str, Callable[[int, int, int, int, float], float]] = {
    "SGD": lambda n, t, n_out, t_out, b: 0,
    "momentum": lambda n, t, n_out, t_out, b: b * n,
    "Adagrad": lambda n, t, n_out, t_out, b: b * n + STEP * t,
    "RMSProp": lambda n, t, n_out, t_out, b: b * n + STEP * t,
    "Adam": lambda n, t, n_out, t_out, b: 2 * b * n + STEP * t,
    "AdamW": lambda n, t, n_out, t_out, b: 2 * b * n + STEP * t,
    "LAMB": lambda n, t, n_out, t_out, b: 2 * b * n + STEP * t,
    "Lion": lambda n, t, n_out, t_out, b: b * n,
    "Muon": lambda n, t, n_out, t_out, b: b * (n + n_out) + STEP * t_out,
}


def state_bytes(name: str, config: ModelConfig, bytes_per_number: float = 4) -> int:
    """Predicted bytes of an optimizer's states once every parameter has had a gradient.

    A block has seven matrices and two norms. Raises ValueError for an unknown optimizer.
    """
    require_known("optimizer", name, _FORMULAS)
    require_number("bytes_per_number", bytes_per_number, above=0)
    untied = 0 if config.tied else 1
    numbers, tensors = cost.parameters(config), 9 * config.layers + 2 + untied
    outside = config.width * (2 * config.layers + 1 + config.vocab * (1 + untied))
    tensors_outside = 2 * config.layers + 2 + untied
    return round(_FORMULAS[name](numbers, tensors, outside, tensors_outside, bytes_per_number))


def counted_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the storages of all tensors in an optimizer's states, each counted once."""
    kept = [value for state in optimizer.state.values() for value in state.values()]
    return storage_bytes(value for value in kept if isinstance(value, Tensor))

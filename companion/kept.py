"""What autograd keeps from a forward pass for the backward pass, counted."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def kept_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the storages that autograd keeps from `forward()`, each counted once.

    Parameters and buffers of `model` are left out: they are there anyway. This is what
    `companion.cost.activation_bytes` predicts.
    """
    there = {t.untyped_storage().data_ptr() for t in chain(model.parameters(), model.buffers())}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage  # held, so that no other can have its address
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())

"""Memory by counting tensors: what a model stores, and how much is alive at the worst moment.

The resident size of a process never falls and holds much else; live tensor bytes are exact.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def stored_bytes(model: nn.Module) -> int:
    """Bytes of parameters and saved buffers: shared storages count once, masks count too."""
    storages = (tensor.untyped_storage() for tensor in model.state_dict().values())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages that tensors lie in, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def unique_parameters(model: nn.Module) -> int:
    """Numbers a model has learned; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as live:` counts the storages operations make: `live.now`, `live.peak`.

    Storages made before are not counted, and neither is scratch space inside a kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):  # what an operation reads was there before
            if isinstance(leaf, Tensor):
                self._note(leaf, new=False)
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                self._note(leaf, new=True)
        return results

    def _note(self, tensor: Tensor, *, new: bool) -> None:
        storage = tensor.untyped_storage()
        known = self._known.get(id(storage))
        if known is not None and known() is storage:
            return
        size = storage.nbytes() if new else 0
        self._known[id(storage)] = weakref.ref(storage)
        weakref.finalize(storage, self._freed, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, size: int) -> None:
        self.now -= size


@torch.inference_mode()
def forward_peak_bytes(model: nn.Module, tokens: Tensor) -> int:
    """Stored bytes plus the most that one forward pass over tokens (B, T) keeps alive."""
    with LiveBytes() as live:
        model(tokens)
    return stored_bytes(model) + live.peak

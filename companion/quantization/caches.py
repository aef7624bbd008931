"""The key-value cache in eight or four bits: at long contexts it outweighs the model.

Each position's keys and values of one head are rounded as they come, on a grid of their own, and
expanded when they are read. The attention itself is unchanged.

Axes: B batch, K key-value heads, T new positions, S positions held, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from companion.checks import require, require_whole
from companion.model import ModelConfig
from companion.quantization.grids import affine, code_range, fit
from companion.quantization.packing import pack, together, unpack


class QuantizedCache:
    """Keys and values as codes, with a scale and a zero for each position and head."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        bits: int = 8,
        batch: int = 1,
        capacity: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Room for `capacity` positions (the model's context if None). ValueError if impossible."""
        code_range(bits)
        capacity = config.context if capacity is None else capacity
        require_whole("batch", batch)
        require_whole("capacity", capacity)
        limit, width = config.context, config.head_width
        require(capacity <= limit, f"capacity {capacity} exceeds the model's context of {limit}")
        count, _ = together(bits)
        require(width % count == 0, f"{width} codes of {bits} bits do not fill whole bytes")
        shape = (2, config.layers, batch, config.kv_heads, capacity)
        self.codes = torch.zeros(*shape, width * bits // 8, dtype=torch.uint8, device=device)
        self.scale = torch.zeros(*shape, 1, dtype=torch.float16, device=device)
        self.zero = torch.zeros(*shape, 1, dtype=torch.int8, device=device)
        self.bits, self.capacity, self.length = bits, capacity, 0

    @property
    def bytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Round and store new keys and values (B, K, T, D); all so far, expanded, (B, K, S, D)."""
        stop = self.length + key.shape[2]
        require(stop <= self.capacity, f"{stop} positions exceed the cache's {self.capacity}")
        room, given = tuple(self.codes.shape[2:4]), tuple(key.shape[:2])
        require(given == room, f"keys for (batch, heads) {given} do not fit a cache for {room}")
        return self._half(0, layer, key, stop), self._half(1, layer, value, stop)

    def _half(self, which: int, layer: int, new: Tensor, stop: int) -> Tensor:
        grid = fit(new.float(), self.bits, mapping=affine).stored_as(torch.float16)
        here = (which, layer, slice(None), slice(None), slice(self.length, stop))
        self.codes[here] = pack(grid.codes(new.float()), self.bits)
        self.scale[here], self.zero[here] = grid.scale.half(), grid.zero.to(torch.int8)
        held = (which, layer, slice(None), slice(None), slice(0, stop))
        codes = unpack(self.codes[held], self.bits).to(new.dtype)
        return (codes - self.zero[held]) * self.scale[held].to(new.dtype)

    def advance(self, positions: int) -> None:
        """Count positions as held: the model calls this after its last layer."""
        self.length += positions

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on."""
        inside = isinstance(length, int) and 0 <= length <= self.length
        require(inside, f"cannot rewind to {length}; the cache holds {self.length} positions")
        self.length = length

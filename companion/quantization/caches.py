"""The key-value cache in eight or four bits: with many long texts it outweighs the model.

Values are rounded position by position, each on a grid of its own, as they come. Keys have a few
channels that are large at every position and spoil such grids; they can be rounded channel by
channel instead, in groups of positions. A group's range is known only when it is whole, so the
latest positions wait in full. Whatever is read is expanded first; attention itself is unchanged.

Liu et al., "KIVI", arXiv:2402.02750.

Axes: L layers, B batch, K key-value heads, T new positions, S positions held, D head width,
G positions a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from companion.checks import require, require_known
from companion.decoding import Positions
from companion.model import ModelConfig
from companion.quantization.grids import Grid, affine, code_range, fit
from companion.quantization.packing import pack, together, unpack

GROUP = 32  # positions that share a channel's grid; as in the paper


class Packed:
    """Numbers (L, ..., N) as codes, with a scale and a zero for each N."""

    def __init__(self, shape: tuple[int, ...], bits: int, device: torch.device | str) -> None:
        *outer, width = shape
        count, _ = together(bits)
        require(width % count == 0, f"{width} codes of {bits} bits do not fill whole bytes")
        self.bits = bits
        self.codes = torch.zeros(*outer, width * bits // 8, dtype=torch.uint8, device=device)
        self.scale = torch.zeros(*outer, 1, dtype=torch.float16, device=device)
        self.zero = torch.zeros(*outer, 1, dtype=torch.int8, device=device)

    @property
    def bytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    def put(self, layer: int, start: int, numbers: Tensor) -> None:
        """Round numbers (B, K, C, ..., N) into places `start` to `start + C - 1` of the third."""
        grid = fit(numbers.float(), self.bits, mapping=affine).stored_as(torch.float16)
        here = (layer, slice(None), slice(None), slice(start, start + numbers.shape[2]))
        self.codes[here] = pack(grid.codes(numbers.float()), self.bits)
        self.scale[here], self.zero[here] = grid.scale.half(), grid.zero.to(torch.int8)

    def get(self, layer: int, stop: int) -> Tensor:
        """The numbers of the first `stop` places, in FP32."""
        held = (layer, slice(None), slice(None), slice(0, stop))
        grid = Grid(self.bits, self.scale[held].float(), zero=self.zero[held].float())
        return grid.numbers(unpack(self.codes[held], self.bits))


class ByPosition:
    """Vectors (B, K, T, D), each on a grid of its own."""

    def __init__(self, shape: tuple[int, ...], bits: int, device: torch.device | str) -> None:
        """`shape` is (L, B, K, capacity, D)."""
        self.packed = Packed(shape, bits, device)
        self.bytes = self.packed.bytes

    def extend(self, layer: int, start: int, new: Tensor) -> Tensor:
        """Store (B, K, T, D) from position `start`; all so far, (B, K, S, D)."""
        self.packed.put(layer, start, new)
        return self.packed.get(layer, start + new.shape[2]).to(new.dtype)

    def rewind(self, length: int, before: int) -> None:
        """Nothing to do: what lies behind `length` is overwritten."""


class ByChannel:
    """Vectors (B, K, T, D) in groups of positions; each channel of a group has a grid."""

    def __init__(self, shape: tuple[int, ...], bits: int, device: torch.device | str) -> None:
        """`shape` is (L, B, K, capacity, D)."""
        *outer, capacity, width = shape
        self.packed = Packed((*outer, capacity // GROUP, width, GROUP), bits, device)
        self.latest = torch.zeros(*outer, GROUP, width, device=device)  # a group not yet whole
        self.bytes = self.packed.bytes + self.latest.nbytes

    def extend(self, layer: int, start: int, new: Tensor) -> Tensor:
        """Store (B, K, T, D) from position `start`; all so far, (B, K, S, D)."""
        first, waiting = divmod(start, GROUP)
        unrounded = torch.cat([self.latest[layer, :, :, :waiting], new.float()], dim=2)
        whole = unrounded.shape[2] // GROUP
        if whole:
            groups = unrounded[:, :, : whole * GROUP].unflatten(2, (whole, GROUP))
            self.packed.put(layer, first, groups.transpose(-1, -2))
        rest = unrounded[:, :, whole * GROUP :]
        self.latest[layer, :, :, : rest.shape[2]] = rest
        return torch.cat([self._rounded(layer, first + whole), rest], dim=2).to(new.dtype)

    def _rounded(self, layer: int, groups: int) -> Tensor:
        return self.packed.get(layer, groups).transpose(-1, -2).flatten(2, 3)

    def rewind(self, length: int, before: int) -> None:
        """Go back into a finished group: its positions wait again, as they were rounded."""
        group, waiting = divmod(length, GROUP)
        if group < before // GROUP and waiting:
            for layer, latest in enumerate(self.latest):
                rounded = self._rounded(layer, group + 1)[:, :, -GROUP:]
                latest[:, :, :waiting] = rounded[:, :, :waiting]


KEYS_BY = {"position": ByPosition, "channel": ByChannel}


class QuantizedCache(Positions):
    """Keys and values in few bits, for `model(tokens, cache)` as the plain `Cache`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        bits: int = 8,
        keys_by: str = "position",
        batch: int = 1,
        capacity: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Room for `capacity` positions (the model's context if None). ValueError if impossible."""
        code_range(bits)
        require_known("keys_by", keys_by, KEYS_BY)
        super().__init__(config, batch, capacity)
        self.bits = bits
        self.keys = KEYS_BY[keys_by](self.shape, bits, device)
        self.values = ByPosition(self.shape, bits, device)

    @property
    def bytes(self) -> int:
        return self.keys.bytes + self.values.bytes

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Round and store new keys and values (B, K, T, D); all so far, expanded, (B, K, S, D)."""
        self.stop(key, value)
        keys = self.keys.extend(layer, self.length, key)
        return keys, self.values.extend(layer, self.length, value)

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on."""
        before = self.length
        super().rewind(length)
        self.keys.rewind(length, before)

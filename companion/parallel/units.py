"""A unit: some parameters as one line of numbers, of which each rank owns an equal piece.

The line is padded with zeros to a multiple of the ranks; rank r owns the r-th of n equal pieces,
wherever the borders fall. What a rank owns of one parameter is a *part* (it may be empty). Parts
are what an optimizer sees; whole parameters, views of the line, are what the model computes with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from companion.checks import require
from companion.parallel.processes import place


class Unit:
    """The parameters that `modules` themselves hold; with `resident`, the line is always there."""

    def __init__(
        self, modules: Iterable[nn.Module], group: dist.ProcessGroup, *, resident: bool
    ) -> None:
        self.group, (self.rank, self.ranks) = group, place(group)
        homes: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in modules:
            for name, parameter in module.named_parameters(recurse=False):
                homes.setdefault(parameter, []).append((module, name))
        self._homes = list(homes.values())
        self._lay(list(homes), resident)
        self.show(self.parts)

    def _lay(self, parameters: Sequence[nn.Parameter], resident: bool) -> None:
        types = sorted({str(p.dtype) for p in parameters})
        require(len(types) == 1, f"parameters of one unit are {types}; one type is expected")
        sizes = [p.numel() for p in parameters]
        padding = -sum(sizes) % self.ranks
        numbers = [p.detach().flatten() for p in parameters]
        self.line = torch.cat([*numbers, numbers[0].new_zeros(padding)])
        self.piece = self._piece_of(self.line)
        if not resident:
            self.piece = self.piece.clone()
        # what pads the line belongs to the last parameter; there it has no gradient and stays zero
        self._borders = [0, *accumulate([*sizes[:-1], sizes[-1] + padding])]
        self._matrices = [p.ndim >= 2 for p in parameters]
        views = self.line[: sum(sizes)].split(sizes)
        # `.data`: a rewritten line must not make autograd think that what it saved was changed
        self.wholes = [
            nn.Parameter(view.view_as(p).data, p.requires_grad)
            for view, p in zip(views, parameters, strict=True)
        ]
        self.parts = [
            nn.Parameter(part.data, p.requires_grad)
            for part, p in zip(self._parts_of(self.piece), parameters, strict=True)
        ]
        if not resident:
            self.free()

    def _piece_of(self, line: Tensor) -> Tensor:
        return line.chunk(self.ranks)[self.rank]

    def _parts_of(self, piece: Tensor) -> list[Tensor]:
        """The piece cut into parts: (numbers,) of a vector, (1, numbers) of a matrix.

        So an optimizer that treats matrices in a way of their own can tell them apart.
        """
        size = len(piece)
        cuts = [min(max(border - self.rank * size, 0), size) for border in self._borders]
        parts = [piece[start:stop] for start, stop in pairwise(cuts)]
        return [p[None] if m else p for p, m in zip(parts, self._matrices, strict=True)]

    def show(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let the modules hold `self.wholes` or `self.parts`."""
        for homes, parameter in zip(self._homes, parameters, strict=True):
            for module, name in homes:
                setattr(module, name, parameter)

    def gather(self) -> None:
        """Fill the line with all ranks' pieces: one all-gather."""
        storage = self.line.untyped_storage()
        if storage.nbytes() == 0:
            storage.resize_(self.line.nbytes)
        dist.all_gather_single(self.line, self.piece, group=self.group)

    def free(self) -> None:
        """Give the line's memory back; to read a whole parameter now would crash the process.

        What autograd saved of the parameters lives in this memory too: to free it, the storage must
        be emptied, and it must be filled again before the backward pass comes there.
        """
        self.line.untyped_storage().resize_(0)

    @torch.no_grad()
    def reduce(self, *, keep_line: bool) -> None:
        """Add the mean over the ranks of the whole gradients to the parts': one reduce-scatter.

        With `keep_line` the parts' gradients are views of a line as long as all, which they keep.
        """
        found = [torch.zeros_like(w) if w.grad is None else w.grad for w in self.wholes]
        padding = self._borders[-1] - sum(g.numel() for g in found)
        line = torch.cat([*(g.flatten() for g in found), found[0].new_zeros(padding)])
        line /= self.ranks
        mine = self._piece_of(line) if keep_line else torch.empty_like(self.piece)
        dist.reduce_scatter_single(mine, line, group=self.group)
        for whole in self.wholes:
            whole.grad = None
        for part, gradient in zip(self.parts, self._parts_of(mine), strict=True):
            if part.requires_grad:
                part.grad = gradient if part.grad is None else gradient.add_(part.grad)

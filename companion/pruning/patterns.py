"""Patterns: among which weights the lowest scores are sought, so where zeros may lie.

A pattern is a function of scores (O, I) and a share to remove that says which weights are kept.
Free zeros harm least; zeros in order (two of every four, whole blocks) are what hardware can use.
How many go is rounded to the nearest number, half to even, as `torch.nn.utils.prune` does it; among
equal scores the first go.

Axes: O outputs, I inputs; N groups of M weights that compete.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from companion.checks import require, require_whole

Pattern = Callable[[Tensor, float], Tensor]


def over_matrix(scores: Tensor, share: float) -> Tensor:
    """Keep all but the lowest `share` of a matrix (O, I), wherever they are."""
    require_share("share", share)
    return ~lowest(scores.reshape(1, -1), round(share * scores.numel())).view_as(scores)


def over_rows(scores: Tensor, share: float) -> Tensor:
    """Keep all but the lowest `share` of each row: every output loses as many inputs."""
    require_share("share", share)
    return ~lowest(scores, round(share * scores.shape[1]))


def in_groups(size: int = 4) -> Pattern:
    """Zeros evenly spread: of each `size` neighbouring inputs the lowest `share` goes.

    A share of 0.5 of groups of 4 is the 2:4 pattern of sparse tensor cores, arXiv:2104.08378.
    Raises ValueError unless groups divide the inputs, and the share a group, into whole numbers.
    """
    require_whole("size", size, least=2)

    def pattern(scores: Tensor, share: float) -> Tensor:
        require_share("share", share)
        count, inputs = round(share * size), scores.shape[1]
        whole = math.isclose(count, share * size, abs_tol=1e-9)
        require(whole, f"a share of {share} of {size} inputs is {share * size:g}, no whole number")
        require(inputs % size == 0, f"groups of {size} do not divide the {inputs} inputs")
        return ~lowest(scores.reshape(-1, size), count).view_as(scores)

    return pattern


def in_blocks(rows: int, columns: int) -> Pattern:
    """Whole blocks of rows x columns are kept or removed, by the sum of their scores.

    Raises ValueError unless blocks divide the matrix.
    """
    require_whole("rows", rows)
    require_whole("columns", columns)

    def pattern(scores: Tensor, share: float) -> Tensor:
        high, wide = scores.shape
        fits = high % rows == 0 and wide % columns == 0
        require(fits, f"blocks of {rows} x {columns} do not divide a matrix of {high} x {wide}")
        blocks = scores.reshape(high // rows, rows, wide // columns, columns).sum((1, 3))
        kept = over_matrix(blocks, share)
        return kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)

    return pattern


def lowest(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest of each row of (N, M), as a mask; among equal scores the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    border = scores.kthvalue(count, dim=-1, keepdim=True).values
    below, equal = scores < border, scores == border
    missing = count - below.sum(-1, keepdim=True)
    if torch.equal(missing, equal.sum(-1, keepdim=True)):
        return below | equal
    return below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))


def require_share(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a number from 0 to below 1."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(number and 0 <= value < 1, f"{name} is {value!r}; it must be at least 0 and below 1")

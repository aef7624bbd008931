"""AdamW whose running averages take 8 bits: a code a number, and a scale for each block.

    numbers    0.031  -0.0002   0.0075 ...   256 of one tensor: a block
    scale      0.031                         the largest size in the block, FP32
    code       the nearest of 256 levels between -1 and 1, one byte

The levels are no even grid. Averages of gradients spread over many powers of ten, so the levels
thin out towards 1 and crowd towards 0: seven decades, the top one with the most levels. A step
expands the codes, computes AdamW in FP32 and stores new codes. Dettmers et al., arXiv:2110.02861.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import Optimizer

from companion.checks import next_multiple, require, require_known, require_whole
from companion.memory import storage_bytes
from companion.optimizers.options import matrices_and_vectors, settings
from companion.precision.pure import adamw_update

BLOCK = 256  # numbers that share a scale
LEAST = 4096  # smaller tensors keep FP32 averages: they are few bytes, and often the delicate ones


def dynamic_levels(signed: bool) -> Tensor:
    """256 rising levels: (256,) FP32 from -0.99 or 0 to 1, more per decade for larger numbers.

    A code spends its bits on a sign (if any), a number of leading zeros that says the decade, a
    marker, and an even division of the decade with the bits left. arXiv:2110.02861, 1.3.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for zeros in range(7):
        count = 2 ** (6 - zeros if signed else 7 - zeros)
        edges = torch.linspace(0.1, 1, count + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0**-zeros
        levels += [middles, -middles] if signed else [middles]
    return torch.cat(levels).sort().values


def linear_levels(signed: bool) -> Tensor:
    """256 evenly spaced levels from -1 (signed) or 0 to 1: what the dynamic ones improve on."""
    if signed:  # 0 must be a level, so that an average of 0 stays 0
        return torch.arange(-128, 128) / 127
    return torch.linspace(0, 1, 256)


LEVELS = {"dynamic": dynamic_levels, "linear": linear_levels}


def encoded(numbers: Tensor, levels: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Codes (uint8, the shape of `numbers`) and scales (a FP32 number a block, the last ragged)."""
    flat = numbers.flatten()
    blocks = pad(flat, (0, next_multiple(flat.numel(), block) - flat.numel())).view(-1, block)
    scales = blocks.abs().amax(1)
    shares = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    below = (torch.searchsorted(levels, shares, right=True) - 1).clamp(min=0)
    above = (below + 1).clamp(max=255)
    near_above = shares - levels[below] >= (levels[above] - levels[below]) / 2
    codes = torch.where(near_above, above, below).flatten()[: flat.numel()]
    return codes.view(numbers.shape).to(torch.uint8), scales


def decoded(codes: Tensor, scales: Tensor, levels: Tensor, block: int = BLOCK) -> Tensor:
    """The FP32 numbers that codes stand for, in their shape."""
    each = scales.repeat_interleave(block)[: codes.numel()]
    return (levels[codes.flatten().int()] * each).view(codes.shape)


def state_bytes(sizes: Iterable[int], block: int = BLOCK, least: int = LEAST) -> int:
    """Predicted bytes of both averages of tensors with so many numbers each.

    2 (n + 4 ceil(n / block)) where n is at least `least`, else 8 n. Left out: the steps counted,
    and the two tables of 1 KiB that all tensors share.
    """
    each = (2 * (n + 4 * -(-n // block)) if n >= least else 8 * n for n in sizes)
    return sum(each)


def held_bytes(optimizer: Optimizer) -> int:
    """Counted bytes of what an optimizer keeps for each parameter, its step counters left out."""
    tensors = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    return storage_bytes(tensors)


class EightBitAdamW(Optimizer):
    """AdamW with 8-bit averages; tensors of fewer than `least` numbers keep FP32 ones.

    Raises ValueError for a block below 1, an unknown format of the codes and, at a step, for a
    gradient that is not finite, before anything is changed.
    """

    def __init__(
        self,
        params,
        rate: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        epsilon: float = 1e-8,
        decay: float = 0.1,
        block: int = BLOCK,
        format: str = "dynamic",
        least: int = LEAST,
    ) -> None:
        require_whole("block", block)
        require_whole("least", least, least=0)
        require_known("format", format, LEVELS)
        super().__init__(params, settings(rate, betas, decay, epsilon=epsilon))
        self.block, self.least = block, least
        self._levels = {"mean": LEVELS[format](True), "square": LEVELS[format](False)}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient."""
        waiting = [(p, g) for g in self.param_groups for p in g["params"] if p.grad is not None]
        bad = int(sum((~p.grad.isfinite()).sum() for p, _ in waiting))
        require(bad == 0, f"{bad} numbers of the gradients are not finite; nothing was changed")
        for parameter, group in waiting:
            state = self.state[parameter]
            count = state.setdefault("step", torch.zeros(()))
            count += 1
            old = (self._read(parameter, name) for name in ("mean", "square"))
            weight, gradient = parameter.float(), parameter.grad.float()
            new, mean, square = adamw_update(weight, gradient, *old, int(count), group)
            self._write(parameter, "mean", mean)
            self._write(parameter, "square", square)
            parameter.copy_(new)

    def _read(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            return torch.zeros_like(parameter, dtype=torch.float32)
        if name + "_scales" not in state:
            return state[name]
        levels = self._levels[name].to(parameter.device)
        return decoded(state[name], state[name + "_scales"], levels, self.block)

    def _write(self, parameter: Tensor, name: str, numbers: Tensor) -> None:
        state = self.state[parameter]
        if parameter.numel() < self.least:
            state[name] = numbers
            return
        levels = self._levels[name].to(parameter.device)
        state[name], state[name + "_scales"] = encoded(numbers, levels, self.block)

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but codes stay bytes: torch would turn them into the parameters' type."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            device = parameters[index].device
            for name, value in saved.items():
                place = "cpu" if name == "step" else device
                self.state[parameters[index]][name] = value.to(place, copy=True)


def eight_bit_adamw(
    model: nn.Module,
    rate: float = 1e-3,
    *,
    decay: float = 0.1,
    block: int = BLOCK,
    format: str = "dynamic",
    least: int = LEAST,
) -> EightBitAdamW:
    """`EightBitAdamW` with the settings of `companion.training.adamw`: only matrices decay."""
    groups = matrices_and_vectors(model, decay)
    return EightBitAdamW(groups, rate, block=block, format=format, least=least)

"""Which blocks should give up neurons: a share for each, at what price in nats and bytes.

The losses are measured beforehand, one block and one share at a time, and added up; what blocks do
to each other is left out. Bytes follow from the shape. A token waits for the weights it reads, so
its speed follows from the bytes, but for a part of its time that does not depend on them.

A config has one number of neurons for all blocks, so `shrink` takes the same share from each. A
model whose blocks differ is judged by `masked_twin`, which holds zeros instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import ipywidgets as widgets

from companion import cost
from companion import style as look
from companion.checks import require, require_known
from companion.explorers.choices import LOOK, Explorer
from companion.model import ModelConfig
from companion.style import Card

MOST = 10_000  # choices that are worked out; there are shares ** blocks of them

Shares = tuple[float, ...]  # of the neurons removed, one for each block
Losses = Mapping[float, Sequence[float]]  # share removed -> nats per token, one for each block


@dataclass(frozen=True)
class Choice:
    """What one choice of shares costs and gains."""

    shares: Shares
    megabytes: float  # of FP32 weights
    nats: float  # per token, more than the whole model
    speed: float  # of a token, times the whole model's

    @property
    def name(self) -> str:
        return " ".join(f"{share:.0%}" for share in self.shares)

    def __str__(self) -> str:
        price = f"{self.nats:.3f} nats per token more, a token {self.speed:.2f} x as fast"
        return f"{self.name}: {self.megabytes:.1f} MB, {price}"


def choices(config: ModelConfig, losses: Losses, *, fixed: float = 0.0) -> dict[Shares, Choice]:
    """All choices there are: one of the shares of `losses` for each block.

    `fixed` is the share of a token's time that does not depend on bytes, such as calls. Raises
    ValueError for shares outside [0, 1), for losses that are not one finite number a block, and
    for more than 10,000 choices.
    """
    _check(config, losses, fixed)
    whole = _read_bytes(config, 0)
    found = {}
    for shares in product(sorted(losses), repeat=config.layers):
        gone = sum(round(share * config.hidden) for share in shares)
        nats = sum(losses[share][block] for block, share in enumerate(shares))
        megabytes = (cost.weight_bytes(config) - 4 * 3 * config.width * gone) / 1e6
        speed = 1 / (fixed + (1 - fixed) * _read_bytes(config, gone) / whole)
        found[shares] = Choice(shares, megabytes, nats, speed)
    return found


def best(found: Mapping[Shares, Choice]) -> list[Choice]:
    """The choices for which no other is as small and loses as little, smallest first."""
    kept: list[Choice] = []
    for choice in sorted(found.values(), key=lambda c: (c.megabytes, c.nats)):
        if not kept or choice.nats < kept[-1].nats:
            kept.append(choice)
    return kept


def sparsity_figure(
    config: ModelConfig, losses: Losses, shares: Shares | None = None, *, fixed: float = 0.0
) -> Card:
    """All choices by megabytes and nats lost, the best as a line, and one of them marked.

    Without `shares` that is the largest share from every block.
    `losses` are {share removed: nats per token lost, one for each block}, as `block_losses` finds
    them. Raises ValueError as `choices` does, and for shares that are not among the losses.
    """
    found = choices(config, losses, fixed=fixed)
    ours = _chosen(found, shares or (max(losses),) * config.layers)
    rest = best(found)
    title = f"Neurons removed: {ours.name}"
    alt = f"{ours}. Of {len(found)} choices {len(rest)} are best for their size"
    with look.style():
        figure = look.card(title, alt=alt, height=4.4)
        axes = figure.subplots()
        dots = {"linestyle": "none", "color": "#999999", "markersize": 4}
        axes.plot(*_places(found.values()), marker="o", label="every choice", **dots)
        axes.plot(*_places(rest), color="black", label="best for its size")
        mark = {"linestyle": "none", "color": look.COLOURS[1], "marker": look.MARKERS[1]}
        axes.plot(*_places([ours]), **mark, markersize=11, label="this one")
        look.label_axes(axes, "stored model (MB)", "predicted loss (nats per token)")
        figure.legend(loc="outside lower left", ncols=3)
    return figure


def sparsity_explorer(config: ModelConfig, losses: Losses, *, fixed: float = 0.0) -> Explorer:
    """`sparsity_figure` behind a slider for each block, and the best choice of the same size."""
    found, options = choices(config, losses, fixed=fixed), sorted(losses)
    controls = {
        f"block_{block}": widgets.SelectionSlider(
            description=f"block {block}",
            options=[(f"{share:.0%}", share) for share in options],
            value=options[len(options) // 2],
            **LOOK,
        )
        for block in range(config.layers)
    }
    return Explorer(controls, partial(_told, config, losses, found, fixed))


def _told(
    config: ModelConfig,
    losses: Losses,
    found: Mapping[Shares, Choice],
    fixed: float,
    **shares: float,
) -> str:
    ours = _chosen(found, tuple(shares.values()))
    better = min((c for c in best(found) if c.megabytes <= ours.megabytes), key=lambda c: c.nats)
    same = "no choice of this size or smaller is predicted to lose less"
    words = same if better == ours else f"no larger and predicted to lose least: {better}"
    figure = sparsity_figure(config, losses, ours.shares, fixed=fixed)
    note = "Losses of single blocks, added up; speed from bytes. Masked neurons win neither."
    return f"<p><b>{ours}</b></p><p>{words}</p>{figure._repr_html_()}<p><small>{note}</small></p>"


def _chosen(found: Mapping[Shares, Choice], shares: Sequence[float]) -> Choice:
    known = sorted({share for one in found for share in one})
    blocks = len(next(iter(found)))
    require(len(shares) == blocks, f"{len(shares)} shares given; {blocks}, one a block, are needed")
    for share in shares:
        require_known("share", share, known)
    return found[tuple(shares)]


def _places(some: Iterable[Choice]) -> tuple[list[float], list[float]]:
    some = list(some)
    return [choice.megabytes for choice in some], [choice.nats for choice in some]


def _read_bytes(config: ModelConfig, gone: int) -> int:
    """Bytes of FP32 weights that a token reads when so many neurons are gone in all."""
    embedding = 0 if config.tied else 4 * config.vocab * config.width  # looked up, not read
    return cost.weight_bytes(config) - embedding - 4 * 3 * config.width * gone


def _check(config: ModelConfig, losses: Losses, fixed: float) -> None:
    require(0 <= fixed < 1, f"fixed is {fixed}; a share from 0 to below 1 is needed")
    require(len(losses) > 0, "losses holds 0 shares; at least 1 is needed")
    many = len(losses) ** config.layers
    require(
        many <= MOST,
        f"{many} choices, {len(losses)} shares in {config.layers} blocks; "
        f"at most {MOST} can be worked out",
    )
    for share, row in losses.items():
        require(0 <= share < 1, f"share {share} is not from 0 to below 1")
        good = len(row) == config.layers and all(map(math.isfinite, row))
        wanted = f"{config.layers} finite numbers, one for each block, are needed"
        require(good, f"losses at a share of {share} are {list(row)[:3]}...; {wanted}")

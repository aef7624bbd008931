"""What a temperature does to a teacher's soft labels: one position, its best tokens, its entropy.

At temperature T a token's chance is softmax(logits / T). The larger T, the nearer the chances are
to each other, and the smaller the gradient of imitation: hence the factor T^2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from companion import style as look
from companion.checks import require, require_finite, require_number, require_whole
from companion.explorers.choices import LOOK, Explorer, choice
from companion.model import LanguageModel
from companion.style import Card
from companion.tokenization import Tokenizer


@dataclass(frozen=True, eq=False)
class SoftLabels:
    """A distribution over next tokens at a temperature."""

    shares: Tensor  # (V,) chances
    temperature: float

    @property
    def entropy(self) -> float:
        """Nats: 0 for one certain token, log V where all are alike."""
        return torch.special.entr(self.shares).sum().item()

    @property
    def choices(self) -> float:
        """As many equally likely tokens would have this entropy."""
        return math.exp(self.entropy)

    def __str__(self) -> str:
        """The numbers in a line."""
        best, rest = self.shares.max().item(), f"like {self.choices:,.1f} equal choices"
        found = f"best {best:.1%}, entropy {self.entropy:.2f} nats, {rest}"
        return f"T = {self.temperature:g}: {found}; T² = {self.temperature**2:g}"


def soft_labels(logits: Tensor, temperature: float = 1.0) -> SoftLabels:
    """The chances that logits (V,) give at a temperature, in FP64.

    Raises ValueError for another shape, logits that are not finite, a temperature of 0 or less.
    """
    shape = tuple(logits.shape)
    require(
        logits.ndim == 1 and len(logits) > 0, f"the logits have shape {shape}; (V,) is expected"
    )
    require_finite(logits, "logits")
    require_number("temperature", temperature, above=0)
    return SoftLabels((logits.detach().double() / temperature).softmax(-1), temperature)


@torch.inference_mode()
def next_logits(model: LanguageModel, tokenizer: Tokenizer, text: str) -> Tensor:
    """The model's logits (V,) for the token that follows a text, led in by the end token."""
    device = model.norm.weight.device
    ids = torch.tensor([[tokenizer.end, *tokenizer.encode(text)]], device=device)
    return model(ids)[0, -1].cpu()


def temperature_figure(
    logits: Tensor, tokenizer: Tokenizer, temperature: float = 2.0, *, best: int = 8
) -> Card:
    """The chances of the `best` tokens at a temperature, with those at 1 behind them.

    Raises ValueError for what cannot be drawn, and where there are fewer tokens than `best`.
    """
    plain, soft = soft_labels(logits), soft_labels(logits, temperature)
    require_whole("best", best)
    require(best <= len(logits), f"best is {best}; there are {len(logits)} tokens")
    ids = plain.shares.topk(best).indices
    names = [repr(tokenizer.decode([index])) for index in ids.tolist()]
    names.append(f"other {len(logits) - best:,}")
    rows = [_percent(labels, ids) for labels in (plain, soft)]
    told = [f"{name} {one:.1f} to {two:.1f} %" for name, one, two in zip(names, *rows, strict=True)]
    alt = f"Chances at 1 and at {temperature:g}: {'; '.join(told)}"
    with look.style():
        figure = look.card(str(soft), alt=alt, height=4.6)
        _draw(figure.subplots(), names, rows, temperature)
        figure.legend(loc="outside lower left", ncols=2)
    return figure


def temperature_explorer(
    model: LanguageModel, tokenizer: Tokenizer, texts: Mapping[str, str]
) -> Explorer:
    """`temperature_figure` after a text, {name: text}, at the temperature of a slider.

    Each text is read once. Raises ValueError for no texts.
    """
    require(len(texts) > 0, "there are 0 texts; give at least one")
    read = {name: next_logits(model, tokenizer, text) for name, text in texts.items()}
    slider = {"min": 0.25, "max": 8.0, "step": 0.25, "value": 2.0, "readout_format": ".2f"}
    controls = {
        "text": choice("text", [*read], next(iter(read))),
        "temperature": widgets.FloatSlider(description="temperature", **slider, **LOOK),
    }

    def show(*, text: str, temperature: float) -> str:
        return temperature_figure(read[text], tokenizer, temperature)._repr_html_()

    return Explorer(controls, show)


def _percent(labels: SoftLabels, ids: Tensor) -> list[float]:
    """Chances of some tokens, and of all the others together, in percent."""
    shares = [100 * share for share in labels.shares[ids].tolist()]
    return [*shares, 100 - sum(shares)]


def _draw(axes: Axes, names: list[str], rows: list[list[float]], temperature: float) -> None:
    """Two bars for each token: pale at a temperature of 1, hatched at the one chosen."""
    places, height = np.arange(len(names)), 0.4
    paints = ({"color": look.PALE, "hatch": ""}, {"color": look.COLOURS[5], "hatch": "//"})
    labels = ("T = 1", f"T = {temperature:g}")
    for index, (row, paint, label) in enumerate(zip(rows, paints, labels, strict=True)):
        where = places + (index - 0.5) * height
        axes.barh(where, row, height, label=label, edgecolor="black", **paint)
    axes.set_yticks(places, [name.replace("$", r"\$") for name in names])  # no formulas
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    look.label_axes(axes, "chance (%)", None)

"""Quality: how many bits a model needs for each byte of a text it has not seen.

Bits per byte compare models with different tokenizers; perplexity does not. Models are judged on
the same tokens and differences taken before their spread, which is far narrower than the spread of
either. Neighbouring tokens are alike, so a window counts as one observation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from companion.checks import require
from companion.data import Passage
from companion.intervals import Interval, t_quantile
from companion.losses import token_divergences, token_losses

LOGITS_AT_ONCE = 2**25  # numbers; 134 MB in FP32


@dataclass(frozen=True, eq=False)
class Quality:
    """Sums over the windows of one passage, (windows,) each, in FP64."""

    losses: Tensor  # nats
    divergences: Tensor  # nats, KL(first model || this one)
    agreements: Tensor  # tokens whose best guess is the first model's
    tokens: Tensor
    bytes: Tensor

    def bits_per_byte(self) -> Interval:
        return ratio_of_sums(self.losses / math.log(2), self.bytes)

    def nats_per_token(self) -> Interval:
        return ratio_of_sums(self.losses, self.tokens)

    def perplexity(self) -> Interval:
        """exp(nats per token): how many sides a fair die as hard to guess would have."""
        nats = self.nats_per_token()
        return Interval(*(math.exp(x) for x in (nats.estimate, nats.low, nats.high)), nats.level)

    def divergence(self) -> Interval:
        """Mean KL(first || this), nats per token."""
        return ratio_of_sums(self.divergences, self.tokens)

    def agreement(self) -> Interval:
        """Share of positions at which this model's best guess is the first model's."""
        return ratio_of_sums(self.agreements, self.tokens)

    def excess(self, other: Quality) -> Interval:
        """Bits per byte more than `other` needs on the same windows (negative: fewer)."""
        require(torch.equal(self.bytes, other.bytes), "the two were judged on different windows")
        return ratio_of_sums((self.losses - other.losses) / math.log(2), self.bytes)


def ratio_of_sums(amounts: Tensor, sizes: Tensor, level: float = 0.95) -> Interval:
    """sum(amounts) / sum(sizes), with an interval over the pairs as independent observations.

    The standard error is that of a ratio estimator (Cochran, Sampling Techniques, chapter 6): the
    spread of amount - ratio x size. One window has no spread: the interval is then infinite.
    """
    count, ratio = len(sizes), (amounts.sum() / sizes.sum()).item()
    if count < 2:
        return Interval(ratio, -math.inf, math.inf, level)
    residuals = amounts - ratio * sizes
    error = math.sqrt(count / (count - 1) * residuals.square().sum().item()) / sizes.sum().item()
    reach = t_quantile((1 + level) / 2, count - 1) * error
    return Interval(ratio, ratio - reach, ratio + reach, level)


@torch.inference_mode()
def judge(text: Passage, models: Mapping[str, nn.Module]) -> dict[str, Quality]:
    """Each model's `Quality` on a passage; divergence and agreement are against the first model.

    Raises ValueError without models, and for a model that gives other shapes than (B, T, vocab).
    """
    require(len(models) > 0, "there are 0 models; at least one is needed")
    rows: dict[str, list[Tensor]] = {name: [] for name in models}
    for tokens in text.batches(batch=max(1, LOGITS_AT_ONCE // (text.window * 2**16))):
        first = None
        for name, model in models.items():
            logits = model(tokens.to(_device(model))).cpu()
            first = logits if first is None else first
            rows[name].append(_window_sums(logits, first, tokens))
    sizes = _window_sizes(text)
    return {name: Quality(*torch.cat(sums, dim=1), *sizes) for name, sums in rows.items()}


def _window_sums(logits: Tensor, first: Tensor, tokens: Tensor) -> Tensor:
    """(3, B): summed loss, divergence and agreement of each window."""
    losses = token_losses(logits, tokens)
    same = logits is first  # then the divergence is 0, and dear to compute
    divergences = 0 * losses if same else token_divergences(logits, first)[:, :-1]
    agreements = logits[:, :-1].argmax(-1) == first[:, :-1].argmax(-1)
    return torch.stack([part.double().sum(-1) for part in (losses, divergences, agreements)])


def _window_sizes(text: Passage) -> tuple[Tensor, Tensor]:
    """Tokens and bytes of each window, (windows,) each."""
    parts = text.byte_counts.split(text.window)
    tokens = torch.tensor([len(part) for part in parts], dtype=torch.float64)
    return tokens, torch.stack([part.sum() for part in parts]).double()


def _device(model: nn.Module) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")

"""Mixed bits: give the bits to the layers that need them, under a budget of bytes.

Each layer is quantized alone, at each number of bits, and the harm is measured. Harms are taken to
add up. Then all layers start at the fewest bits, and the exchange that removes most harm for a byte
is made first, until nothing more fits. The documents call it adaptive quantization.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from tqdm.auto import tqdm

from companion.checks import require, require_whole
from companion.data import Passage
from companion.memory import stored_bytes
from companion.model import LanguageModel
from companion.quality import judge
from companion.quantization.replacing import codings, nearest, quantized_layer
from companion.surgery import chosen, linears

Costs = Mapping[str, Mapping[int, float]]  # layer -> bits -> harm, or bytes


def sensitivities(
    model: LanguageModel,
    text: Passage,
    *,
    bits: Sequence[int] = (8, 4, 3, 2),
    layers: Sequence[str] | None = None,
    **options,
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    """Harm and bytes of each layer at each number of bits, all other layers left as they are.

    Harm is the mean KL divergence from the model's own predictions on `text`, nats a token.
    `options` are those of `quantize`. For each layer the text is read once at each number of bits,
    and once by the plain model.
    """
    names = list(chosen(model, linears)) if layers is None else list(layers)
    harms: dict[str, dict[int, float]] = {name: {} for name in names}
    sizes: dict[str, dict[int, float]] = {name: {} for name in names}
    for name in tqdm(names, desc="layers", delay=3, leave=False):
        layers_tried = {b: _quantized_layer(model, name, b, options) for b in bits}
        tried = {str(b): _With(model, name, layer) for b, layer in layers_tried.items()}
        found = judge(text, {"plain": model, **tried})
        for b, layer in layers_tried.items():
            harms[name][b] = max(0.0, found[str(b)].divergence().estimate)
            sizes[name][b] = stored_bytes(nn.ModuleList([layer]))
    return harms, sizes


def _quantized_layer(model: LanguageModel, name: str, bits: int, options: dict) -> nn.Module:
    rounding = options.get("rounding", nearest)
    rest = {option: value for option, value in options.items() if option != "rounding"}
    coding = codings(model, {name: bits}, head=None, **rest)[name]
    return quantized_layer(model, name, coding, rounding)


class _With(nn.Module):
    """A model that has another layer for the length of each call; nothing is copied."""

    def __init__(self, model: nn.Module, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.model, self.name, self.layer = model, name, layer

    def forward(self, tokens: Tensor) -> Tensor:
        plain = self.model.get_submodule(self.name)
        self.model.set_submodule(self.name, self.layer)
        try:
            return self.model(tokens)
        finally:
            self.model.set_submodule(self.name, plain)


def allocate(harms: Costs, sizes: Costs, budget: int) -> dict[str, int]:
    """Bits for each layer with little harm in all, in at most `budget` bytes.

    Greedy: the best exchange for a byte first, several bits at once where that is better. Raises
    ValueError if even the fewest bits do not fit.
    """
    require_whole("budget", budget)
    same = harms.keys() == sizes.keys() and len(harms) > 0
    same = same and all(harms[name].keys() == sizes[name].keys() for name in harms)
    require(same, "harms and sizes name other layers or other bits")
    finite = all(math.isfinite(harm) for by_bits in harms.values() for harm in by_bits.values())
    require(finite, "a harm is not finite; measure it again")
    chosen_bits = {name: min(sizes[name], key=sizes[name].__getitem__) for name in sizes}
    spent = sum(sizes[name][b] for name, b in chosen_bits.items())
    require(spent <= budget, f"the fewest bits take {spent:,} bytes, more than {budget:,}")
    while True:
        offers = [
            ((harms[name][now] - harms[name][b]) / (sizes[name][b] - sizes[name][now]), name, b)
            for name, now in chosen_bits.items()
            for b in sizes[name]
            if 0 < sizes[name][b] - sizes[name][now] <= budget - spent
        ]
        best = max(offers, default=(0.0, "", 0))
        if best[0] <= 0:
            return chosen_bits
        _, name, b = best
        spent += sizes[name][b] - sizes[name][chosen_bits[name]]
        chosen_bits[name] = b

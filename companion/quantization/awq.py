"""AWQ: make the columns that meet large inputs larger before rounding, and divide afterwards.

Rounding is wrong by a share of the group's largest weight. A column that is multiplied by s, and
whose inputs are divided by s, therefore loses 1/s of that, while the others of its group lose a
little more. s is the inputs' mean size to a power; the power is the best of a few on calibration
text. Here s stays beside the codes, where the paper works it into the layer before.

Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from companion.calibration import Inputs, seen
from companion.checks import require_whole
from companion.quantization.replacing import Coding, Rounded, Rounding, nearest


def awq(inputs: Mapping[str, Inputs], *, powers: int = 10) -> Rounding:
    """A rounding for `quantize` that scales columns by what `observe` saw each layer read.

    Tried are the powers 0 (plain rounding), 1/`powers`, ... 1.
    """
    require_whole("powers", powers)

    def rounding(name: str, weight: Tensor, coding: Coding) -> Rounded:
        found = seen(inputs, name, weight)
        tried = [scaled(weight, coding, found, step / powers) for step in range(powers + 1)]
        return min(tried, key=lambda r: output_error(weight - r.numbers(weight.shape[1]), found))

    return rounding


def scaled(weight: Tensor, coding: Coding, found: Inputs, power: float) -> Rounded:
    """The weight (O, I) rounded after its columns were multiplied by mean |x|^power, evened out."""
    sizes = (found.magnitudes / found.positions).clamp(min=1e-8) ** power
    sizes = sizes / (sizes.max() * sizes.min()).sqrt()
    columns = (1 / sizes).clamp(1e-4, 1e4).half().float()
    return replace(nearest("", weight / columns, coding), columns=columns)


def output_error(change: Tensor, found: Inputs) -> float:
    """Sum of squares of X D^T over all positions seen, for a change D (O, I) of the weight."""
    return ((change @ found.products) * change).sum().item()

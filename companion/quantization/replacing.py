"""The technique: a model in, a new model with fewer bits a weight out.

Every linear layer inside the blocks is replaced, then embedding and head, which take more bits by
default: with 49,152 tokens they are a fifth of SmolLM2 and matter more than their size. A head that
is tied to the embedding stays tied, so its codes are stored once. Norms keep their type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from companion.checks import require, require_known
from companion.model import LanguageModel
from companion.quantization.formats import FORMATS, in_format
from companion.quantization.grids import (
    GridMapping,
    Limits,
    affine,
    code_range,
    extremes,
    fit,
    grouped,
)
from companion.quantization.layers import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedMatrix,
    Scheme,
)
from companion.surgery import chosen, copied, linears


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How one weight is stored: bits of a code or a format's name, and how its grid is found."""

    bits: int | str = 8
    group: int | str = "row"
    mapping: GridMapping = affine
    limits: Limits = extremes

    def __post_init__(self) -> None:
        if isinstance(self.bits, str):
            require_known("format", self.bits, FORMATS)
        else:
            code_range(self.bits)

    def scheme(self, weight: Tensor) -> Scheme:
        """The grids, or the format, of a weight already grouped as (O, G, N)."""
        if isinstance(self.bits, str):
            return in_format(weight, self.bits)
        grid = fit(weight, self.bits, mapping=self.mapping, limits=self.limits)
        return grid.stored_as(torch.float16)


@dataclass(frozen=True, eq=False)
class Rounded:
    """What became of a weight (O, I): codes (O, G, N), what they stand for, and times what."""

    codes: Tensor
    scheme: Scheme
    columns: Tensor | None = None  # (I,): each column is to be multiplied by this; None: by 1

    def numbers(self, inputs: int) -> Tensor:
        """The weight (O, I) that is left, of rows of `inputs` numbers."""
        numbers = self.scheme.numbers(self.codes).reshape(-1, inputs)
        return numbers if self.columns is None else numbers * self.columns


Rounding = Callable[[str, Tensor, Coding], Rounded]


def nearest(name: str, weight: Tensor, coding: Coding) -> Rounded:
    """Round-to-nearest: each number of a weight (O, I) on its own."""
    numbers = grouped(weight, coding.group)
    scheme = coding.scheme(numbers)
    return Rounded(scheme.codes(numbers), scheme)


def quantize(
    model: LanguageModel,
    bits: int | str | Mapping[str, int | str] = 8,
    *,
    group: int | str = "row",
    mapping: GridMapping = affine,
    limits: Limits = extremes,
    rounding: Rounding = nearest,
    head: int | str | Coding | None = 8,
) -> LanguageModel:
    """A new model whose weights are stored in `bits` (2 to 8), or in a format such as "nf4".

    `bits` may also say it layer by layer, by name: {"blocks.0.mlp.up": 4, ...}; layers left out
    stay as they are. `rounding` chooses the codes: `nearest`, or one that saw calibration data.
    `head` is for embedding and head, rounded to nearest: bits or a format, with a scale a row, or a
    whole `Coding`; None leaves them alone.
    Raises ValueError for bits, groups and formats that cannot be, weights that are not finite, and
    a model that is quantized already; the model given stays as it was.
    """
    require_plain(model)
    plan = codings(model, bits, group=group, mapping=mapping, limits=limits, head=head)
    new = copied(model, sharing=plan)
    for name, coding in plan.items():
        if name not in ("embedding", "head"):
            new.set_submodule(name, quantized_layer(model, name, coding, rounding))
    if head is not None:
        _replace_ends(new, plan["embedding"])
    return new.requires_grad_(False)


def codings(
    model: LanguageModel,
    bits: int | str | Mapping[str, int | str] = 8,
    *,
    group: int | str = "row",
    mapping: GridMapping = affine,
    limits: Limits = extremes,
    head: int | str | Coding | None = 8,
) -> dict[str, Coding]:
    """How `quantize`, given the same options, stores each weight it replaces, by layer name."""
    default = Coding(
        bits=8 if isinstance(bits, Mapping) else bits, group=group, mapping=mapping, limits=limits
    )
    layers = chosen(model, linears)
    named = bits if isinstance(bits, Mapping) else dict.fromkeys(layers, bits)
    for name in named:
        require(name in layers, f"{name!r} is no linear layer of a block; print the model to see")
    found = {name: replace(default, bits=own) for name, own in named.items()}
    if head is not None:
        own = isinstance(head, Coding)
        ends = head if own else replace(default, bits=head, group="row")
        found |= {"embedding": ends, "head": ends}
    require(len(found) > 0, "no layer is named, and head is None: nothing would be quantized")
    return found


def quantized_layer(
    model: LanguageModel, name: str, coding: Coding, rounding: Rounding = nearest
) -> QuantizedLinear:
    """What `quantize` puts in place of one linear layer; the model is left alone."""
    return QuantizedLinear(_matrix(name, model.get_submodule(name).weight, coding, rounding))


def require_plain(model: nn.Module) -> None:
    """Raise ValueError unless the model's layers still hold plain floating-point weights."""
    found = [name for name, module in model.named_modules() if isinstance(module, QuantizedMatrix)]
    first = (found or [""])[0].removesuffix(".matrix")
    require(not found, f"{first} is quantized already; start from the original model")


@torch.no_grad()
def _matrix(name: str, weight: Tensor, coding: Coding, rounding: Rounding) -> QuantizedMatrix:
    require(weight.is_floating_point(), f"{name} has {weight.dtype} weights; floats are expected")
    try:
        found = rounding(name, weight.float(), coding)
        return QuantizedMatrix(found.codes, found.scheme, weight.shape[1], found.columns)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _replace_ends(model: LanguageModel, coding: Coding) -> None:
    """Embedding and head; if they are tied, both read from one matrix."""
    tied = model.head.weight is model.embedding.weight
    matrix = _matrix("embedding", model.embedding.weight, coding, nearest)
    head = matrix if tied else _matrix("head", model.head.weight, coding, nearest)
    model.embedding = QuantizedEmbedding(matrix, model.embedding.weight.dtype)
    model.head = QuantizedLinear(head)

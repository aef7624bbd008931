"""Adding up with few digits: the sum is rounded after every addition.

A sum grows while its terms do not. Once half of its spacing exceeds the next term, it stands still:
in BF16, 1 + 1 + 1 + ... ends at 256. How far a sum can be off depends on how many additions a term
passes through, each of which is off by a factor of at most 1 + u, where u is half the spacing at 1:

    sequential  ((a + b) + c) + d ...            n - 1
    chunked     sums of c terms, then theirs     (c - 1) + (n / c - 1)
    pairwise    (a + b) + (c + d) ...            log2 n, rounded up
    kahan       sequential, and what each addition has lost is given to the next

So with k additions the error is at most ((1 + u)^k - 1) sum |x|, about k u sum |x|.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from companion.checks import next_multiple, require, require_finite, require_known, require_whole
from companion.losses import next_token_loss
from companion.precision.formats import Format, format_of
from companion.precision.rounding import rounded

ORDERS = ("sequential", "chunked", "pairwise", "kahan")


def half_spacing(format: Format | str) -> float:
    """u: half the spacing at 1, the largest relative error of one rounding."""
    return 2.0 ** -(format_of(format).fraction_bits + 1)


def summed(
    terms: Tensor, format: Format | str = "BF16", *, order: str = "sequential", chunk: int = 32
) -> Tensor:
    """The sum over the last axis of FP32 terms (..., n), rounded to a format at each addition.

    Terms are rounded first. Gives (...) in FP32. Raises ValueError for an unknown order or format,
    terms in another type, none, or not finite.
    """
    _check(terms, order, chunk)
    found = format_of(format)
    terms = rounded(terms, found)
    if order == "chunked":
        return _added(_added(_chunks(terms, chunk), found), found)
    return {"sequential": _added, "pairwise": _paired, "kahan": _corrected}[order](terms, found)


def running(terms: Tensor, format: Format | str = "BF16") -> Tensor:
    """The sequential sums of the first 1, 2, ... n terms: (..., n) like the terms."""
    _check(terms, "sequential", 1)
    found = format_of(format)
    terms = rounded(terms, found)
    sums = [terms[..., 0]]
    for term in terms[..., 1:].unbind(-1):
        sums.append(rounded(sums[-1] + term, found))
    return torch.stack(sums, -1)


def additions(terms: int, order: str = "sequential", *, chunk: int = 32) -> int:
    """The most additions that one of so many terms passes through."""
    require_whole("terms", terms)
    require_known("order", order, ORDERS[:3])
    if order == "pairwise":
        return math.ceil(math.log2(terms))
    if order == "chunked":
        return min(chunk, terms) - 1 + math.ceil(terms / chunk) - 1
    return terms - 1


def error_bound(
    terms: Tensor, format: Format | str = "BF16", *, order: str = "sequential", chunk: int = 32
) -> Tensor:
    """The most that `summed` can be off for terms (..., n) that the format holds: (...), FP64.

    ((1 + u)^k - 1) sum |x| with k `additions`, as long as no sum exceeds the format's range.
    """
    k = additions(terms.shape[-1], order, chunk=chunk)
    growth = math.expm1(k * math.log1p(half_spacing(format)))  # (1 + u)^k - 1
    return growth * terms.double().abs().sum(-1)


def dot(
    a: Tensor,
    b: Tensor,
    *,
    operands: str = "FP32",
    products: str = "FP32",
    accumulator: str = "FP32",
    result: str = "FP32",
    order: str = "sequential",
) -> Tensor:
    """The sum of a b over the last axis, FP32 (..., n) that broadcast, with a format at each stage.

    Operands are rounded, then their products, the running sum, and the result: (...).
    """
    both = rounded(a, operands) * rounded(b, operands)
    return rounded(summed(rounded(both, products), accumulator, order=order), result)


def stage_errors(a: Tensor, b: Tensor, format: str) -> dict[str, float]:
    """Which stage of `dot` costs what: the error if that one alone is in `format`, and if all are.

    a, b: FP32 (..., n) that broadcast. Errors are relative, against FP64: the norm of what is off
    over the norm of the results.
    """
    exact = (a.double() * b.double()).sum(-1)
    stages = ("operands", "products", "accumulator", "result")
    cases = {stage: {stage: format} for stage in stages} | {"all": dict.fromkeys(stages, format)}
    return {name: relative_error(dot(a, b, **formats), exact) for name, formats in cases.items()}


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The norm of found - exact over the norm of exact, in FP64."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def accumulated_gradient(
    model: nn.Module, batches: Sequence[Tensor], format: Format | str | None = None
) -> Tensor:
    """The mean gradient over microbatches (B, T): all parameters in a line, FP32, or FP64 for None.

    The model computes in its own type. Each gradient is rounded to the format, and the sum after
    every addition; None adds in FP64. The gradients that the model holds are left alone.
    """
    require(len(batches) > 0, "batches is empty; give at least one")

    def kept(line: Tensor) -> Tensor:
        return line.double() if format is None else rounded(line.float(), format)

    parameters, total = list(model.parameters()), None
    for batch in batches:
        slopes = torch.autograd.grad(next_token_loss(model(batch), batch), parameters)
        line = kept(torch.cat([slope.flatten() for slope in slopes]))
        total = line if total is None else kept(total + line)
    return total / len(batches)


def _added(terms: Tensor, format: Format) -> Tensor:
    """One term after the other."""
    total = terms[..., 0]
    for term in terms[..., 1:].unbind(-1):
        total = rounded(total + term, format)
    return total


def _paired(terms: Tensor, format: Format) -> Tensor:
    """Neighbours, then the sums of neighbours, until one is left; an odd one out waits."""
    while terms.shape[-1] > 1:
        even = terms.shape[-1] // 2 * 2
        sums = rounded(terms[..., :even:2] + terms[..., 1:even:2], format)
        terms = torch.cat([sums, terms[..., even:]], -1)
    return terms[..., 0]


def _corrected(terms: Tensor, format: Format) -> Tensor:
    """Kahan's: what the sum gained, less what it should have, is taken from the next term."""
    total, excess = terms[..., 0], torch.zeros_like(terms[..., 0])
    for term in terms[..., 1:].unbind(-1):
        term = rounded(term - excess, format)
        new = rounded(total + term, format)
        excess = rounded(rounded(new - total, format) - term, format)
        total = new
    return total


def _chunks(terms: Tensor, chunk: int) -> Tensor:
    """Terms (..., n) as (..., chunks, chunk), the last one filled with zeros."""
    count = terms.shape[-1]
    return pad(terms, (0, next_multiple(count, chunk) - count)).unflatten(-1, (-1, chunk))


def _check(terms: Tensor, order: str, chunk: int) -> None:
    require_known("order", order, ORDERS)
    require_whole("chunk", chunk)
    shape = tuple(terms.shape)
    require(terms.ndim > 0 and shape[-1] > 0, f"terms have shape {shape}; at least one is needed")
    require_finite(terms, "terms")

"""Quantization: weights, activations and caches in fewer bits.

`quantize(model, bits=8)` is the verb; the modules are the pieces it is made of, from `grids` (one
scale and what it does to a number) up to `replacing` (a whole model).
"""

from companion.quantization.grids import (
    affine,
    extremes,
    least_squares,
    minimum,
    percentile,
    symmetric,
)
from companion.quantization.replacing import nearest, quantize

__all__ = [
    "affine",
    "extremes",
    "least_squares",
    "minimum",
    "nearest",
    "percentile",
    "quantize",
    "symmetric",
]

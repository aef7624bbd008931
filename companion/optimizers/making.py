"""Nine optimizers by name, alike in what can be alike: a rate, a decay, and what decays.

The averages of all relatives of Adam remember about 10 gradients and 20 squares, so that they
differ only in what their names say. Matrices decay, vectors do not; with Muon only the matrices
inside the blocks do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from companion.checks import require, require_known, require_number
from companion.optimizers.lamb import Lamb
from companion.optimizers.lion import Lion
from companion.optimizers.muon import Muon
from companion.optimizers.options import matrices_and_vectors, require_decay

BETAS = (0.9, 0.95)  # shorter memories than the papers': they suit runs of some hundred steps
VARIANTS = {"loop": (False, False), "foreach": (True, False), "fused": (False, True)}


@dataclass(frozen=True)
class Kind:
    """How an optimizer is made: its class, its options, its customary decay and its variants."""

    make: Callable[..., Optimizer]
    options: dict
    decay: float = 0.0  # 0 where a decay would be added to the gradient, and so divided with it
    variants: tuple[str, ...] = ("loop",)


FAST = tuple(VARIANTS)
OPTIMIZERS = {
    "SGD": Kind(torch.optim.SGD, {}, variants=FAST),
    "momentum": Kind(torch.optim.SGD, {"momentum": 0.9}, variants=FAST),
    "Adagrad": Kind(torch.optim.Adagrad, {}, variants=FAST),
    "RMSProp": Kind(torch.optim.RMSprop, {"alpha": BETAS[1]}, variants=("loop", "foreach")),
    "Adam": Kind(torch.optim.Adam, {"betas": BETAS}, variants=FAST),
    "AdamW": Kind(torch.optim.AdamW, {"betas": BETAS}, 0.1, FAST),
    "LAMB": Kind(Lamb, {"betas": BETAS}, 0.1),
    "Lion": Kind(Lion, {}, 0.1),
    "Muon": Kind(Muon, {}, 0.1),
}


def make_optimizer(
    name: str,
    model: nn.Module,
    rate: float,
    *,
    decay: float | None = None,
    variant: str | None = None,
) -> Optimizer:
    """The optimizer of this name for a model's parameters.

    `decay` of None is 0.1 where it shrinks the weights by themselves (AdamW, LAMB, Lion, Muon) and
    0 where torch adds it to the gradient. `variant` chooses how torch carries out the same update:
    tensor by tensor ("loop"), many tensors in one call ("foreach"), one kernel ("fused"); None
    leaves it to torch. Raises ValueError for unknown names, a rate of 0 or less, a negative decay.
    """
    require_known("optimizer", name, OPTIMIZERS)
    require_number("rate", rate, above=0)
    kind = OPTIMIZERS[name]
    decay = kind.decay if decay is None else decay
    require_decay(decay)
    options = kind.options | _variant(name, variant)
    if kind.make is Muon:  # it sorts the parameters itself
        return Muon(model, rate, decay=decay)
    own = kind.make in (Lamb, Lion)
    decays, rates = ("decay", {"rate": rate}) if own else ("weight_decay", {"lr": rate})
    return kind.make(matrices_and_vectors(model, decay, name=decays), **rates, **options)


def variants_of(name: str) -> tuple[str, ...]:
    """The variants that an optimizer has. Raises ValueError for an unknown one."""
    require_known("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name].variants


def _variant(name: str, variant: str | None) -> dict[str, bool]:
    if variant is None:
        return {}
    require_known("variant", variant, VARIANTS)
    there = variants_of(name)
    require(variant in there, f"{name} has no variant {variant!r}; it has: {', '.join(there)}")
    foreach, fused = VARIANTS[variant]
    flags = {"foreach": foreach} if len(there) > 1 else {}
    return flags | ({"fused": fused} if "fused" in there else {})

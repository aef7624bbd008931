"""What optimizers have in common: their settings, refused without a meaning, and what decays."""

from __future__ import annotations

from torch import nn

from companion.checks import require, require_number


def settings(
    rate: float, betas: tuple[float, float], decay: float, *, epsilon: float | None = None
) -> dict:
    """Rate, memories of two averages, decay, and epsilon, by their names in a parameter group.

    Raises ValueError for a rate or epsilon of 0 or less, betas outside 0 to 1, a negative decay.
    """
    require_number("rate", rate, above=0)
    if epsilon is not None:
        require_number("epsilon", epsilon, above=0)
    good = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    require(good, f"betas are {betas!r}; two numbers from 0 to below 1 are expected")
    require_decay(decay)
    found = {"lr": rate, "betas": tuple(betas), "decay": decay}
    return found if epsilon is None else found | {"epsilon": epsilon}


def require_decay(decay: float) -> None:
    """A decay must be a finite number of at least 0."""
    if decay != 0:
        require_number("decay", decay, above=0)


def matrices_and_vectors(model: nn.Module, decay: float, *, name: str = "decay") -> list[dict]:
    """Groups of matrices, which decay, and vectors, which do not; none that would be empty.

    `name` is what the optimizer calls its decay.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, name: decay}, {"params": vectors, name: 0.0}]
    return [group for group in groups if group["params"]]

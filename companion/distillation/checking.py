"""What every way of distilling asks of its models before it touches one."""

from __future__ import annotations

import math

from torch import nn

from companion.checks import require, require_finite


def require_finite_weights(name: str, model: nn.Module) -> None:
    """Raise ValueError, naming the tensor, unless all weights of the model are finite."""
    for place, tensor in model.state_dict().items():
        require_finite(tensor, f"numbers of the {name}'s {place}")


def require_same_vocab(teacher: nn.Module, student: nn.Module) -> None:
    """Raise ValueError, naming both sizes, unless both models know as many tokens."""
    theirs, ours = teacher.config.vocab, student.config.vocab
    sizes = f"the teacher has a vocab of {theirs}, the student of {ours}"
    require(theirs == ours, f"{sizes}; give both the same tokenizer")


def require_share(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a number from 0 to 1."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    good = number and math.isfinite(value) and 0 <= value <= 1
    require(good, f"{name} is {value!r}; it must lie between 0 and 1")

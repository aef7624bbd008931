"""Dropout: in training, some numbers are set to 0 by chance, so that none can be relied on alone.

Each number is left out with chance p and otherwise divided by 1 - p, so that its mean stays what it
was; a model that is judged drops nothing. Here it falls on what each half of a block adds to the
stream, and on the embedding.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import dropout

from companion.checks import require
from companion.model import LanguageModel
from companion.surgery import copied


class _Drop:
    """A forward hook: drops from a module's output while the module is in training."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return dropout(output, self.share, module.training)


def with_dropout(model: LanguageModel, share: float) -> LanguageModel:
    """A copy that drops this share in training; weights and names are those of `model`.

    What is dropped follows torch's random numbers. Raises ValueError unless 0 <= share < 1.
    """
    number = isinstance(share, (int, float)) and not isinstance(share, bool)
    require(number and 0 <= share < 1, f"share is {share!r}; it must be at least 0 and below 1")
    model = copied(model)
    halves = [half for block in model.blocks for half in (block.attention, block.mlp)]
    for module in (model.embedding, *halves):
        module.register_forward_hook(_Drop(share))
    return model

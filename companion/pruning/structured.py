"""The technique: a model in, a new model with fewer neurons, heads or layers out.

Zeros in a matrix are multiplied like all other numbers. To be faster the matrix must be smaller,
and so what goes are whole rows and columns, whose removal leaves ordinary matrices. The same choice
made with zeros in the old shape (`masked_twin`) gives the same logits: nothing else was changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from companion.calibration import Inputs
from companion.checks import require, require_known
from companion.data import Passage
from companion.model import LanguageModel
from companion.pruning.heads import masked_heads, without_heads
from companion.pruning.layers import masked_layers, without_layers
from companion.pruning.neurons import masked_neurons, without_neurons
from companion.quality import judge
from companion.surgery import copied

Makers = Mapping[str, Callable[..., LanguageModel]]  # by kind, in the order of the work
SMALLER = {"neurons": without_neurons, "heads": without_heads, "layers": without_layers}
MASKED = {"neurons": masked_neurons, "heads": masked_heads, "layers": masked_layers}


def shrink(
    model: LanguageModel,
    *,
    neurons: float = 0.0,
    heads: int | float = 0,
    layers: int | float | Sequence[int] = 0,
    by: Tensor | Mapping[str, Tensor] | None = None,
    refit: Mapping[str, Inputs] | None = None,
) -> LanguageModel:
    """A new model, really smaller, whose config tells its new shape.

    `neurons` is the share of each MLP's neurons to remove; `heads` the number (int) or share
    (float) of each attention's key-value heads, with the query heads that read them; `layers` a
    number or share of the blocks, or their indices. The lowest scores go: `by` holds them,
    (L, neurons), (L, key-value heads) or (L,), for the kind that is removed, or by kind:
    {"neurons": ..., "heads": ...}. Indices of layers need none. `refit`, the inputs that
    `companion.calibration.observe` saw, fits the down and out projections anew.
    Raises ValueError for what cannot be; the model given stays as it was.
    """
    amounts = {"neurons": neurons, "heads": heads, "layers": layers}
    return _applied(SMALLER, model, amounts, by, refit)


def masked_twin(
    model: LanguageModel,
    *,
    neurons: float | Sequence[float] = 0.0,
    heads: int | float = 0,
    layers: int | float | Sequence[int] = 0,
    by: Tensor | Mapping[str, Tensor] | None = None,
    refit: Mapping[str, Inputs] | None = None,
) -> LanguageModel:
    """The choice of `shrink`, same options, as zeros in the old shape: equal logits, no byte won.

    Here `neurons` may be one share for each block. Raises ValueError as `shrink` does.
    """
    amounts = {"neurons": neurons, "heads": heads, "layers": layers}
    return _applied(MASKED, model, amounts, by, refit)


def block_losses(
    model: LanguageModel, text: Passage, shares: Sequence[float], scores: Tensor
) -> dict[float, list[float]]:
    """Nats per token more if a share of one block's neurons goes: {share: one number a block}.

    All other blocks stay whole; the neurons with the lowest scores (L, neurons) go. The text is
    read once for each share and block.
    """
    blocks = range(model.config.layers)
    whole = judge(text, {"": model})[""].nats_per_token().estimate

    def lost(share: float, block: int) -> float:
        each = [share if block == other else 0.0 for other in blocks]
        twin = masked_twin(model, neurons=each, by=scores)
        return judge(text, {"": twin})[""].nats_per_token().estimate - whole

    return {share: [lost(share, block) for block in blocks] for share in shares}


def _applied(
    makers: Makers,
    model: LanguageModel,
    amounts: Mapping[str, object],
    by: Tensor | Mapping[str, Tensor] | None,
    refit: Mapping[str, Inputs] | None,
) -> LanguageModel:
    """One kind after the other; layers last, so that names and scores are those of `model`."""
    wanted = {kind: amount for kind, amount in amounts.items() if amount not in (0, (), [])}
    if not wanted:
        return copied(model).eval()
    scores, new = _scores(wanted, by), model
    for kind, amount in wanted.items():
        options = {} if kind == "layers" else {"refit": refit}
        new = makers[kind](new, amount, scores.get(kind), **options)
    return new


def _scores(
    wanted: Mapping[str, object], by: Tensor | Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Scores by kind. ValueError if one tensor is to serve several kinds, or a kind has none."""
    judged = [k for k, amount in wanted.items() if k != "layers" or isinstance(amount, int | float)]
    if isinstance(by, Tensor):
        one = f"one tensor of scores is given, for {' and '.join(judged) or 'nothing'}"
        require(len(judged) == 1, f'{one}; give them by kind, as in {{"neurons": ...}}')
        by = {judged[0]: by}
    scores = dict(by or {})
    for kind in scores:
        require_known("kind", kind, SMALLER)
    missing = [kind for kind in judged if kind not in scores]
    require(not missing, f"which {missing[:1]} should go? give scores of them, by=...")
    return scores

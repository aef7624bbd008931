"""Other losses for the next token: what they change, and what they cost.

A model's logits z become chances p = softmax(z), and cross-entropy is the surprise -log p_y at the
token y that came. Three things are done to it, and one is put in its place that should not be:

    label smoothing   (1 - e) (-log p_y) + e mean_v (-log p_v)    no certainty is asked for
    z-loss            + w (log sum_v exp z_v)^2                   keeps logits near a scale
    chunks            the same numbers, never with all logits in memory
    Huber             sum_v h(p_v - [v = y])                      a loss for regression

With an error of at most 1, Huber's loss with a threshold of 1 is half the squared error: its linear
part is out of reach. Its gradient at the logits has the factor p_y where cross-entropy has none, so
the more wrong a model is, the less it learns.

Axes: B batch, T positions, V vocabulary. Losses are in nats at each next token, (B, T - 1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, huber_loss, one_hot
from torch.utils.checkpoint import checkpoint

from companion import cost
from companion.checks import require, require_number, require_whole
from companion.model import LanguageModel, ModelConfig


def adjusted_losses(
    logits: Tensor, tokens: Tensor, *, smoothing: float = 0.0, z_weight: float = 0.0
) -> Tensor:
    """Cross-entropy with label smoothing and a z-loss, (B, T - 1), from logits (B, T, V).

    `smoothing` is the share e of each label that is spread over all V tokens (Szegedy et al.,
    arXiv:1512.00567), and `z_weight` the factor of log(Z)^2.
    Raises ValueError for shapes that do not match, a share outside [0, 1), a negative weight.
    """
    _check(logits.shape[:-1], tokens, smoothing, z_weight)
    return _scored(logits[:, :-1], tokens[:, 1:], smoothing, z_weight)


def z_losses(logits: Tensor) -> Tensor:
    """log(Z)^2 at each position, (..., T) from logits (..., T, V); Z = sum exp logits."""
    return torch.logsumexp(_wide(logits), -1).square()


def chunked_losses(
    model: LanguageModel,
    tokens: Tensor,
    *,
    positions: int,
    smoothing: float = 0.0,
    z_weight: float = 0.0,
) -> Tensor:
    """`adjusted_losses(model(tokens), tokens)` with the logits of `positions` positions at a time.

    The backward pass works each chunk's logits out again: 2 B (T - 1) W V more FLOPs, and
    4 B (T - 1) V bytes less kept (`saved_bytes`). Raises ValueError as `adjusted_losses` does, and
    for fewer than one position.
    """
    _check(tokens.shape, tokens, smoothing, z_weight)
    require_whole("positions", positions)
    head, model.head = model.head, torch.nn.Identity()
    try:
        hidden = model(tokens)  # (B, T, W), normed: what the head reads
    finally:
        model.head = head

    def of_chunk(states: Tensor, targets: Tensor) -> Tensor:
        return _scored(head(states), targets, smoothing, z_weight)

    before = range(0, tokens.shape[1] - 1, positions)
    ends = [min(start + positions, tokens.shape[1] - 1) for start in before]
    chunks = [
        checkpoint(of_chunk, hidden[:, a:b], tokens[:, a + 1 : b + 1], use_reentrant=False)
        for a, b in zip(before, ends, strict=True)
    ]
    return torch.cat(chunks, 1)


def huber_losses(logits: Tensor, tokens: Tensor, *, threshold: float = 1.0) -> Tensor:
    """Huber's loss between chances and the one-hot label, summed over V: (B, T - 1). Not in nats.

    h(e) = e^2 / 2 up to the threshold d, then d (|e| - d / 2), as in `torch.nn.HuberLoss`; Smooth
    L1 is h / d. Raises ValueError for shapes that do not match and a threshold of 0 or less.
    """
    _check(logits.shape[:-1], tokens, 0.0, 0.0)
    require_number("threshold", threshold, above=0)
    chances = _wide(logits[:, :-1]).softmax(-1)
    labels = one_hot(tokens[:, 1:].long(), logits.shape[-1]).to(chances)
    return huber_loss(chances, labels, reduction="none", delta=threshold).sum(-1)


def saved_bytes(vocab: int, positions: int, *, batch: int = 1) -> int:
    """Bytes that chunks keep less than `next_token_loss` of FP32 logits: 4 B (T - 1) V.

    Also gone are the copies of the targets (8 bytes each; views where B = 1 or T = 2) and torch's
    one sum of weights. Added are none: the hidden states are kept for the head anyway.
    """
    for name, value in (("vocab", vocab), ("positions", positions), ("batch", batch)):
        require_whole(name, value)
    predictions = batch * (positions - 1)
    targets = 8 * predictions if batch > 1 and positions > 2 else 0
    return 4 * (predictions * vocab + 1) + targets


def chunked_peak_bytes(
    config: ModelConfig, positions: int, *, batch: int = 1, chunk: int | None = None
) -> int:
    """Most bytes alive in a step's forward and backward pass, weights and states left out, in FP32.

    What is kept, and at the last chunk of `chunk` positions the larger of two: three copies of its
    logits (themselves or a gradient, their logarithm of softmax, its gradient) beside the head's
    gradient so far; or that gradient, the chunk's own, and their sum. `chunk` None is the plain
    loss. To within 2 % on a CPU where logits outweigh a block's activations.
    """
    kept = cost.activation_bytes(config, positions, batch=batch)
    logits, head = 4 * batch * config.vocab, 4 * config.vocab * config.width  # of one position
    if chunk is None:
        return kept + 2 * logits * positions
    require_whole("chunk", chunk)
    kept -= saved_bytes(config.vocab, positions, batch=batch)
    if chunk >= positions - 1:
        return kept + 3 * logits * (positions - 1)
    return kept + max(3 * logits * chunk + head, 3 * head)


def _scored(logits: Tensor, targets: Tensor, smoothing: float, z_weight: float) -> Tensor:
    """Losses (B, T) of targets (B, T) under logits (B, T, V)."""
    flat = _wide(logits).flatten(0, 1)
    wanted = {"reduction": "none", "label_smoothing": smoothing}
    losses = cross_entropy(flat, targets.flatten().long(), **wanted)
    if z_weight:
        losses = losses + z_weight * z_losses(flat)
    return losses.view(targets.shape)


def _wide(logits: Tensor) -> Tensor:
    """16-bit logits in FP32; the sums of a softmax need more digits than they have."""
    return logits.float() if logits.element_size() < 4 else logits


def _check(places: torch.Size, tokens: Tensor, smoothing: float, z_weight: float) -> None:
    shapes = f"predictions at {tuple(places)} and tokens {tuple(tokens.shape)}"
    require(tuple(places) == tuple(tokens.shape) and tokens.ndim == 2, f"{shapes} must be (B, T)")
    require(tokens.shape[1] >= 2, f"{tokens.shape[1]} position(s) predict nothing; give 2 or more")
    require(0 <= smoothing < 1, f"smoothing is {smoothing}; a share from 0 to below 1 is needed")
    require(z_weight >= 0, f"z_weight is {z_weight}; it must be 0 or more")

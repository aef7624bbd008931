"""Closed forms: what a model costs, worked out from its shape alone, before it exists.

Symbols in the formulas: V vocab, L layers, W width, M hidden, D head width, K key-value heads,
H query heads, B batch, T new positions, P positions already in the cache, b bytes per number.
Each form is exact; its docstring says what is counted and what is left out.
`companion.roofline` turns these counts into seconds.
"""

from __future__ import annotations

import math

from companion.checks import require, require_known, require_number, require_whole
from companion.model import ModelConfig

# Numbers torch.optim keeps for each parameter; it also counts steps in one FP32 scalar a tensor.
OPTIMIZERS = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}
ATTENTIONS = ("flash", "math")  # the two ways torch computes attention on a CPU


def matrix_parameters(config: ModelConfig) -> int:
    """Weights that every position is multiplied by: L (2 W H D + 2 W K D + 3 W M) + W V.

    H D is W unless heads were taken away. The output head counts, tied or not; the embedding does
    not, since looking up is no product.
    """
    attention = 2 * config.width * (config.heads + config.kv_heads) * config.head_width
    mlp = 3 * config.width * config.hidden
    return config.layers * (attention + mlp) + config.width * config.vocab


def parameters(config: ModelConfig) -> int:
    """Different numbers to learn: the matrices, 2 L + 1 norms of W, and an untied embedding W V."""
    norms = (2 * config.layers + 1) * config.width
    embedding = 0 if config.tied else config.width * config.vocab
    return matrix_parameters(config) + norms + embedding


def weight_bytes(config: ModelConfig, bytes_per_number: float = 4) -> int:
    """Bytes of the weights, `parameters` x b; a tied head is stored once. b = 0.5 is 4 bits."""
    return _bytes(parameters(config), bytes_per_number)


def gradient_bytes(config: ModelConfig, bytes_per_number: float = 4) -> int:
    """Bytes of the gradients after a backward pass: one number a parameter, as many as weights."""
    return _bytes(parameters(config), bytes_per_number)


def optimizer_bytes(
    config: ModelConfig, optimizer: str = "adamw", bytes_per_number: float = 4
) -> int:
    """Bytes of the running averages: 0 (sgd), 1 (momentum) or 2 (adam, adamw) x `parameters` x b.

    Left out: Adam's step counters, 4 bytes for each of the 9 L + 2 tensors (+ 1 if untied).
    Raises ValueError for other optimizers.
    """
    require_known("optimizer", optimizer, OPTIMIZERS)
    return OPTIMIZERS[optimizer] * _bytes(parameters(config), bytes_per_number)


def cache_bytes(
    config: ModelConfig, positions: int, *, batch: int = 1, bytes_per_number: float = 4
) -> int:
    """Bytes of the keys and values of `positions` positions: 2 L K D x positions x B x b.

    Raises ValueError for fewer than one position or more than the context.
    """
    _check(config, positions, batch)
    each = 2 * config.layers * config.kv_heads * config.head_width
    return _bytes(each * positions * batch, bytes_per_number)


def activation_bytes(
    config: ModelConfig,
    positions: int,
    *,
    batch: int = 1,
    bytes_per_number: int = 4,
    attention: str = "flash",
) -> int:
    """Bytes autograd keeps from `next_token_loss(model(tokens), tokens)` for the backward pass.

    For each position, in numbers of the model's type (n) or always FP32 (f):
      each of 2 L + 1 norms  (2 W + 1) f + W n  input, 1 / rms and scaled input; product
      each block             (H D + 4 M) n      input of `out`; gate, silu(gate), up, their product
      flash attention        (H D + 2 K D) n + H f  query, key and value; log of the softmax's sum
      math attention         (3 H D + H T) n        the same, keys repeated; a row of T x T shares
      loss                   V f for each of the T - 1 predictions, and one number a batch
      token ids              8 bytes each; targets again, where they are no view of the tokens

    Counted as distinct storages, without parameters and buffers. Exact on a CPU: in FP32 for both
    kinds of attention, in BF16 (`bytes_per_number` 2, BF16 weights) for flash. What the backward
    pass needs while it runs comes on top. Raises ValueError for impossible shapes and names.
    """
    _check(config, positions, batch, least=2)
    require_known("attention", attention, ATTENTIONS)
    require_known("bytes_per_number", bytes_per_number, (4, 2) if attention == "flash" else (4,))
    width, kv_width = config.width, config.kv_heads * config.head_width
    heads_width = config.heads * config.head_width
    norms = 2 * config.layers + 1  # below: numbers of the model's type
    own = norms * width + config.layers * (heads_width + 4 * config.hidden)
    fp32 = norms * (2 * width + 1)
    if attention == "flash":
        own += config.layers * (heads_width + 2 * kv_width)
        fp32 += config.layers * config.heads
    else:
        own += config.layers * (3 * heads_width + config.heads * positions)
    rows, predictions = batch * positions, batch * (positions - 1)
    targets = 8 * predictions if batch > 1 and positions > 2 else 0  # otherwise a view of the ids
    loss = 4 * (predictions * config.vocab + 1) + 8 * rows + targets
    return rows * (own * bytes_per_number + 4 * fp32) + loss


def attention_flops(config: ModelConfig, positions: int, *, batch: int = 1, past: int = 0) -> int:
    """FLOPs of scores and mixing, every new position against all: L x 4 B T (P + T) H D.

    This is what the plain T x T product costs, and what torch's counter counts.
    """
    _check(config, positions, batch, past)
    pairs = positions * (past + positions)
    return config.layers * 4 * batch * pairs * config.heads * config.head_width


def causal_attention_flops(
    config: ModelConfig, positions: int, *, batch: int = 1, past: int = 0
) -> int:
    """The part of `attention_flops` that causality needs: L x 4 B (T P + T (T + 1) / 2) H D."""
    _check(config, positions, batch, past)
    pairs = positions * past + positions * (positions + 1) // 2
    return config.layers * 4 * batch * pairs * config.heads * config.head_width


def forward_flops(config: ModelConfig, positions: int, *, batch: int = 1, past: int = 0) -> int:
    """FLOPs of `model(tokens)`: 2 B T x `matrix_parameters` + `attention_flops`.

    A multiplication with its addition is 2. Only matrix products count (not norms, rotary angles,
    softmax, SiLU), as in `torch.utils.flop_counter`, which agrees exactly under
    `sdpa_kernel(SDPBackend.MATH)` and skips attention on a CPU otherwise.
    """
    attention = attention_flops(config, positions, batch=batch, past=past)
    return attention + 2 * batch * positions * matrix_parameters(config)


def training_flops(config: ModelConfig, positions: int, *, batch: int = 1) -> int:
    """FLOPs of a forward and a backward pass: 3 x `forward_flops`.

    Each product y = x w needs two of the same size going back, one for x and one for w. That holds
    in the first block too: its input is the embedding, which is learned. The optimizer is left out.
    """
    _check(config, positions, batch, least=2)
    return 3 * forward_flops(config, positions, batch=batch)


def rule_of_six(config: ModelConfig, tokens: int) -> int:
    """The usual shortcut for training FLOPs, 6 x `parameters` x tokens. Kaplan, arXiv:2001.08361.

    It leaves out attention (12 L T W a token) and takes norms and an untied embedding for matrices.
    """
    require_whole("tokens", tokens)
    return 6 * parameters(config) * tokens


def decode_flops(config: ModelConfig, past: int, *, batch: int = 1) -> int:
    """FLOPs of one more token for each of `batch` sequences, `past` positions in the cache."""
    return forward_flops(config, 1, batch=batch, past=past)


def _bytes(numbers: int, bytes_per_number: float) -> int:
    require_number("bytes_per_number", bytes_per_number, above=0)
    return math.ceil(numbers * bytes_per_number)


def _check(config: ModelConfig, positions: int, batch: int, past: int = 0, least: int = 1) -> None:
    require_whole("positions", positions, least)
    require_whole("batch", batch)
    require_whole("past", past, least=0)
    total = past + positions
    require(total <= config.context, f"{total} positions exceed the context of {config.context}")

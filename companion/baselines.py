"""What came before attention: counting n-grams, and a recurrent network.

Both speak like every model of the course, `model(tokens) -> logits`, so they are judged and sampled
by the same functions.

Axes: B batch, T positions, V vocabulary, N different n-grams of one order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from companion.checks import require, require_whole
from companion.decoding import choose

UNSEEN = 1e-9  # least probability of a token, so that its logarithm stays finite


class NGram(nn.Module):
    """Counts of the `order - 1` tokens before, smoothed by interpolated absolute discounting.

    Each count gives up `discount`; what is saved goes to the model of one token less, down to equal
    chances for all. (Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques", 2.7.)
    """

    def __init__(self, text: Tensor, *, order: int, vocab: int, discount: float = 0.75) -> None:
        """Count a line of token ids (tokens,). ValueError if `vocab ** order` exceeds 63 bits."""
        super().__init__()
        require_whole("order", order)
        require_whole("vocab", vocab)
        require(vocab**order < 2**63, f"{vocab} ** {order} n-grams cannot be numbered in 63 bits")
        require(0 < discount < 1, f"discount is {discount}; it must lie between 0 and 1")
        require(text.ndim == 1 and len(text) >= order, f"{len(text)} tokens hold no {order}-gram")
        self.order, self.vocab, self.discount = order, vocab, discount
        for size in range(1, order + 1):
            grams, counts = _numbers(text, size, vocab).unique(return_counts=True)
            self.register_buffer(f"grams_{size}", grams)  # (N,) sorted, the last token counts least
            self.register_buffer(f"counts_{size}", counts)

    @torch.inference_mode()
    def forward(self, tokens: Tensor) -> Tensor:
        """Log-probabilities (B, T, V) of the token after each position of tokens (B, T)."""
        batch, positions = tokens.shape
        chances = torch.full((batch, positions, self.vocab), 1 / self.vocab, dtype=torch.float64)
        for size in range(1, min(self.order, positions + 1) + 1):
            first = max(size - 2, 0)  # the first position with a whole context of size - 1
            for row in range(batch):
                contexts = self._contexts(tokens[row], size)
                chances[row, first:] = self._smoothed(contexts, size, chances[row, first:])
        return chances.clamp_min(UNSEEN).log().float()

    def _contexts(self, tokens: Tensor, size: int) -> Tensor:
        """Numbers of the contexts of `size - 1` tokens, one for each position that has one."""
        if size == 1:
            return torch.zeros(len(tokens), dtype=torch.int64)
        return _numbers(tokens, size - 1, self.vocab)

    def _smoothed(self, contexts: Tensor, size: int, lower: Tensor) -> Tensor:
        """Mix the counts behind each context with the chances (T, V) of one token less."""
        grams, counts = getattr(self, f"grams_{size}"), getattr(self, f"counts_{size}")
        low = torch.searchsorted(grams, contexts * self.vocab)
        distinct = torch.searchsorted(grams, (contexts + 1) * self.vocab) - low
        rows = torch.arange(len(contexts)).repeat_interleave(distinct)
        ends = distinct.cumsum(0)
        entries = torch.arange(len(rows)) + (low - ends + distinct).repeat_interleave(distinct)
        found = torch.zeros_like(lower)
        found[rows, grams[entries] % self.vocab] = counts[entries].double() - self.discount
        totals = found.sum(-1, keepdim=True) + self.discount * distinct[:, None]
        mixed = (found + self.discount * distinct[:, None] * lower) / totals.clamp_min(1)
        return torch.where(totals > 0, mixed, lower)


def _numbers(tokens: Tensor, size: int, vocab: int) -> Tensor:
    """Every `size` tokens in a row as one whole number in base `vocab`: (tokens - size + 1,)."""
    numbers = torch.zeros(len(tokens) - size + 1, dtype=torch.int64)
    for offset in range(size):
        numbers = numbers * vocab + tokens[offset : len(tokens) - size + 1 + offset]
    return numbers


class Recurrent(nn.Module):
    """An LSTM that reads one token after the other and must carry all it knows in its state.

    Hochreiter and Schmidhuber 1997, "Long Short-Term Memory". The head is tied to the embedding.
    """

    def __init__(self, *, vocab: int, width: int, layers: int = 1) -> None:
        super().__init__()
        for name, value in (("vocab", vocab), ("width", width), ("layers", layers)):
            require_whole(name, value)
        self.embedding = nn.Embedding(vocab, width)
        self.recurrence = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) for token ids (B, T)."""
        require(tokens.ndim == 2, f"tokens have shape {tuple(tokens.shape)}; (B, T) is expected")
        states, _ = self.recurrence(self.embedding(tokens))
        return self.head(states)


@torch.no_grad()
def sample(
    model: nn.Module, tokens: Tensor, new: int, *, temperature: float = 1.0, seed: int = 0
) -> Tensor:
    """Continue a prompt (B, T) by `new` tokens with any model, reading the whole text each time.

    `companion.decoding.generate` does this with a cache, for the decoder alone.
    """
    require_whole("new", new)
    require(tokens.ndim == 2, f"tokens have shape {tuple(tokens.shape)}; (B, T) is expected")
    random = torch.Generator().manual_seed(seed)
    for _ in range(new):
        drawn = choose(model(tokens)[:, -1], temperature=temperature, random=random)
        tokens = torch.cat([tokens, drawn[:, None]], dim=1)
    return tokens

"""A teacher's best guesses, stored once: train any number of students without the teacher.

Of the V logits at a position only the k largest are kept, less the logarithm of the full sum: they
are then the logarithms of chances, which FP16 holds well, and what they leave out is known too. Its
size for each position, in bytes (ids take 4 beyond 32,768 tokens):

    k x (2 value + 2 id) + 2 rest + 2 token      against   V x 2 for all logits in FP16

Axes: N windows, T positions, k kept, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from companion.checks import require, require_number, require_whole
from companion.distillation.checking import require_finite_weights
from companion.distillation.divergences import log_shares
from companion.distillation.steps import scores
from companion.storage import load_tensors, save_tensors

VERSION = 1  # of what a file of stored logits says about itself
NOTHING = -1e4  # the logarithm of no chance at all; FP16 holds it, and its exponential is 0
TENSORS = ("tokens", "values", "ids", "rest")


@dataclass(frozen=True, eq=False)
class TopLogits:
    """The k best tokens at each position of some windows, as a teacher sees them."""

    tokens: Tensor  # (N, T) what the teacher read
    values: Tensor  # (N, T, k) logarithms of the chances, the best first
    ids: Tensor  # (N, T, k) the tokens that have them
    rest: Tensor  # (N, T) logarithm of the chance that the other tokens share
    vocab: int
    temperature: float

    @property
    def k(self) -> int:
        return self.values.shape[-1]

    @property
    def bytes(self) -> int:
        """Bytes of the four tensors, counted."""
        return sum(getattr(self, name).nbytes for name in TENSORS)

    def of(self, batch: Tensor) -> TopLogits:
        """What is stored for the windows (B, T) of a batch, in its order and on its device.

        Windows are found by their tokens. Raises ValueError for one that was not stored.
        """
        keys = [_key(row) for row in batch.cpu()]
        missing = [index for index, key in enumerate(keys) if key not in self._places]
        stored = f"{tuple(self.tokens.shape)} windows are stored"
        require(not missing, f"rows {missing[:3]} of the batch are not among them: {stored}")
        rows = torch.tensor([self._places[key] for key in keys])
        tensors = [getattr(self, name)[rows].to(batch.device) for name in TENSORS]
        return TopLogits(*tensors, self.vocab, self.temperature)

    @cached_property
    def _places(self) -> dict[bytes, int]:
        return {_key(row): index for index, row in enumerate(self.tokens)}


def store_top(
    teacher: nn.Module,
    windows: Tensor | Iterable[Tensor],
    k: int,
    *,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float16,
) -> TopLogits:
    """The teacher's k best guesses at every position of windows (N, T), or of batches of them.

    The chances are those at `temperature`, at which students will be asked. Raises ValueError for
    no windows, windows of several lengths, k outside 1 to vocab, and weights that are not finite.
    """
    vocab = teacher.config.vocab
    require_whole("k", k)
    require(k <= vocab, f"k is {k}; there are only {vocab} tokens to keep")
    require_number("temperature", temperature, above=0)
    require_finite_weights("teacher", teacher)
    batches = list(windows.split(1) if isinstance(windows, Tensor) else windows)
    require(len(batches) > 0, "there are 0 windows; give at least one")
    lengths = sorted({batch.shape[1] for batch in batches})
    require(len(lengths) == 1, f"windows have {lengths} tokens; they must be of one length")
    device = next(teacher.parameters()).device
    parts = [_top(scores(teacher, batch.to(device)), k, temperature) for batch in batches]
    values, ids, rest = (torch.cat(each) for each in zip(*parts, strict=True))
    small = id_type(vocab)
    tokens = torch.cat(batches).to("cpu", small)
    return TopLogits(tokens, values.to(dtype), ids.to(small), rest.to(dtype), vocab, temperature)


def _top(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Values and ids of the k best (B, T, k) and what the others share (B, T), on the CPU."""
    shares = log_shares(logits, temperature)
    values, ids = shares.topk(k, dim=-1)
    rest = shares.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return values.clamp(min=NOTHING).cpu(), ids.cpu(), rest.clamp(min=NOTHING).cpu()


def id_type(vocab: int) -> torch.dtype:
    """The smallest signed type that holds the ids of a vocabulary."""
    return torch.int16 if vocab <= 2**15 else torch.int32


def top_bytes(positions: int, k: int, vocab: int) -> int:
    """Bytes that `store_top` needs for `positions` in FP16: positions x (k (2 + i) + 2 + i).

    i is 2 for up to 32,768 tokens, else 4. Raises ValueError for k outside 1 to vocab.
    """
    require_whole("positions", positions)
    require_whole("k", k)
    require(k <= vocab, f"k is {k}; there are only {vocab} tokens to keep")
    return positions * (k + 1) * (2 + id_type(vocab).itemsize)


def save_top(path: str | Path, stored: TopLogits) -> Path:
    """Write stored logits as one safetensors file."""
    tensors = {name: getattr(stored, name) for name in TENSORS}
    facts = {"vocab": stored.vocab, "temperature": stored.temperature}
    return save_tensors(path, tensors, {"top": VERSION, **facts, "sha256": _digest(tensors, facts)})


def load_top(path: str | Path) -> TopLogits:
    """What `save_top` wrote.

    Raises FileNotFoundError, or ValueError for a damaged or altered file, or one of other contents.
    """
    tensors, about = load_tensors(path)
    found = about.get("top") if isinstance(about, dict) else None
    wanted = f"{path} is of version {found} of stored logits; {VERSION} is expected"
    require(found == VERSION, f"{wanted}; store them again")
    facts = {name: about.get(name) for name in ("vocab", "temperature")}
    whole = set(tensors) == set(TENSORS) and _digest(tensors, facts) == about.get("sha256")
    require(whole, f"{path} does not hold what was saved; store the logits again")
    return TopLogits(**tensors, **facts)


def _digest(tensors: dict[str, Tensor], facts: dict) -> str:
    """SHA-256 of the facts, and of types, shapes and contents."""
    hash = hashlib.sha256(repr(sorted(facts.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hash.update(tensor.numpy().tobytes())
    return hash.hexdigest()


def _key(row: Tensor) -> bytes:
    return row.to(torch.int32).numpy().tobytes()

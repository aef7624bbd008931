"""Text that every Python brings along, split once and for all, and cut into batches and passages.

Prose is the language reference inside `pydoc_data.topics`; source is the standard library without
its tests and generated tables. A text is held out by a hash of its name, so every machine holds out
the same ones, and what training texts share with held-out ones is cut from training.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from companion.checks import require, require_known, require_whole
from companion.tokenization import Tokenizer

KINDS = ("prose", "source")
SPLITS = ("train", "validation")
LEFT_OUT = {  # tests, generated tables, files of one installation, and prose told as source
    *("test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "ensurepip"),
    *("lib-dynload", "__phello__", "__pycache__", "dist-packages"),
}
SHARED_PARAGRAPH = 100  # characters from which a paragraph in both splits counts as a leak


@lru_cache
def documents(kind: str, split: str) -> dict[str, str]:
    """Texts of one kind ("prose", "source") and split ("train", "validation"), by name.

    Raises ValueError for unknown names, RuntimeError where this Python came without such texts.
    """
    require_known("kind", kind, KINDS)
    require_known("split", split, SPLITS)
    texts = _prose() if kind == "prose" else _source()
    if not texts:
        raise RuntimeError(f"this Python has no {kind} texts; install one with its library")
    held_out = {name: text for name, text in texts.items() if is_held_out(name)}
    if split == "validation":
        return held_out
    leaks = {part for text in held_out.values() for part in _paragraphs(text)}
    kept = {name: text for name, text in texts.items() if name not in held_out}
    return {name: _without(text, leaks) for name, text in kept.items()}


def is_held_out(name: str) -> bool:
    """Whether a text belongs to validation: one name in sixteen, by the same hash everywhere."""
    return hashlib.sha256(name.encode()).digest()[0] < 16


def manifest(kind: str, split: str) -> dict[str, str]:
    """Name -> first 12 hexadecimal digits of the SHA-256 of each text: what a model was fed."""
    texts = documents(kind, split)
    return {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in texts.items()}


def _prose() -> dict[str, str]:
    from pydoc_data.topics import topics

    return {f"topics/{name}": text for name, text in sorted(topics.items())}


def _source() -> dict[str, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            texts[name.as_posix()] = path.read_bytes().decode("utf-8", errors="replace")
    return texts


def _paragraphs(text: str) -> list[str]:
    return [part for part in text.split("\n\n") if len(part) >= SHARED_PARAGRAPH]


def _without(text: str, leaks: set[str]) -> str:
    return "\n\n".join(part for part in text.split("\n\n") if part not in leaks)


def join_tokens(texts: Iterable[str], tokenizer: Tokenizer) -> Tensor:
    """All texts as one line of token ids, (tokens,), each text led in by the end token."""
    ids = [torch.tensor([tokenizer.end, *tokenizer.encode(text)]) for text in texts]
    require(len(ids) > 0, "there are 0 texts; at least one is needed")
    return torch.cat(ids)


class Batches:
    """Random windows of a line of tokens: `batches[step]` is (batch, context), the same each time.

    The windows depend on (seed, step) alone, so a resumed training sees what it would have seen.
    """

    def __init__(self, tokens: Tensor, *, batch: int, context: int, seed: int = 0) -> None:
        require_whole("batch", batch)
        require_whole("context", context, least=2)
        require_whole("seed", seed, least=0)
        require(tokens.ndim == 1, f"tokens have shape {tuple(tokens.shape)}; a line is expected")
        require(
            len(tokens) >= context, f"{len(tokens)} tokens are fewer than one context {context}"
        )
        self.tokens, self.batch, self.context, self.seed = tokens, batch, context, seed

    def __getitem__(self, step: int) -> Tensor:
        require_whole("step", step, least=0)
        mix = hashlib.sha256(f"{self.seed}/{step}".encode()).digest()
        random = torch.Generator().manual_seed(int.from_bytes(mix[:8], "big", signed=True))
        high = len(self.tokens) - self.context + 1
        starts = torch.randint(high, (self.batch, 1), generator=random)
        return self.tokens[starts + torch.arange(self.context)]

    def __iter__(self) -> Iterator[Tensor]:
        step = 0
        while True:
            yield self[step]
            step += 1


@dataclass(frozen=True, eq=False)
class Passage:
    """A text to judge models on: its tokens in windows, and the bytes each token stands for.

    Every window is led in by the end token, so that every token of the text is predicted once and
    bits per byte can be compared between models with different tokenizers.
    """

    text: str
    tokens: Tensor  # (tokens,) ids of the text
    byte_counts: Tensor  # (tokens,) bytes of UTF-8 each token stands for
    window: int  # tokens a window
    end: int  # id that leads in each window

    @property
    def bytes(self) -> int:
        return int(self.byte_counts.sum())

    def batches(self, batch: int = 1) -> Iterator[Tensor]:
        """Windows as (at most `batch`, 1 + window) ids; a shorter last window comes alone."""
        require_whole("batch", batch)
        whole = len(self.tokens) // self.window * self.window
        lead = torch.full((1, 1), self.end)
        windows = self.tokens[:whole].view(-1, self.window)
        for start in range(0, len(windows), batch):
            rows = windows[start : start + batch]
            yield torch.cat([lead.expand(len(rows), 1), rows], dim=1)
        if whole < len(self.tokens):
            yield torch.cat([lead, self.tokens[None, whole:]], dim=1)


def passage(text: str, tokenizer: Tokenizer, *, window: int = 255) -> Passage:
    """Make a `Passage` of `text`. Raises ValueError for an empty text or a window below 1."""
    require(
        isinstance(text, str) and text != "", f"the text is {text!r}; one character is the least"
    )
    require_whole("window", window)
    tokens = torch.tensor(tokenizer.encode(text))
    byte_counts = torch.tensor([tokenizer.byte_length(token) for token in tokens.tolist()])
    return Passage(text, tokens, byte_counts, window, tokenizer.end)


def validation(
    tokenizer: Tokenizer, *, kind: str = "prose", characters: int = 20_000, window: int = 255
) -> Passage:
    """Held-out text of one kind, cut to about `characters` from many documents in turn.

    The documents come in the order of their names' hashes; each gives its first 4,000 characters.
    """
    require_whole("characters", characters)
    texts = documents(kind, "validation")
    order = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    joined = "\n\n".join(texts[name][:4000] for name in order)[:characters]
    return passage(joined, tokenizer, window=window)

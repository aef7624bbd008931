"""Does what a model writes look like Python to Python itself?

A sample stops after a fixed number of tokens, mostly in the middle of something, so besides the
whole sample the longest beginning that ends with a line is tried too.
"""

from __future__ import annotations

import ast
import io
import tokenize
import warnings
from collections.abc import Sequence

import torch

from companion.checks import require
from companion.decoding import generate
from companion.model import LanguageModel
from companion.tokenization import Tokenizer


def sample_sources(
    model: LanguageModel, tokenizer: Tokenizer, *, samples: int = 200, length: int = 128
) -> list[str]:
    """Texts drawn at temperature 0.8 after the end token, each cut where the model ends it."""
    prompt = torch.full((samples, 1), tokenizer.end)
    ids = generate(model, prompt, length, temperature=0.8, seed=1)
    return [_first_text(tokenizer, row) for row in ids.tolist()]


def accepted(texts: Sequence[str]) -> dict[str, float]:
    """Shares of texts that Python's `tokenize` accepts, that `ast.parse` accepts, and "begins".

    "begins": `ast.parse` accepts at least the first half of the lines. ValueError for no texts.
    """
    require(len(texts) > 0, "there are 0 texts; at least one is needed")
    tests = {"tokenize": tokenizes, "parse": parses, "begins": begins}
    shares = {name: sum(map(test, texts)) / len(texts) for name, test in tests.items()}
    return {"samples": len(texts), **shares}


def tokenizes(text: str) -> bool:
    """Whether `tokenize` reads the text to its end."""
    try:
        return bool(list(tokenize.generate_tokens(io.StringIO(text).readline)))
    except (tokenize.TokenError, SyntaxError):
        return False


def parses(text: str) -> bool:
    """Whether `ast.parse` makes a tree of the text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # an odd escape is still Python
        try:
            ast.parse(text)
        except (SyntaxError, ValueError):  # ValueError: a null character
            return False
    return True


def begins(text: str) -> bool:
    """Whether the text parses once lines are cut from its end, at most half of them."""
    lines = text.splitlines()
    return any(parses("\n".join(lines[:keep])) for keep in range(len(lines), len(lines) // 2, -1))


def _first_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    body = ids[1:]
    stop = body.index(tokenizer.end) if tokenizer.end in body else len(body)
    return tokenizer.decode(body[:stop])

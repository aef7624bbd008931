"""`fails`, the frame around code that must fail.

A notebook shows a mistake by running it. `fails` shows the error to the reader and itself raises
if none came, so a page cannot go on telling of a failure that a newer library has mended.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from companion.checks import require

LINES, CHARACTERS = 3, 300  # of an error's message that a reader is shown


@dataclass(frozen=True)
class ExpectedError:
    """An error that was meant to happen, as the reader sees it."""

    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}, as expected: {self.message}"

    def _repr_html_(self) -> str:
        head = f"<strong>{html.escape(self.kind)}</strong>, as expected"
        style = "border-left: 0.25em solid; padding: 0 0.75em; margin: 0.5em 0"
        body = html.escape(self.message)
        return f'<div style="{style}">{head}<pre style="white-space: pre-wrap">{body}</pre></div>'


@contextmanager
def fails(kind: type[Exception] | tuple[type[Exception], ...], match: str = "") -> Iterator[None]:
    """Run a block that must raise `kind` with a message in which the pattern `match` is found.

    Shows the error's type and first lines. Raises AssertionError if no error came or its message
    is another; errors of other types pass through. Raises ValueError for a bad kind or pattern.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    known = all(isinstance(each, type) and issubclass(each, Exception) for each in kinds)
    require(known and bool(kinds), f"kind is {kind!r}; it must be a type of Exception")
    pattern = _pattern(match)
    try:
        yield
    except kinds as error:
        if not pattern.search(str(error)):
            text = f"the {type(error).__name__} says {str(error)!r}, where {match!r} is not found"
            raise AssertionError(text) from error
        _show(ExpectedError(type(error).__name__, _shortened(str(error))))
    else:
        names = " or ".join(each.__name__ for each in kinds)
        raise AssertionError(f"no {names} came: this code has stopped failing")


def _pattern(match: str) -> re.Pattern[str]:
    try:
        return re.compile(match)
    except re.error as error:
        raise ValueError(f"match is {match!r}, which is no pattern: {error}") from error


def _shortened(message: str) -> str:
    lines = message.strip().splitlines() or ["(no message)"]
    kept = [
        line if len(line) <= CHARACTERS else f"{line[:CHARACTERS]} ..." for line in lines[:LINES]
    ]
    return "\n".join([*kept, "..."] if len(lines) > LINES else kept)


def _show(shown: ExpectedError) -> None:
    try:
        from IPython.display import display
    except ImportError:
        display = print
    display(shown)

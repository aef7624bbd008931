"""Verdicts that chapters leave for the page that shows them all.

Each chapter writes one file when it runs. The file carries a fingerprint of the chapter's cells and
of all code they reach, so that what an older version left behind is told apart and left out.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path

import companion
from companion.checks import require
from companion.claims import CLAIMS, claims_of
from companion.fingerprint import source_fingerprint
from companion.hardware import machine_card
from companion.judging import Verdict
from companion.storage import load_json, save_json
from companion.verdict_tables import VerdictTable

FOLDER = "COMPANION_VERDICTS"  # environment variable that names another folder


def project_root() -> Path:
    """The folder that holds notebooks/ and companion/, from where the code runs upwards.

    Failing that, the folder that the package was installed from.
    """
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "notebooks").is_dir() and (folder / "companion").is_dir():
            return folder
    return Path(companion.__file__).parents[1]


def verdict_folder() -> Path:
    """Where verdicts are kept: `_build/verdicts` of the project, or $COMPANION_VERDICTS."""
    return Path(os.environ.get(FOLDER) or project_root() / "_build" / "verdicts").absolute()


def verdict_table(*verdicts: Verdict, caption: str = "Verdicts") -> VerdictTable:
    """A table of verdicts with this machine's card."""
    _check_verdicts(verdicts)
    return VerdictTable(verdicts, caption, machine_card().as_dict())


def save_verdicts(chapter: str, *verdicts: Verdict) -> VerdictTable:
    """Keep a chapter's verdicts for the page of all verdicts; returns the chapter's closing table.

    `chapter` is the name of its notebook, such as "01_concepts". Raises ValueError unless the
    verdicts are on just the claims that this chapter owes one, FileNotFoundError if there is no
    such notebook, and OSError if the file cannot be written; then an old file stays as it was.
    """
    _check_verdicts(verdicts)
    given = [verdict.claim.id for verdict in verdicts]
    owed = [claim.id for claim in claims_of(chapter[:2])]
    require(sorted(given) == sorted(owed), f"{chapter} owes verdicts on {owed}; given are {given}")
    table = verdict_table(*verdicts, caption=f"Verdicts of chapter {chapter[:2]}")
    folder = verdict_folder()
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        "code": chapter_fingerprint(chapter),
        "card": table.card,
        "verdicts": [verdict.as_dict() for verdict in verdicts],
    }
    save_json(folder / f"{chapter}.json", kept)
    return table


def chapter_fingerprint(chapter: str) -> str:
    """Fingerprint of a notebook's code cells and of the package's code that they reach."""
    path = project_root() / "notebooks" / f"{chapter}.ipynb"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a chapter is named as its notebook is")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lines = [line for line in "\n".join(code).splitlines() if not line.startswith(("%", "!"))]
    return source_fingerprint("\n".join(lines))


@dataclass(frozen=True)
class AllVerdicts:
    """The tables of all chapters, and what could not be shown, with the reason."""

    tables: tuple[VerdictTable, ...]
    left_out: tuple[str, ...]

    @property
    def summary(self) -> str:
        """How many verdicts there are of each kind."""
        outcomes = [verdict.outcome for table in self.tables for verdict in table.verdicts]
        counts = {each: outcomes.count(each) for each in sorted(set(outcomes))}
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        start = f"{len(outcomes)} of {len(CLAIMS)} claims have a verdict here"
        return f"{start}: {told}." if outcomes else f"{start}."

    def __str__(self) -> str:
        return "\n\n".join([self.summary, *map(str, self.tables), *self.left_out])

    def _repr_html_(self) -> str:
        tables = "".join(table._repr_html_() for table in self.tables)
        items = "".join(f"<li>{escape(reason)}</li>" for reason in self.left_out)
        left_out = f"<p>Not shown:</p><ul>{items}</ul>" if items else ""
        return f"<p>{escape(self.summary)}</p>{tables}{left_out}"


def load_verdicts() -> AllVerdicts:
    """All verdicts that the present chapters left, in their order, and the reasons for gaps."""
    notebooks = sorted((project_root() / "notebooks").glob("*.ipynb"))
    chapters = [path.stem for path in notebooks if claims_of(path.stem[:2])]
    found = [_load(chapter) for chapter in chapters]
    tables = tuple(each for each in found if isinstance(each, VerdictTable))
    reasons = tuple(each for each in found if isinstance(each, str))
    return AllVerdicts(tables, reasons if chapters else ("there are no chapters here",))


def _load(chapter: str) -> VerdictTable | str:
    """A chapter's table, or why there is none."""
    path = verdict_folder() / f"{chapter}.json"
    again = f"run notebooks/{chapter}.ipynb"
    stale = f"the verdicts of {chapter} come from an older version of it"
    if not path.is_file():
        return f"{chapter} has left no verdicts yet; {again}"
    try:
        kept = load_json(path)
        verdicts = tuple(Verdict.from_dict(each) for each in kept["verdicts"])
        caption = f"Verdicts of chapter {chapter[:2]}"
        table = VerdictTable(verdicts, caption, dict(kept["card"]))
        code = kept["code"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"the verdicts of {chapter} are damaged; {again} again"
    return table if _is_current(chapter, code) else f"{stale}; {again} again"


def _is_current(chapter: str, code: str) -> bool:
    """Whether the chapter still has this fingerprint; one whose code is broken has none."""
    try:
        return chapter_fingerprint(chapter) == code
    except (SyntaxError, AttributeError, ImportError):
        return False


def _check_verdicts(verdicts: tuple[object, ...]) -> None:
    kinds = [type(each).__name__ for each in verdicts if not isinstance(each, Verdict)]
    require(bool(verdicts) and not kinds, f"verdicts are expected; given are {kinds or 'none'}")

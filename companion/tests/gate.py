"""What every stored notebook must be: stripped, listed in the book, and made of short cells.

`notebook_faults` gives one sentence for each rule that a notebook breaks. test_notebooks.py holds
the course's notebooks to it, and shows that each rule can fail.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

MOST_LINES = 20
SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
# Tags and comments with which nbval or MyST would pass over a cell, or forgive its failure.
FORGIVING_TAGS = {"raises-exception", "nbval-raises-exception", "nbval-skip", "skip-execution"}
FORGIVING_COMMENT = re.compile(r"#\s*NBVAL_(SKIP|RAISES_EXCEPTION)")
SHELL = re.compile(r"^\s*(!|%%?(pip|conda|mamba|uv|system|sx|sh|bash|script|cmd)\b)", re.MULTILINE)
ROOT = Path(__file__).resolve().parents[2]


def stored_notebooks(root: Path = ROOT) -> list[Path]:
    """Every notebook that belongs to the course, sorted."""
    found = [path for folder in ("notebooks", "book") for path in (root / folder).rglob("*.ipynb")]
    return sorted(path for path in found if ".ipynb_checkpoints" not in path.parts)


def listed_pages(root: Path = ROOT) -> set[str]:
    """Names of the pages in _toc.yml, without endings."""

    def names(entry: object) -> set[str]:
        if isinstance(entry, list):
            return set().union(*map(names, entry))
        if not isinstance(entry, dict):
            return set()
        own = {entry[key] for key in ("root", "file") if key in entry}
        return own.union(*map(names, entry.values()))

    return names(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8")))


def notebook_faults(path: Path, root: Path = ROOT) -> list[str]:
    """One sentence for each rule that the notebook at `path` breaks."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    faults = []
    if path.relative_to(root).with_suffix("").as_posix() not in listed_pages(root):
        faults.append("it is not listed in _toc.yml")
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        faults.append("its kernelspec is not python3")
    if "widgets" in notebook["metadata"]:
        faults.append("it holds widget state")
    ids = [cell.get("id", "") for cell in notebook["cells"]]
    twice = sorted({one for one in ids if ids.count(one) > 1})
    faults += [f"the cell id {one!r} is used twice" for one in twice]
    return faults + [fault for cell in notebook["cells"] for fault in cell_faults(cell)]


def cell_faults(cell: dict) -> list[str]:
    """One sentence for each rule that one cell breaks."""
    name = cell.get("id", "")
    source = "".join(cell["source"])
    marks = sorted(FORGIVING_TAGS.intersection(cell["metadata"].get("tags", [])))
    marks += [comment.group() for comment in FORGIVING_COMMENT.finditer(source)]
    faults = [f"cell {name!r} forgives failure: {mark}" for mark in marks]
    if not SLUG.fullmatch(name) or not re.search("[a-z]", name):
        faults.append(f"the cell id {name!r} is no slug such as 'count-bytes'")
    if cell["cell_type"] == "code":
        faults += [f"cell {name!r} {fault}" for fault in code_faults(cell, source)]
    return faults


def code_faults(cell: dict, source: str) -> list[str]:
    """What is wrong with a code cell, as the end of a sentence."""
    lines = source.count("\n") + 1
    rules = {
        "holds outputs": bool(cell.get("outputs")),
        "holds an execution count": cell.get("execution_count") is not None,
        "is empty": not source.strip(),
        f"has {lines} lines, {MOST_LINES} are allowed": lines > MOST_LINES,
        "calls a shell": bool(SHELL.search(source)),
    }
    return [fault for fault, broken in rules.items() if broken]

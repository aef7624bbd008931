"""Where in the chapters each erratum is run and caught, found by reading their notebooks.

A chapter marks the place with a label of its own, `(erratum-e16-02)=` for E16 in chapter 02, on the
line above what tells of the mistake; more than one place gets a letter, `(erratum-e25-01-b)=`. The
code below it, up to the next heading or label, must hold something that can fail: `fails`, an
`assert` or a verdict. So the page of all errata cannot point at what is not there.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from companion.collecting import project_root
from companion.errata import ERRATA, Erratum

LABEL = re.compile(r"^\((erratum-[^)]*)\)=$")
NAMED = re.compile(r"erratum-(e\d+)-(\d\d|book)(?:-[b-z])?")
HEADING = re.compile(r"#{1,6} ")
FENCE = re.compile(r"(`{3,}|~{3,}|:{3,})")
MARKUP = re.compile(r"([\\`*_{}\[\]<>$#|~^])")
VERDICTS = {"verdict", "verdict_on"}


@dataclass(frozen=True)
class Place:
    """One place where a page shows an erratum."""

    page: str  # its file, such as "notebooks/02_data_parallelism.ipynb"
    label: str
    cells: tuple[str, ...] = ()  # ids of the code cells that hold a check
    errors: tuple[str, ...] = ()  # types of error that they expect
    asserts: int = 0
    claims: tuple[str, ...] = ()  # that they give a verdict on

    @property
    def id(self) -> str:
        """Of the erratum that the label names, known or not: "E16"."""
        return self.label.split("-")[1].upper() if NAMED.fullmatch(self.label) else self.label

    @property
    def chapter(self) -> str:
        """Two digits, or "book" for a page that is no chapter."""
        return Path(self.page).stem[:2] if self.page.startswith("notebooks/") else "book"

    @property
    def caught_by(self) -> str:
        """What the cells check, in words."""
        errors = [f"an expected `{name}`" for name in dict.fromkeys(self.errors)]
        asserts = [f"{self.asserts} assert{'s' if self.asserts > 1 else ''}"] * bool(self.asserts)
        verdicts = [f"the verdict on {claim}" for claim in self.claims]
        return ", ".join([*errors, *asserts, *verdicts])


@dataclass(frozen=True)
class AllErrata:
    """Every erratum with its places; what is still to come; and what is wrong with the marks."""

    shown: tuple[tuple[Erratum, tuple[Place, ...]], ...]
    to_come: tuple[tuple[Erratum, str], ...]  # with the chapter that will show it
    faults: tuple[str, ...]

    @property
    def summary(self) -> str:
        """How many errata are shown, at how many places, and how many are to come."""
        places = [place for _, found in self.shown for place in found]
        pages = len({place.page for place in places})
        count = f"{len(self.shown)} of {len(ERRATA)} errata are run here"
        return f"{count}, at {len(places)} places of {pages} pages."

    def __str__(self) -> str:
        return self._repr_markdown_()

    def _repr_markdown_(self) -> str:
        """MyST, in which a label that no page has is a warning, and so fails the build."""
        parts = [self.summary, *(_entry(erratum, places) for erratum, places in self.shown)]
        if self.to_come:
            parts += ["**To come:**", *(_announced(each, where) for each, where in self.to_come)]
        if self.faults:
            parts += ["**Not in order:**", *(f"- {escaped(fault)}" for fault in self.faults)]
        return "\n\n".join(parts)


def load_errata(root: Path | None = None) -> AllErrata:
    """Read the pages of the project in `root` (left out: where the code runs) for all errata."""
    root = root or project_root()
    pages = [*sorted((root / "notebooks").glob("*.ipynb")), *sorted((root / "book").glob("*.md"))]
    places = [place for page in pages for place in _places(page, root)]
    chapters = {page.stem[:2] for page in pages if page.suffix == ".ipynb"}
    owed = [(each, chapter) for each in ERRATA.values() for chapter in each.chapters]
    found = {(place.id, place.chapter) for place in places}
    shown = {each.id: tuple(p for p in places if p.id == each.id) for each in ERRATA.values()}
    missing = [(each, chapter) for each, chapter in owed if (each.id, chapter) not in found]
    return AllErrata(
        tuple((ERRATA[id], where) for id, where in shown.items() if where),
        tuple((each, chapter) for each, chapter in missing if chapter not in chapters),
        (*_faults(places), *(_unmarked(*one) for one in missing if one[1] in chapters)),
    )


def _faults(places: list[Place]) -> Iterator[str]:
    """What is wrong with labels that are there."""
    labels = [place.label for place in places]
    for place in places:
        told = f"{place.page}: the label {place.label}"
        chapters = ERRATA[place.id].chapters if place.id in ERRATA else ()
        named = NAMED.fullmatch(place.label)
        if not chapters:
            yield f"{told} names no erratum; it must be such as erratum-e16-02"
        elif place.chapter not in chapters or named[2] != place.chapter:
            yield f"{told} is out of place; {place.id} belongs to {', '.join(chapters)}"
        elif place.chapter != "book" and not place.cells:
            yield f"{told} is followed by no code that can fail"
    twice = sorted({label for label in labels if labels.count(label) > 1})
    yield from (f"the label {label} is used {labels.count(label)} times" for label in twice)


def _unmarked(erratum: Erratum, chapter: str) -> str:
    label = f"erratum-{erratum.id.lower()}-{chapter}"
    return f"chapter {chapter} has no label ({label})= for {erratum.id}"


def _places(path: Path, root: Path) -> Iterator[Place]:
    """The places that a page marks, in order."""
    page = path.relative_to(root).as_posix()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield from (Place(page, label) for label in _labels(text))
        return
    stored = json.loads(text)["cells"]
    cells = [(cell["cell_type"], cell.get("id", ""), "".join(cell["source"])) for cell in stored]
    for index, (kind, _, source) in enumerate(cells):
        for label in _labels(source) if kind == "markdown" else ():
            yield _place(page, label, cells[index + 1 :])


def _place(page: str, label: str, after: list[tuple[str, str, str]]) -> Place:
    """A label with the checks of the cells after it, up to the next heading or such a label."""
    cells, errors, asserts, claims = [], [], 0, []
    for kind, id, source in after:
        if kind == "markdown" and (_labels(source) or any(_lines(source, HEADING.match))):
            break
        if kind == "code":
            expected, count, judged = checks(source)
            cells += [id] * bool(expected or count or judged)
            errors, asserts, claims = errors + expected, asserts + count, claims + judged
    return Place(page, label, tuple(cells), tuple(errors), asserts, tuple(claims))


def _labels(text: str) -> list[str]:
    return [match[1] for match in _lines(text, LABEL.match)]


def _lines(text: str, match: Callable[[str], re.Match | None]) -> Iterator[re.Match]:
    """Matches of the lines that stand in no fenced block."""
    fence = ""
    for line in text.splitlines():
        mark = FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif fence and line.strip() == fence:
            fence = ""
        elif not fence and (found := match(line)):
            yield found


def checks(source: str) -> tuple[list[str], int, list[str]]:
    """Of a code cell: the errors it expects, how many asserts it has, the claims it judges."""
    lines = [line for line in source.splitlines() if not line.startswith(("%", "!"))]
    nodes = list(ast.walk(ast.parse("\n".join(lines))))
    calls = [node for node in nodes if isinstance(node, ast.Call) and node.args]
    calls = [(getattr(call.func, "id", ""), call.args[0]) for call in calls]
    errors = [ast.unparse(kind) for name, kind in calls if name == "fails"]
    claims = [ast.unparse(claim).strip("'") for name, claim in calls if name in VERDICTS]
    return errors, sum(isinstance(node, ast.Assert) for node in nodes), claims


def escaped(text: str) -> str:
    """Plain text as MyST, with nothing in it read as markup."""
    return MARKUP.sub(r"\\\1", text)


def _entry(erratum: Erratum, places: tuple[Place, ...]) -> str:
    """One erratum: what is wrong, what is right, and links to where it is run."""
    told = f"**{erratum.id}**, {erratum.where}. *Wrong:* {escaped(erratum.wrong)}."
    right = f"*Right:* {escaped(erratum.right)}."
    return f"- {told} {right}\n\n  *Run and caught:* {'; '.join(map(_link, places))}."


def _link(place: Place) -> str:
    """A link to the page, which works in JupyterLab too, and one to the very place in the book."""
    book = place.chapter == "book"
    name = f"page {Path(place.page).stem}" if book else f"chapter {int(place.chapter)}"
    caught = f" (by {place.caught_by})" if place.caught_by else ""
    return f"[{name}](../{place.page}), [at this place](#{place.label}){caught}"


def _announced(erratum: Erratum, chapter: str) -> str:
    where = "on a page around the chapters" if chapter == "book" else f"in chapter {int(chapter)}"
    return f"- **{erratum.id}**, {erratum.where}; {where}. *Wrong:* {escaped(erratum.wrong)}."

"""The page of errata is true: every link leads to a place that runs and checks something."""

import json
import re
from pathlib import Path

import pytest

from companion.errata import ERRATA, errata_of
from companion.errata_pages import checks, escaped, load_errata
from companion.tests.gate import ROOT

FAILING = "with fails(IndexError):\n    [][0]\n"
TEXT = "D3 says that one rank is enough (**E16**)."


def write_page(root: Path, name: str, *cells: tuple[str, str]) -> None:
    """A notebook of ("markdown" or "code", source) cells."""
    plain = [
        {"cell_type": kind, "id": f"cell-{number}", "source": source.splitlines(keepends=True)}
        for number, (kind, source) in enumerate(cells)
    ]
    folder = root / "notebooks"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.ipynb").write_text(json.dumps({"cells": plain}), encoding="utf-8")


def marked(chapter: str, *ids: str) -> list[tuple[str, str]]:
    """Cells that show these errata as they should."""
    labels = [f"(erratum-{id.lower()}-{chapter})=\nThis is wrong ({id})." for id in ids]
    return [cell for label in labels for cell in (("markdown", label), ("code", FAILING))]


def chapter_two(root: Path, *cells: tuple[str, str]) -> None:
    """A chapter 02 with all its errata but E16, which is in `cells`."""
    others = [each.id for each in errata_of("02") if each.id != "E16"]
    write_page(root, "02_many", *marked("02", *others), ("markdown", "# Next"), *cells)


def place_of(root: Path, id: str):
    (places,) = [places for erratum, places in load_errata(root).shown if erratum.id == id]
    return places[0]


# --- the course's own pages ---------------------------------------------------------------------


def test_every_erratum_of_a_chapter_is_run_and_caught() -> None:
    assert load_errata(ROOT).faults == ()


def test_every_link_leads_to_a_label_that_is_there_once() -> None:
    told = str(load_errata(ROOT))
    pages = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("book/*.md")]
    stored = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    targets = re.findall(r"\]\(#([\w-]+)\)", told)
    assert [t for t in targets if len(re.findall(rf"\({t}\)=(?=\n|\\n)", stored)) != 1] == []
    files = re.findall(r"\]\(\.\./([^)#]+)\)", told)
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_every_erratum_is_shown_or_to_come() -> None:
    found = load_errata(ROOT)
    listed = {each.id for each, _ in (*found.shown, *found.to_come)}
    assert listed == set(ERRATA) or found.faults


def test_the_stored_page_asks_for_links_that_are_checked() -> None:
    """Without this a link in an output is plain text to Sphinx, which then notices nothing."""
    page = json.loads((ROOT / "book" / "errata.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in page["cells"] if "load_errata" in "".join(cell["source"])]
    assert [cell["metadata"].get("mystnb") for cell in cells] == [{"markdown_format": "myst"}]


# --- pages made up ------------------------------------------------------------------------------


def test_a_place_with_its_checks(tmp_path: Path) -> None:
    chapter_two(
        tmp_path,
        ("markdown", f"Before.\n\n(erratum-e16-02)=\n{TEXT}"),
        ("code", "rank = 3"),
        ("markdown", "And then:"),
        ("code", f"%matplotlib inline\n{FAILING}assert rank == 3\nassert 1"),
        ("code", 'c3 = verdict(\n    "C3",\n    measured=1,\n)'),
        ("markdown", "## Something else"),
        ("code", "assert 2"),
    )
    place, found = place_of(tmp_path, "E16"), load_errata(tmp_path)
    assert (place.page, place.label) == ("notebooks/02_many.ipynb", "erratum-e16-02")
    assert place.cells == tuple(f"cell-{number}" for number in (12, 13))
    assert (place.errors, place.asserts, place.claims) == (("IndexError",), 2, ("C3",))
    assert found.faults == ()
    line = "[chapter 2](../notebooks/02_many.ipynb), [at this place](#erratum-e16-02) (by an "
    assert f"{line}expected `IndexError`, 2 asserts, the verdict on C3)" in str(found)


def test_what_is_to_come_is_told_apart(tmp_path: Path) -> None:
    chapter_two(tmp_path, *marked("02", "E16"))
    found = load_errata(tmp_path)
    assert [each.id for each, _ in found.shown] == ["E4", "E5", "E15", "E16", "E26"]
    assert {"E5": "03", "E17": "08"}.items() <= {e.id: where for e, where in found.to_come}.items()
    assert ("E26", "book") in [(each.id, where) for each, where in found.to_come]
    assert "5 of 26 errata are run here, at 5 places of 1 pages." in str(found)
    assert "**E17**, D3 4.1.3; in chapter 8" in str(found).partition("To come")[2]


def test_a_page_of_the_book_may_show_one(tmp_path: Path) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "faq.md").write_text("(erratum-e26-book)=\nAdvice.\n", encoding="utf-8")
    found = load_errata(tmp_path)
    assert found.faults == () and place_of(tmp_path, "E26").chapter == "book"
    assert "[page faq](../book/faq.md), [at this place](#erratum-e26-book)." in str(found)


def test_two_places_of_one_erratum(tmp_path: Path) -> None:
    more = ("markdown", "(erratum-e16-02-b)=\nAnd here."), ("code", "assert 1")
    chapter_two(tmp_path, *marked("02", "E16"), *more)
    found = load_errata(tmp_path)
    assert found.faults == () and "(#erratum-e16-02-b)" in str(found)


@pytest.mark.parametrize(
    ("cells", "fault"),
    [
        ([("markdown", TEXT), ("code", FAILING)], "has no label (erratum-e16-02)= for E16"),
        ([("code", f"'''\n(erratum-e16-02)=\n'''\n{FAILING}")], "has no label"),
        ([("markdown", "(erratum-e16-02)=\n# New"), ("code", "x = 1")], "no code that can fail"),
        (
            [("markdown", "(erratum-e16-02)=\nx"), ("markdown", "### Y"), ("code", FAILING)],
            "no code that can fail",
        ),
        ([*marked("02", "E16"), *marked("02", "E16")], "erratum-e16-02 is used 2 times"),
        ([*marked("02", "E16"), *marked("02", "E11")], "out of place; E11 belongs to 07"),
        ([*marked("02", "E16"), *marked("03", "E5")], "out of place; E5 belongs to 02, 03"),
        ([*marked("02", "E16"), *marked("02", "E77")], "names no erratum"),
        ([*marked("02", "E16"), ("markdown", "(erratum-16)=\nx")], "names no erratum"),
        ([("markdown", "```\n(erratum-e16-02)=\n```"), ("code", FAILING)], "has no label"),
        ([("markdown", "See (erratum-e16-02)=."), ("code", FAILING)], "has no label"),
    ],
)
def test_each_fault_is_found(cells: list, fault: str, tmp_path: Path) -> None:
    chapter_two(tmp_path, *cells)
    (found,) = load_errata(tmp_path).faults
    assert fault in found
    assert escaped(found) in str(load_errata(tmp_path)).partition("Not in order")[2]


def test_a_fence_with_backticks_inside_ends_where_it_ends(tmp_path: Path) -> None:
    text = "````{note}\n```\n(erratum-e4-02)=\n```\n````\n\n(erratum-e16-02)=\n" + TEXT
    chapter_two(tmp_path, ("markdown", text), ("code", FAILING))
    assert load_errata(tmp_path).faults == ()


def test_checks_of_a_cell() -> None:
    assert checks("x = 1\nother(ValueError)") == ([], 0, [])
    source = "with fails((KeyError, ValueError), match='x'):\n    f()\nif y:\n    assert z\n"
    assert checks(source) == (["(KeyError, ValueError)"], 1, [])
    assert checks("verdict_on(name, part)\nverdict('C1', measured=1)") == ([], 0, ["name", "C1"])


def test_nothing_in_an_erratum_is_read_as_markup() -> None:
    assert escaped("a_b *c* `d` {e} [f] <g> $h$") == r"a\_b \*c\* \`d\` \{e\} \[f\] \<g\> \$h\$"
    for each in ERRATA.values():
        for text in (each.wrong, each.right):
            assert escaped(text).replace("\\", "") == text


def test_no_pages_at_all(tmp_path: Path) -> None:
    found = load_errata(tmp_path)
    assert (found.shown, found.faults) == ((), ()) and len(found.to_come) >= len(ERRATA)

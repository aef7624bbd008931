"""Verdicts follow from the numbers; what was saved is shown, or said to be left out."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import companion
from companion import collecting
from companion.intervals import Interval
from companion.judging import FAILS, HOLDS, ONLY_IF, UNDECIDED, UNMEASURED
from companion.storage import save_json
from companion.verdicts import (
    CLAIMS,
    ERRATA,
    Verdict,
    claim,
    claims_of,
    errata_of,
    erratum,
    fails,
    load_verdicts,
    part,
    save_verdicts,
    verdict,
    verdict_on,
    verdict_table,
)

ABOVE, BELOW, ACROSS = Interval(2, 1.5, 2.5), Interval(0.5, 0.4, 0.6), Interval(1.1, 0.9, 1.3)
CHAPTERS = {f"{number:02d}" for number in range(1, 11)}


def judged(**cases):
    return verdict("C22", measured=cases, quantity="speed-up", unit="x", at_least=1.0)


# --- the tables of claims and errata ------------------------------------------------------------


def test_every_claim_and_erratum_is_there_once():
    assert list(CLAIMS) == [f"C{number}" for number in range(1, 26)]
    assert list(ERRATA) == [f"E{number}" for number in range(1, 27)]
    assert all(each.chapter in CHAPTERS for each in CLAIMS.values())
    assert all(set(each.chapters) <= CHAPTERS | {"book"} for each in ERRATA.values())
    assert all(each.chapters for each in ERRATA.values())


def test_every_place_names_a_document():
    place = re.compile(r"D[1-5] \d(\.\d)*(-\d\.\d)?( Q\d)?")
    for each in (*CLAIMS.values(), *ERRATA.values()):
        assert place.match(each.where), each


def test_a_chapter_knows_what_it_owes():
    assert [each.id for each in claims_of("01")] == ["C20", "C22"]
    assert [each.id for each in errata_of("01")] == ["E6", "E19", "E24", "E25"]
    assert sum(len(claims_of(chapter)) for chapter in CHAPTERS) == len(CLAIMS)
    assert claims_of("99") == []


def test_unknown_ids_are_refused():
    with pytest.raises(ValueError, match="C99"):
        claim("C99")
    with pytest.raises(ValueError, match="E0"):
        erratum("E0")


# --- from numbers to outcomes -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cases", "outcome", "sentence"),
    [
        ({"a": ABOVE, "b": ABOVE}, HOLDS, "holds"),
        ({"a": BELOW, "b": BELOW}, FAILS, "does not hold"),
        ({"a": BELOW, "b": ABOVE, "c": ABOVE}, ONLY_IF, "holds only if: b; c"),
        ({"a": ACROSS}, UNDECIDED, "not decided on this machine"),
        ({"a": ABOVE, "b": ACROSS}, ONLY_IF, "holds only if: a (not decided: b)"),
        (
            {"a": BELOW, "b": ACROSS},
            UNDECIDED,
            "not decided on this machine (refuted: a, not decided: b)",
        ),
        ({"a": None}, UNMEASURED, "not measured on this machine"),
        ({"a": Interval.unknown()}, UNMEASURED, "not measured on this machine"),
        ({"a": ABOVE, "b": None}, HOLDS, "holds (not measured: b)"),
        ({"a": BELOW, "b": None}, FAILS, "does not hold (not measured: b)"),
        (
            {"a": ACROSS, "b": None},
            UNDECIDED,
            "not decided on this machine (not decided: a, not measured: b)",
        ),
        ({"a": Interval(2, -math.inf, math.inf)}, UNDECIDED, "not decided on this machine"),
        ({"a": Interval(2, 1.0, math.inf)}, HOLDS, "holds"),
    ],
)
def test_outcomes(cases, outcome, sentence):
    found = judged(**cases)
    assert (found.outcome, found.sentence) == (outcome, sentence)


def test_one_nameless_case():
    for value, outcome in ((1.0, HOLDS), (0.999, FAILS), (ACROSS, UNDECIDED), (None, UNMEASURED)):
        found = verdict("C1", measured=value, quantity="speed-up", at_least=1)
        assert (found.outcome, found.sentence) == (outcome, outcome)


def test_limits_from_above_and_bands():
    assert verdict("C3", measured=1e-13, quantity="gap", at_most=1e-12).outcome == HOLDS
    assert verdict("C3", measured=1e-3, quantity="gap", at_most=1e-12).outcome == FAILS
    band = {"at_least": 0.9, "at_most": 1.1, "quantity": "ratio"}
    assert verdict("C4", measured=Interval(1, 0.95, 1.05), **band).outcome == HOLDS
    assert verdict("C4", measured=Interval(1, 0.8, 1.05), **band).outcome == UNDECIDED
    assert verdict("C4", measured=Interval(1.5, 1.2, 1.7), **band).outcome == FAILS
    assert verdict("C4", measured=Interval(0.5, 0.2, 0.7), **band).outcome == FAILS


def test_a_case_counts_where_every_part_shows_it():
    fast = part("speed-up", {"8 bit": ABOVE, "4 bit": ABOVE, "2 bit": None}, at_least=1)
    cheap = part("loss", {"8 bit": 0.01, "4 bit": 0.5, "2 bit": 0.01}, at_most=0.1)
    found = verdict_on("C11", fast, cheap)
    assert found.sentence == "holds only if: 8 bit (not measured: 2 bit)"
    dear = part("loss", {"8 bit": 0.01, "4 bit": 0.5, "2 bit": 0.5}, at_most=0.1)
    assert verdict_on("C11", fast, dear).names("refuted") == ["4 bit", "2 bit"]
    exact = part("same tokens", 0.0, at_most=0.0)  # one nameless case goes with every named one
    assert verdict_on("C11", fast, exact).sentence == "holds (not measured: 2 bit)"
    broken = part("same tokens", 1.0, at_most=0.0)
    assert verdict_on("C11", fast, broken).outcome == FAILS


STATES = {"over": ABOVE, "under": BELOW, "across": ACROSS, "busy": None}


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.sampled_from(list(STATES)), min_size=1, max_size=5))
def test_outcome_equals_the_rule_spelled_out(states):
    found = judged(**{f"case {i}": STATES[state] for i, state in enumerate(states)}).outcome
    counted = [state for state in states if state != "busy"]
    if not counted:
        assert found == UNMEASURED
    elif all(state == "over" for state in counted):
        assert found == HOLDS
    elif all(state == "under" for state in counted):
        assert found == FAILS
    elif "over" in counted:
        assert found == ONLY_IF
    else:
        assert found == UNDECIDED


@pytest.mark.parametrize(
    "wrong",
    [
        {"measured": {}},
        {"measured": {"": 1.0}},
        {"measured": math.nan},
        {"measured": math.inf},
        {"measured": True},
        {"measured": "fast"},
        {"at_least": None},
        {"at_least": math.inf},
        {"at_least": 2.0, "at_most": 1.0},
        {"predicted": math.nan},
        {"predicted": {"no such case": 1.0}},
    ],
)
def test_bad_numbers_are_refused(wrong):
    with pytest.raises(ValueError):
        verdict("C1", **{"measured": 1.0, "quantity": "speed-up", "at_least": 1.0} | wrong)


def test_a_verdict_needs_a_part_and_a_known_claim():
    with pytest.raises(ValueError, match="0 parts"):
        verdict_on("C1")
    with pytest.raises(ValueError, match="C77"):
        verdict("C77", measured=1.0, quantity="speed-up", at_least=1.0)


# --- how they look ------------------------------------------------------------------------------


class Cells(HTMLParser):
    """Counts a table's cells row by row, spanning cells included, and checks that tags close."""

    def __init__(self):
        super().__init__()
        self.open, self.rows, self.spans, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.spans = [left - 1 for left in self.spans if left > 1]
            self.rows.append(len(self.spans))
        if tag in ("td", "th"):
            self.rows[-1] += 1
            self.spans += [int(dict(attributes).get("rowspan", 1))]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(html):
    cells = Cells()
    cells.feed(html)
    assert cells.open == []
    return cells


def test_table_is_whole_and_says_all():
    several = judged(short=BELOW, long=ABOVE)
    single = verdict("C20", measured=1.0, quantity="ratio", at_least=1.1, predicted=12345.6)
    table = verdict_table(several, single)
    cells = read(table._repr_html_())
    assert len(set(cells.rows)) == 1 and len(cells.rows) == 1 + 2 + 1
    for text in (cells.text, str(table)):
        assert "holds only if: long" in text and "does not hold" in text
        assert "D5 2.2" in text and "12,346" in text and "at least 1.1" in text
        assert table.card["cpu"] in text


def test_a_paragraph_says_what_was_predicted_and_measured():
    found = verdict(
        "C22", measured={"a": ABOVE, "b": None}, quantity="speed-up", unit="x", at_least=1,
        predicted={"a": 1.9}, because="one token waits for the last",
    )  # fmt: skip
    for text in (read(found._repr_html_()).text, str(found)):
        assert "predicted 1.9 x" in text and "measured 2.0 x (1.5 to 2.5)" in text
        assert "not measured" in text and "one token waits" in text


def test_what_a_notebook_gives_is_escaped():
    trap = "<script>alert('&')</script>"
    found = verdict(
        "C22", measured={trap: BELOW, "b": ABOVE}, quantity=trap, unit=trap, at_least=1,
        because=trap,
    )  # fmt: skip
    for html in (found._repr_html_(), verdict_table(found, caption=trap)._repr_html_()):
        assert "<script" not in html and "&lt;script&gt;" in html


# --- saved by chapters, shown on one page ------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with two chapters, seen from within its notebooks folder."""
    (tmp_path / "companion").mkdir()
    (tmp_path / "notebooks").mkdir()
    write_chapter(tmp_path, "01_concepts", "x = 1")
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.delenv(collecting.FOLDER, raising=False)
    return tmp_path


def write_chapter(root, name, code, outputs=()):
    cells = [
        {"cell_type": "markdown", "source": ["no code: ("]},
        {"cell_type": "code", "source": code.splitlines(keepends=True), "outputs": list(outputs)},
    ]
    (root / "notebooks" / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))


def first_chapter():
    return judged(a=ABOVE), verdict("C20", measured=0.5, quantity="ratio", at_least=1)


def test_saved_verdicts_are_shown_alike(project):
    table = save_verdicts("01_concepts", *first_chapter())
    shown = load_verdicts()
    assert shown.left_out == ()
    assert shown.tables == (table,)
    assert str(table) in str(shown)
    assert "2 of 25 claims have a verdict here: 1 does not hold, 1 holds" in shown.summary
    assert (project / "_build" / "verdicts" / "01_concepts.json").is_file()
    assert [path.name for path in (project / "_build" / "verdicts").iterdir()] == [
        "01_concepts.json"
    ]


def test_a_verdict_survives_json():
    for found in (*first_chapter(), judged(a=None, b=Interval(2, -math.inf, math.inf))):
        assert Verdict.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_another_folder_can_be_named(project, monkeypatch):
    monkeypatch.setenv(collecting.FOLDER, str(project / "elsewhere"))
    save_verdicts("01_concepts", *first_chapter())
    assert (project / "elsewhere" / "01_concepts.json").is_file()
    assert len(load_verdicts().tables) == 1


def test_the_pages_folder_does_not_matter(project, monkeypatch):
    save_verdicts("01_concepts", *first_chapter())
    (project / "book").mkdir()
    monkeypatch.chdir(project / "book")
    assert len(load_verdicts().tables) == 1


def test_away_from_a_project_the_packages_own_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert collecting.project_root() == Path(companion.__file__).parents[1]


def test_nothing_saved_is_said_in_words(project):
    shown = load_verdicts()
    assert shown.tables == () and "run notebooks/01_concepts.ipynb" in shown.left_out[0]
    assert "0 of 25" in read(shown._repr_html_()).text
    (project / "notebooks" / "01_concepts.ipynb").unlink()
    assert load_verdicts().left_out == ("there are no chapters here",)


def test_an_older_versions_verdicts_are_left_out(project):
    save_verdicts("01_concepts", *first_chapter())
    write_chapter(project, "01_concepts", "x = 1  # a comment\n%matplotlib inline", ["an output"])
    assert len(load_verdicts().tables) == 1
    for changed in ("x = 2", "x = (", "from companion.checks import no_such_name"):
        write_chapter(project, "01_concepts", changed)
        shown = load_verdicts()
        assert shown.tables == () and "older version" in shown.left_out[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(path.read_text()[:-20]),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text("{}"),
        lambda path: path.write_text(path.read_text().replace("C22", "C99")),
        lambda path: path.write_text(path.read_text().replace('"estimate"', '"guess"')),
    ],
)
def test_a_damaged_file_is_said_to_be(project, damage):
    save_verdicts("01_concepts", *first_chapter())
    damage(project / "_build" / "verdicts" / "01_concepts.json")
    shown = load_verdicts()
    assert shown.tables == () and "damaged" in shown.left_out[0]


def test_a_card_of_another_version_is_shown_all_the_same(project):
    save_verdicts("01_concepts", *first_chapter())
    path = project / "_build" / "verdicts" / "01_concepts.json"
    kept = json.loads(path.read_text())
    save_json(path, {**kept, "card": {"cpu": "abacus"}})
    assert "Measured on cpu abacus" in str(load_verdicts())


def test_a_chapter_saves_just_what_it_owes(project):
    with pytest.raises(ValueError, match="C20"):
        save_verdicts("01_concepts", judged(a=ABOVE))
    with pytest.raises(ValueError, match="C1"):
        extra = verdict("C1", measured=1.0, quantity="speed-up", at_least=1)
        save_verdicts("01_concepts", *first_chapter(), extra)
    with pytest.raises(ValueError, match="str"):
        save_verdicts("01_concepts", "C20")
    with pytest.raises(FileNotFoundError, match="01_other"):
        save_verdicts("01_other", *first_chapter())
    assert not list(project.glob("_build/verdicts/*"))


# --- code that must fail ------------------------------------------------------------------------


def test_an_expected_error_is_shown(capsys):
    with fails(ZeroDivisionError, match="division"):
        _ = 1 / 0
    assert "ZeroDivisionError, as expected" in capsys.readouterr().out


def test_no_error_is_an_error():
    with (
        pytest.raises(AssertionError, match="no KeyError or ValueError came"),
        fails((KeyError, ValueError)),
    ):
        pass


def test_another_message_is_an_error():
    with pytest.raises(AssertionError, match="not found"), fails(ValueError, match="^too large$"):
        raise ValueError("too small")


def test_other_types_pass_through():
    with pytest.raises(KeyError), fails(ValueError):
        raise KeyError("x")
    with pytest.raises(KeyboardInterrupt), fails(Exception):
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["ValueError", int, BaseException, KeyboardInterrupt, ()])
def test_bad_kinds_are_refused(kind):
    with pytest.raises(ValueError, match="kind"), fails(kind):
        raise ValueError("never reached")


def test_a_bad_pattern_is_refused():
    with pytest.raises(ValueError, match="pattern"), fails(ValueError, match="("):
        raise ValueError("(")


def test_long_messages_are_cut_and_escaped(monkeypatch):
    from companion import failing

    shown = []
    monkeypatch.setattr(failing, "_show", shown.append)
    with fails(ValueError):
        raise ValueError("<b>" + "x" * 1000 + "\nsecond\nthird\nfourth")
    html = shown[0]._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;" in html
    assert "third" in html and "fourth" not in html and len(html) < 700

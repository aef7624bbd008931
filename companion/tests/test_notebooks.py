"""The stored notebooks pass the gate, and each of its rules can fail.

Whether notebooks run is checked by `make test` itself, which executes every one of them once with
nbval; here is the test of the guard behind that run.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from companion.tests.gate import ROOT, listed_pages, notebook_faults, stored_notebooks
from tools import executed

GOOD = {
    "cells": [
        {"cell_type": "markdown", "id": "title", "metadata": {}, "source": "# Title"},
        {
            "cell_type": "code",
            "id": "count-bytes",
            "metadata": {"tags": ["hide-input"]},
            "source": ["x = 5 % 2\n", "assert x != 0"],
            "outputs": [],
            "execution_count": None,
        },
    ],
    "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    "nbformat": 4,
    "nbformat_minor": 5,
}


def project(root: Path, notebook: dict, listed: str = "notebooks/01_sample") -> Path:
    """Write a project of one notebook below `root`; return the notebook's path."""
    (root / "_toc.yml").write_text(
        f"root: book/start\nparts:\n- chapters:\n  - file: {listed}\n", encoding="utf-8"
    )
    path = root / "notebooks" / "01_sample.ipynb"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", stored_notebooks(), ids=lambda path: path.stem)
def test_every_notebook_passes_the_gate(path: Path) -> None:
    assert notebook_faults(path) == []


def test_there_are_notebooks_and_every_page_exists() -> None:
    assert stored_notebooks()
    gone = [name for name in listed_pages() if not list(ROOT.glob(f"{name}.*"))]
    assert gone == []


def test_a_good_notebook_has_no_faults(tmp_path: Path) -> None:
    assert notebook_faults(project(tmp_path, GOOD), tmp_path) == []


def long_cell(cell: dict) -> None:
    cell["source"] = "x = 1\n" * 20 + "x"


BREAKING = {
    "holds outputs": lambda cell: cell.update(outputs=[{"output_type": "stream", "text": "1"}]),
    "holds an execution count": lambda cell: cell.update(execution_count=1),
    "is empty": lambda cell: cell.update(source=" \n"),
    "has 21 lines": long_cell,
    "calls a shell": lambda cell: cell.update(source="x = 1\n!pip list"),
    "cell 'count-bytes' calls a shell": lambda cell: cell.update(source="%pip install x"),
    "is no slug": lambda cell: cell.update(id="Count_Bytes"),
    "'0123' is no slug": lambda cell: cell.update(id="0123"),
    "used twice": lambda cell: cell.update(id="title"),
    "forgives failure: raises-exception": lambda cell: cell["metadata"].update(
        tags=["raises-exception"]
    ),
    "forgives failure: #NBVAL_SKIP": lambda cell: cell.update(source="#NBVAL_SKIP\nx = 1"),
    "forgives failure: skip-execution": lambda cell: cell["metadata"].update(
        tags=["skip-execution"]
    ),
}


@pytest.mark.parametrize("fault", BREAKING)
def test_each_rule_for_cells_can_fail(fault: str, tmp_path: Path) -> None:
    notebook = copy.deepcopy(GOOD)
    BREAKING[fault](notebook["cells"][1])
    found = notebook_faults(project(tmp_path, notebook), tmp_path)
    assert any(fault in sentence for sentence in found), found
    assert len(found) == 1


def test_each_rule_for_notebooks_can_fail(tmp_path: Path) -> None:
    notebook = copy.deepcopy(GOOD)
    notebook["metadata"] = {"kernelspec": {"name": "julia"}, "widgets": {}}
    found = notebook_faults(project(tmp_path, notebook, listed="notebooks/02_other"), tmp_path)
    assert found == [
        "it is not listed in _toc.yml",
        "its kernelspec is not python3",
        "it holds widget state",
    ]


def report(root: Path, *cases: str) -> Path:
    """Write a junit report with these test cases below `root`."""
    path = root / "report.xml"
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


def case(number: int, seconds: float, inside: str = "") -> str:
    name = "notebooks.01_sample.ipynb"
    return f'<testcase classname="{name}" name="Cell {number}" time="{seconds}">{inside}</testcase>'


def test_the_guard_passes_a_notebook_that_ran(tmp_path: Path) -> None:
    path = project(tmp_path, GOOD)
    assert executed.faults(report(tmp_path, case(0, 0.5)), [path], tmp_path) == []
    assert executed.faults(report(tmp_path, case(0, 0.5)), [path.parent], tmp_path) == []


@pytest.mark.parametrize(
    ("cases", "fault"),
    [
        ([], "0 of 1"),
        ([case(0, 0.5, "<skipped/>")], "0 of 1"),
        ([case(0, 0.5, "<failure/>")], "0 of 1"),
        ([case(0, 0.5), case(1, 0.5)], "2 of 1"),
        ([case(0, 0.0)], "took no time"),
    ],
)
def test_the_guard_finds_a_notebook_that_did_not_run(
    cases: list[str], fault: str, tmp_path: Path
) -> None:
    found = executed.faults(report(tmp_path, *cases), [project(tmp_path, GOOD).parent], tmp_path)
    assert len(found) == 1 and fault in found[0]


def test_the_guard_wants_notebooks(tmp_path: Path) -> None:
    assert "no notebook" in executed.faults(report(tmp_path), [tmp_path], tmp_path)[0]

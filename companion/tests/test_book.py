"""The book as its readers get it: it builds without a warning, and its pages work in a browser.

A small book with one of everything is built and looked at in every run. The pages of the course
itself are built without executing notebooks, unless `make book` has left a current build.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from companion.tests.gate import ROOT, listed_pages
from companion.tests.pages import LOOKS, browser_path, page_faults, served
from tools.book import build, html_folder, verdicts_of

SAMPLE = Path(__file__).parent / "data" / "book"
VENDORED = ROOT / "book" / "_static" / "vendor" / "pinned.txt"


def settings(**execute: object) -> str:
    """The course's _config.yml with absolute paths and other settings of execution."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    config["sphinx"]["local_extensions"] = {"course": str(ROOT / "book" / "_extensions")}
    config["html"]["favicon"] = str(ROOT / config["html"]["favicon"])
    config["execute"].update(execute)
    return yaml.safe_dump(config)


def sample_book(folder: Path, **pages: str) -> Path:
    """A copy of the sample book in `folder`, with the course's settings and these pages' text."""
    shutil.copytree(SAMPLE, folder)
    (folder / "_config.yml").write_text(settings(), encoding="utf-8")
    for name, text in pages.items():
        (folder / "book" / f"{name}.md").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HTML folder of the sample book, built with execution."""
    folder = sample_book(tmp_path_factory.mktemp("sample") / "project")
    verdicts_of(folder).mkdir(parents=True)
    (verdicts_of(folder) / "09_gone.json").write_text("{}")  # of an earlier build
    assert build(folder) == 0
    return html_folder(folder)


def current_build() -> Path | None:
    """The folder that `make book` left, unless a page has changed since or it failed."""
    finished = ROOT / "_build" / ".doctrees" / "environment.pickle"
    sources = [path for name in listed_pages() for path in ROOT.glob(f"{name}.*")]
    sources += [ROOT / "_config.yml", ROOT / "_toc.yml"]
    newest = max(path.stat().st_mtime for path in sources)
    current = finished.exists() and finished.stat().st_mtime > newest
    return html_folder(ROOT) if current else None


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HTML folder of the course: the current build, or one made without execution."""
    folder = tmp_path_factory.mktemp("course")
    config = folder / "_config.yml"
    config.write_text(settings(execute_notebooks="off"), encoding="utf-8")
    ready = current_build()
    if ready is None:
        assert build(ROOT, "--config", str(config), "--path-output", str(folder)) == 0
    return ready or html_folder(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """A headless Chromium; skips, saying why, where it or the vendored libraries are missing."""
    if browser_path() is None:
        pytest.skip("no Chromium or Chrome is installed, so no page was looked at")
    if not VENDORED.exists():
        pytest.skip("npm did not fetch the pages' libraries, so they load from outside")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        chromium = driver.chromium.launch(executable_path=browser_path(), args=options)
        yield chromium
        chromium.close()


def look_at(browser: object, folder: Path, names: list[str], look: str) -> dict[str, list[str]]:
    """{page: its faults} for the pages that have any."""
    context = browser.new_context(**LOOKS[look])
    with served(folder) as address:
        faults = {name: page_faults(context, address, f"{name}.html") for name in names}
    context.close()
    return {name: found for name, found in faults.items() if found}


@pytest.mark.parametrize("look", LOOKS)
def test_a_page_of_everything_works(browser: object, sample: Path, look: str) -> None:
    names = ["book/start", "notebooks/01_sample", "book/verdicts"]
    assert look_at(browser, sample, names, look) == {}


@pytest.mark.parametrize("look", LOOKS)
def test_every_page_of_the_course_works(browser: object, course: Path, look: str) -> None:
    assert look_at(browser, course, sorted(listed_pages()), look) == {}


def test_a_whole_build_has_just_the_verdicts_of_its_pages(sample: Path) -> None:
    store = verdicts_of(sample.parents[1])
    assert [path.name for path in store.iterdir()] == ["01_sample.json"]


def test_the_course_builds_without_a_warning(course: Path) -> None:
    missing = [name for name in listed_pages() if not (course / f"{name}.html").exists()]
    assert missing == []


def test_the_sample_shows_what_a_chapter_shows(sample: Path) -> None:
    page = (sample / "notebooks" / "01_sample.html").read_text(encoding="utf-8")
    shown = ["A line from one to three", "jupyter.widget-view+json", "<td>16 &#177; 0.2</td>"]
    assert [text for text in shown if text not in page] == []
    assert "this assert is hidden" not in page
    start = (sample / "book" / "start.html").read_text(encoding="utf-8")
    assert "accDescr: the weights go round" in start and "Williams" in start


def test_verdicts_are_read_after_the_chapters(sample: Path) -> None:
    page = (sample / "book" / "verdicts.html").read_text(encoding="utf-8")
    assert "left by the chapter" in page


def test_a_warning_fails_the_build_every_time(tmp_path: Path) -> None:
    folder = sample_book(tmp_path / "project", start="# Start\n\n[nowhere](missing.md)\n")
    (folder / "_toc.yml").write_text("format: jb-book\nroot: book/start\n", encoding="utf-8")
    assert [build(folder) != 0, build(folder) != 0] == [True, True]


def test_a_failing_cell_fails_the_build(tmp_path: Path) -> None:
    folder = sample_book(tmp_path / "project")
    path = folder / "notebooks" / "01_sample.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["id"] in ("title", "hidden")]
    notebook["cells"][1]["source"] = "assert 2 + 2 == 5"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert build(folder) != 0


BAD_PAGES = {
    "console: a complaint": "<script>console.error('a complaint')</script>",
    "a script failed": "<script>null.length</script>",
    "a request leaves the page": "<script src='http://elsewhere.invalid/x.js'></script>",
    "an image is missing": "<img src='gone.png' alt='a picture'>",
    "an image has no alternative text": "<img src='dot.svg'>",
    "alternative text": "<img src='dot.svg' alt='../_images/0f3a.png'>",
    "maths is not typeset": "<span class='math'>\\(x\\)</span>",
    "maths has an error": "<span class='math'><mjx-container><mjx-merror>?</mjx-merror></span>",
    "a diagram is not drawn": "<pre class='mermaid'>flowchart</pre>",
    "a diagram has an error": "<pre class='mermaid'><svg aria-roledescription='error'></pre>",
    "a diagram has no description": "<pre class='mermaid'><svg></svg></pre>",
    "widgets are missing": "<script type='application/vnd.jupyter.widget-view+json'>{}</script>",
    "px wider than the screen": "<div style='width: 3000px'>wide</div>",
    "text is hard to read": "<article class='bd-article'><p style='color: #ccc'>pale</p></article>",
}
DOT = "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"


@pytest.fixture(scope="module")
def bad_context(browser: object) -> Iterator[object]:
    context = browser.new_context(**LOOKS["light"])
    yield context
    context.close()


@pytest.mark.parametrize("fault", [None, *BAD_PAGES])
def test_each_fault_is_found(bad_context: object, fault: str | None, tmp_path: Path) -> None:
    page = f"<!doctype html><link rel=icon href=dot.svg><p>Fine</p>{BAD_PAGES.get(fault, '')}"
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    (tmp_path / "dot.svg").write_text(DOT, encoding="utf-8")
    with served(tmp_path) as address:
        found = page_faults(bad_context, address, "page.html", patience=2_000)
    assert any(fault in sentence for sentence in found) if fault else found == [], found


def test_the_order_of_reading() -> None:
    path = ROOT / "book" / "_extensions" / "course.py"
    spec = importlib.util.spec_from_file_location("course", path)
    course = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(course)
    env = SimpleNamespace(found_docs={"book/verdicts", "book/errata", "notebooks/01_a"})
    last = ["book/verdicts", "book/errata"]

    def ordered(*names: str) -> list[str]:
        docnames = list(names)
        course.read_last(None, env, docnames)
        return docnames

    assert ordered("book/verdicts", "notebooks/01_a") == ["notebooks/01_a", *last]
    assert ordered("notebooks/01_a") == ["notebooks/01_a", *last]
    assert ordered("book/errata", "book/start") == ["book/start", "book/errata"]
    assert ordered("book/start") == ["book/start"]

"""What the book needs of Sphinx beyond settings, in five handlers.

1. Pages load MathJax, Mermaid and the widget manager from `book/_static/vendor` when
   `tools/assets.py` has put them there, so that the book reads without a network.
2. A change in `companion/` executes every notebook again; Sphinx alone would look at pages only.
3. The pages of all verdicts and all errata are read after the chapters that they tell of. Sphinx
   reads pages by name, and "book/..." sorts before "notebooks/...".
4. The `:alt:` of a diagram reaches the picture, for readers who listen to the page.
5. Thebe, which Jupyter Book loads unasked and twice, is taken off every page.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinxcontrib.mermaid import mermaid

STATIC = Path(__file__).resolve().parents[1] / "_static"
READ_LAST = ("book/verdicts", "book/errata")
CHAPTERS = "notebooks/"


def use_local_libraries(app: Sphinx, config: Config) -> None:
    """Point the extensions at the vendored libraries, where they are complete."""
    config.html_static_path.append(str(STATIC))
    hide_loader = {"after-widgets.js": {}}
    if not (STATIC / "vendor" / "pinned.txt").exists():
        app.add_js_file("course.js", priority=1)
        config.nb_ipywidgets_js = {**config.nb_ipywidgets_js, **hide_loader}
        return
    app.add_js_file("course.js", priority=1, **{"data-widgets": "vendor/widgets/dist/"})
    config.mathjax_path = "vendor/mathjax/es5/tex-mml-chtml.js"
    config.mermaid_use_local = "vendor/mermaid/dist/mermaid.esm.min.mjs"
    config.nb_ipywidgets_js = {
        "vendor/requirejs/require.js": {},
        "vendor/widgets/dist/embed-amd.js": {},
        **hide_loader,
    }


def note_package(app: Sphinx, config: Config) -> None:
    """Keep a hash of the package in the configuration: when it changes, all pages are read."""
    digest = hashlib.sha256()
    package = Path(app.srcdir) / "companion"
    for path in sorted(package.rglob("*")):
        if path.is_file() and "tests" not in path.parts and "__pycache__" not in path.parts:
            digest.update(path.relative_to(package).as_posix().encode())
            digest.update(path.read_bytes())
    config.course_package = digest.hexdigest()


def read_last(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Move the pages of verdicts and errata to the end; add them when a chapter is read anew."""
    chapters = any(name.startswith(CHAPTERS) for name in docnames)
    last = [name for name in READ_LAST if name in docnames or (chapters and name in env.found_docs)]
    docnames[:] = [name for name in docnames if name not in last] + last


def describe_diagrams(app: Sphinx, doctree: nodes.document) -> None:
    """Write a diagram's `:alt:` into its source, below the line that names its kind."""
    for diagram in doctree.findall(mermaid):
        if diagram.get("alt") and "accDescr" not in diagram["code"]:
            kind, *rest = diagram["code"].strip().splitlines()
            alt = " ".join(diagram["alt"].split())
            diagram["code"] = "\n".join([kind, f"    accDescr: {alt}", *rest])


def drop_thebe(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Leave the scripts of Thebe (live kernels from a public service) out of a page."""

    def mentions(script: object) -> bool:
        body = getattr(script, "attributes", {}).get("body") or ""
        return "thebe" in f"{getattr(script, 'filename', script)}{body}".lower()

    context["script_files"] = [one for one in context["script_files"] if not mentions(one)]


def setup(app: Sphinx) -> dict[str, object]:
    """Called by Sphinx."""
    app.add_config_value("course_package", "", "env")
    app.connect("config-inited", use_local_libraries, priority=100)
    app.connect("config-inited", note_package, priority=100)
    app.connect("env-before-read-docs", read_last)
    app.connect("doctree-read", describe_diagrams)
    app.connect("html-page-context", drop_thebe, priority=990)
    app.add_css_file("course.css")
    return {"parallel_read_safe": False, "parallel_write_safe": True}

"""Build the book and say where to open it.

    .venv/bin/python tools/book.py

Executes every notebook and fails on a failing cell or any Sphinx warning. Pages whose source did
not change since the last good build are kept; after a failure nothing is, since Sphinx would
otherwise forget the warnings of pages that it does not read again.

Verdicts of this build are kept apart from those that JupyterLab and the tests leave, and emptied
when every page is read anew: the page of all verdicts shows the numbers of the pages beside it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from companion.collecting import FOLDER, load_verdicts
from tools import assets

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "from jupyter_book.cli.main import main; main()"


def html_folder(folder):
    """Where Jupyter Book puts the pages, for its output folder `folder`."""
    return folder / "_build" / "html"


def build(root, *options):
    """Run Jupyter Book on the project in `root`; return its exit code."""
    command = [sys.executable, "-c", COMMAND, "build", str(root), "-W", "--keep-going", *options]
    read = root / "_build" / ".doctrees" / "environment.pickle"
    if not read.exists():
        shutil.rmtree(verdicts_of(root), ignore_errors=True)
    environment = os.environ | {FOLDER: str(verdicts_of(root))}
    code = subprocess.run(command, cwd=str(root), env=environment).returncode
    if code:
        read.unlink(missing_ok=True)
    return code


def verdicts_of(root):
    """Where the pages of this build leave their verdicts."""
    return root / "_build" / "book_verdicts"


def main():
    """Fetch the JavaScript libraries where possible, build, report."""
    assets.ensure()
    print("==> executing the notebooks and building the book (minutes)", flush=True)
    if build(ROOT):
        sys.exit("\nthe book did not build: look for WARNING or ERROR above")
    os.environ[FOLDER] = str(verdicts_of(ROOT))
    if missing := load_verdicts().left_out:
        sys.exit("\nthe page of all verdicts is incomplete: " + "; ".join(missing))
    print(f"\nThe book is ready. Open {html_folder(ROOT) / 'index.html'}")


if __name__ == "__main__":
    main()

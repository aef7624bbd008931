"""Build the book and say where to open it.

    .venv/bin/python tools/book.py

Executes every notebook and fails on a failing cell or any Sphinx warning. Pages whose source did
not change since the last good build are kept; after a failure nothing is, since Sphinx would
otherwise forget the warnings of pages that it does not read again.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import assets

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "from jupyter_book.cli.main import main; main()"


def html_folder(folder):
    """Where Jupyter Book puts the pages, for its output folder `folder`."""
    return folder / "_build" / "html"


def build(root, *options):
    """Run Jupyter Book on the project in `root`; return its exit code."""
    command = [sys.executable, "-c", COMMAND, "build", str(root), "-W", "--keep-going", *options]
    code = subprocess.run(command, cwd=str(root)).returncode
    if code:
        (root / "_build" / ".doctrees" / "environment.pickle").unlink(missing_ok=True)
    return code


def main():
    """Fetch the JavaScript libraries where possible, build, report."""
    assets.ensure()
    print("==> executing the notebooks and building the book (minutes)", flush=True)
    if build(ROOT):
        sys.exit("\nthe book did not build: look for WARNING or ERROR above")
    print(f"\nThe book is ready. Open {html_folder(ROOT) / 'index.html'}")


if __name__ == "__main__":
    main()

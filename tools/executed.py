"""Check that a test run really executed the notebooks: every code cell of each, taking time.

    python tools/executed.py REPORT.xml NOTEBOOK_OR_FOLDER ...

REPORT.xml is what `pytest --nbval-lax --junitxml` wrote. A notebook whose page "ran in no time"
has shown nothing; this is the guard against a collection that silently came to nothing.
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def notebooks_in(paths):
    """All .ipynb files that `paths` (files or folders) name, sorted."""
    found = []
    for path in map(Path, paths):
        found += sorted(path.rglob("*.ipynb")) if path.is_dir() else [path]
    return [path for path in found if ".ipynb_checkpoints" not in path.parts]


def code_cells(path):
    """How many code cells the notebook at `path` has."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return sum(cell["cell_type"] == "code" for cell in cells)


def executed_cells(report):
    """{notebook's dotted name: seconds of each cell that passed} from a junit report."""
    seconds = {}
    for case in ElementTree.parse(report).iter("testcase"):
        passed = not any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))
        if passed:
            seconds.setdefault(case.get("classname"), []).append(float(case.get("time")))
    return seconds


def faults(report, paths, root=Path()):
    """One sentence for each notebook that was not executed whole; none when all is well."""
    notebooks = notebooks_in(paths)
    if not notebooks:
        return [f"there is no notebook in {', '.join(map(str, paths))}"]
    seconds = executed_cells(report)
    found = []
    for path in notebooks:
        name = ".".join(path.resolve().relative_to(root.resolve()).parts)
        done, cells = seconds.get(name, []), code_cells(path)
        if not cells or len(done) != cells:
            found.append(f"{path}: {len(done)} of {cells} code cells were executed")
        elif sum(done) <= 0:
            found.append(f"{path}: its {cells} code cells took no time")
    return found


if __name__ == "__main__":
    problems = faults(sys.argv[1], sys.argv[2:])
    if problems:
        sys.exit("\n".join(problems))
    for name, times in sorted(executed_cells(sys.argv[1]).items()):
        print(f"{name}: {len(times)} code cells executed in {sum(times):.0f} s")

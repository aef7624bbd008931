"""Imports in `companion` point down or sideways, never up; one technique imports no other.

The table below is the package's architecture. A module that is missing from it fails the test, so
that adding one forces a decision about where it stands.
"""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import companion

PACKAGE = Path(companion.__file__).parent

LAYERS = {
    0: """checks storage intervals model tokenization data losses surgery
          memory kept fingerprint failing style disk""",
    1: """gguf_file smollm2 pretrained training optimizers pretraining decoding baselines
          calibration curvature acceptance quality cost roofline catalogue shapes hardware rounds
          timing calls pruning quantization precision sharing schedules accumulation recomputation
          step_memory stopping token_losses sliced_attention backward_passes faster_training
          fastest_training onednn_products
          memory_mapped mlp_variants dropout compiling""",
    2: """measurement report claims errata cases judging collecting verdict_tables verdicts
          errata_pages distillation parallel studies""",
    3: "plots maps timelines",
    4: "explorers check bench",
}
TECHNIQUES = {"quantization", "pruning", "sharing", "precision", "distillation"}
# The packages among them stand here as one name: companion/studies/*.py is `studies`.
TABLE = {name: layer for layer, names in LAYERS.items() for name in names.split()}


def modules_of(package: Path) -> dict[str, list[Path]]:
    """{name right below the package: its files}, tests and the package's own __init__ left out."""
    found: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).with_suffix("").parts[0]
        if name not in ("tests", "__init__", "__main__"):
            found.setdefault(name, []).append(path)
    return found


def imports_of(path: Path, package: Path) -> set[str]:
    """Names right below the package that the file at `path` imports, inside functions too."""
    inside = (package.name, *path.relative_to(package).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(inside[: len(inside) - node.level + 1]) + "." if node.level else ""
            base = (above + (node.module or "")).strip(".")
            targets = [f"{base}.{alias.name}" for alias in node.names]
        parts = [target.split(".") for target in targets]
        found |= {names[1] for names in parts if names[0] == package.name and len(names) > 1}
    return found


def graph_of(package: Path) -> dict[str, set[str]]:
    """{module: modules of the package that it imports}, itself left out."""
    return {
        name: set().union(*(imports_of(path, package) for path in files)) - {name}
        for name, files in modules_of(package).items()
    }


def faults(package: Path, table: dict[str, int], techniques: set[str]) -> list[str]:
    """One sentence for each import that the architecture forbids."""
    graph = graph_of(package)
    unplaced, gone = graph.keys() - table.keys(), table.keys() - graph.keys()
    found = [f"{name} is not in the table of layers" for name in sorted(unplaced)]
    found += [f"{name} is in the table and not in the package" for name in sorted(gone)]
    for name, imported in sorted(graph.items()):
        for other in sorted(imported):
            if other not in graph:
                found.append(f"{name} imports {other}, which is no module")
            elif {name, other} <= table.keys() and table[other] > table[name]:
                found.append(f"{name} (layer {table[name]}) imports {other} (layer {table[other]})")
            elif {name, other} <= techniques:
                found.append(f"{name} imports {other}: one technique imports no other")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as cycle:
        found.append("imports go round: " + " -> ".join(cycle.args[1]))
    return found


def test_the_package_keeps_its_layers() -> None:
    assert faults(PACKAGE, TABLE, TECHNIQUES) == []


def test_the_architecture_page_shows_the_same_table() -> None:
    page = (PACKAGE.parent / "book" / "architecture.md").read_text(encoding="utf-8")
    shown, layer = {}, 0
    for number, names in re.findall(r"^\| (\d?) ?\| (`[^|]*) \|", page, re.MULTILINE):
        layer = int(number or layer)
        shown |= dict.fromkeys(re.findall(r"`(\w+)`", names), layer)
    assert shown == TABLE


def test_importing_the_package_imports_no_module() -> None:
    assert imports_of(PACKAGE / "__init__.py", PACKAGE) == set()


def write(root: Path, files: dict[str, str]) -> Path:
    """Write a package of these files below `root`."""
    for name, text in files.items():
        path = root / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "pkg"


GOOD = {
    "__init__.py": "",
    "low.py": "import math",
    "high.py": "from pkg import low\nfrom pkg.low import pi",
    "prune.py": "import pkg.low",
    "quantize.py": "def f():\n    from .low import pi",
    "studies/__init__.py": "",
    "studies/size.py": "from ..low import pi\nfrom . import other\nfrom .other import x",
    "studies/other.py": "x = 1",
    "tests/test_low.py": "from pkg import anything",
}
GOOD_TABLE = {"low": 0, "high": 1, "prune": 1, "quantize": 1, "studies": 2}
GOOD_TECHNIQUES = {"prune", "quantize"}


def test_a_good_package_has_no_faults(tmp_path: Path) -> None:
    package = write(tmp_path, GOOD)
    assert faults(package, GOOD_TABLE, GOOD_TECHNIQUES) == []
    assert graph_of(package)["studies"] == {"low"}


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("low.py", "from pkg.high import x", "low (layer 0) imports high (layer 1)"),
        ("low.py", "def f():\n    import pkg.high", "low (layer 0) imports high (layer 1)"),
        ("prune.py", "from pkg import quantize", "one technique imports no other"),
        ("studies/other.py", "from ..explorers import x", "imports explorers, which is no module"),
        ("high.py", "from . import prune", None),
        ("new.py", "", "new is not in the table of layers"),
    ],
)
def test_each_rule_can_fail(name: str, text: str, fault: str | None, tmp_path: Path) -> None:
    found = faults(write(tmp_path, GOOD | {name: text}), GOOD_TABLE, GOOD_TECHNIQUES)
    assert (fault is None and found == []) or any(fault in one for one in found)


def test_a_cycle_is_found(tmp_path: Path) -> None:
    package = write(tmp_path, GOOD | {"high.py": "import pkg.prune", "prune.py": "import pkg.high"})
    assert any(one.startswith("imports go round") for one in faults(package, GOOD_TABLE, set()))


def test_a_name_without_a_module_is_found(tmp_path: Path) -> None:
    found = faults(write(tmp_path, GOOD), GOOD_TABLE | {"gone": 0}, GOOD_TECHNIQUES)
    assert found == ["gone is in the table and not in the package"]

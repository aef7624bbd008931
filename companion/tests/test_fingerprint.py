"""The fingerprint changes with what code does, wherever it reaches, and with nothing else."""

import sys

import pytest

from companion.fingerprint import code_fingerprint, source_fingerprint

BASE = '''
"""A module."""
import math
from helpers import scale as enlarge

LIMIT: int = 3
UNUSED = 1


def point(seed: int) -> float:
    """Measure."""
    require(seed > 0, f"seed is {seed}")
    if seed > 100:
        raise ValueError("too large")
    return enlarge(seed) + LIMIT + late()  # a comment


def late():
    from helpers import offset

    return offset() * math.pi


def unrelated():
    return 1
'''
HELPERS = """
FACTOR = 2


def scale(x):
    return FACTOR * x


def offset():
    return 5


def unrelated():
    return 2
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write two modules of a package of their own and take the fingerprint of its `point`."""
    folder = tmp_path / "measured_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)

    def taken(base: str = BASE, helpers: str = HELPERS) -> str:
        base = base.replace("from helpers", "from measured_package.helpers")
        (folder / "base.py").write_text(base)
        (folder / "helpers.py").write_text(helpers)
        return code_fingerprint("measured_package.base:point")

    yield taken
    for name in [name for name in sys.modules if name.startswith("measured_package")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# a comment", "# another one"),
        ('"""Measure."""', '"""Take the measure of it."""'),
        ('    """Measure."""\n', ""),
        ('"""A module."""', ""),
        ("seed: int) -> float", "seed)"),
        ("LIMIT: int = 3", "LIMIT: float = 3"),
        ('require(seed > 0, f"seed is {seed}")', 'require(seed > 1, "no")'),
        ('"too large"', '"far too large"'),
        ("enlarge(seed) + LIMIT + late()", "(enlarge(seed)\n        + LIMIT + late())"),
        ("UNUSED = 1", "UNUSED = 2"),
        ("return 1", "return 7"),
    ],
)
def test_what_leaves_results_alone_does_not_count(package, old, new):
    assert old in BASE
    assert package(BASE.replace(old, new)) == package()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("+ LIMIT", "- LIMIT"),
        ("LIMIT: int = 3", "LIMIT: int = 4"),
        ("math.pi", "math.e"),
        ("scale as enlarge", "offset as enlarge"),
        ("seed > 100", "seed > 101"),
        ("import offset\n\n    return offset()", "import scale\n\n    return scale(1)"),
    ],
)
def test_what_the_point_does_counts(package, old, new):
    assert old in BASE
    assert package(BASE.replace(old, new)) != package()


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("FACTOR = 2", "FACTOR = 3", True),
        ("return 5", "return 6", True),
        ("return 2", "return 9", False),
    ],
)
def test_other_modules_count_where_they_are_reached(package, old, new, counts):
    assert old in HELPERS
    assert (package(helpers=HELPERS.replace(old, new)) != package()) == counts


def test_a_whole_imported_module_counts(package):
    text = "from measured_package import helpers\n\n\ndef point():\n    return helpers.scale(1)\n"
    assert package(text) != package(text, HELPERS.replace("return 2", "return 9"))


def test_dotted_imports_are_followed(package):
    text = (
        "import measured_package.helpers\n\n\ndef point():\n    return measured_package.helpers\n"
    )
    assert package(text) != package(text, HELPERS.replace("return 5", "return 9"))


def test_methods_and_defaults_count(package):
    text = "class Model:\n    def size(self, width=2):\n        return width\n\n\n"
    text += "def point():\n    return Model()\n"
    assert package(text) != package(text.replace("width=2", "width=3"))
    assert package(text) != package(text.replace("return width", "return -width"))


def test_data_files_count(tmp_path):
    file = tmp_path / "data"
    prints = set()
    for content in (b"1", b"2"):
        file.write_bytes(content)
        prints.add(code_fingerprint("companion.checks:require", files=[file]))
    assert len(prints) == 2


def test_the_text_of_a_notebook_counts_with_what_it_reaches():
    text = "from companion.checks import require\nrequire(True, 'x')\ny = 1\n"
    assert source_fingerprint(text) == source_fingerprint(text + "# a comment\n")
    assert source_fingerprint(text) != source_fingerprint(text.replace("y = 1", "y = 2"))
    assert source_fingerprint(text) != source_fingerprint(
        text.replace("require(True", "print(True")
    )
    with pytest.raises(AttributeError, match="nothing"):
        source_fingerprint("from companion.checks import nothing\n")


def test_other_libraries_are_not_followed():
    assert source_fingerprint("import no_such_library\nfrom no_such_library import x\n")


def test_bad_places_are_refused():
    with pytest.raises(ValueError, match="module:name"):
        code_fingerprint("companion.checks")
    with pytest.raises(ModuleNotFoundError):
        code_fingerprint("companion.nothing:require")
    with pytest.raises(AttributeError, match="nothing"):
        code_fingerprint("companion.checks:nothing")
    with pytest.raises(FileNotFoundError):
        code_fingerprint("companion.checks:require", files=["no such file"])


def test_python_versions_agree():
    """Recorded with Python 3.11: another version must not call every record stale."""
    text = "def f(x, *, y=None):\n    return [a for a in x] if y else {**x, 'k': f'{y!r:>{x}}'}\n"
    assert source_fingerprint(text) == "3b577ae868ef6040"


def test_a_function_may_move_to_another_module(package):
    point = "def point():\n    return double(1)\n\n\n"
    double = "def double(x):\n    return 2 * x\n"
    moved = "from helpers import double\n\n\n" + point
    assert package(moved, double) == package(point + double, "")
    assert package(moved, double) != package(moved, double.replace("2", "3"))
    renamed = "from helpers import twice as double\n\n\n" + point
    assert package(renamed, double.replace("double", "twice")) != package(moved, double)


def test_a_variable_of_a_comprehension_is_no_name_of_its_module(package):
    text = BASE + "\nTABLE = {seed: seed * 2 for seed in range(3)}\n"
    assert package(text) == package(text.replace("seed * 2", "seed * 3"))

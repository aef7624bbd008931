"""Hash what code does, so that a recorded result can tell whether its code has changed since.

From one function the hash follows every name it uses: through its module, and through imports into
the other modules of this package. What does not change a result does not count: comments,
docstrings, layout, type annotations, input checks, the words of errors, and in which module a
function stands. Other libraries are not followed; their versions stand on the machine card.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

from companion.checks import require

FOLLOWED = "companion"  # the package whose modules are followed
Place = tuple[str, str]  # a module's dotted name, and a name at its top level ("*" for all)


def code_fingerprint(*places: str, files: Iterable[str | Path] = ()) -> str:
    """16 hexadecimal digits for the code at each "module:name", all it reaches, and data files.

    Raises ValueError for a place that is not "module:name", ModuleNotFoundError and
    FileNotFoundError for what does not exist, AttributeError for a name its module lacks.
    """
    for place in places:
        require(place.count(":") == 1, f"the place is {place!r}; it must be 'module:name'")
    starts = [tuple(place.split(":")) for place in places]
    found = _reach(starts, {FOLLOWED, *(module.split(".")[0] for module, _ in starts)})
    return digest([found, [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]])


def source_fingerprint(source: str) -> str:
    """The same for the text of a program, such as the cells of a notebook: all of it counts.

    Raises SyntaxError if it is no Python.
    """
    tree = _Essence().visit(ast.parse(source))
    return digest([_shape(tree), _reach(list(_imported(tree)), {FOLLOWED})])


def digest(value: object) -> str:
    """16 hexadecimal digits of the SHA-256 of `repr(value)`."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _reach(places: list[Place], packages: set[str]) -> list[tuple[str, str]]:
    """Every name in `packages` reached from `places`, sorted, each with the shape of its code.

    Modules are left out, so that a function may move from one to another.
    """
    modules: dict[str, _Module] = {}
    found: dict[Place, object] = {}
    while places:
        place = module, name = places.pop()
        if place in found or module.split(".")[0] not in packages:
            continue
        if module not in modules:
            modules[module] = _Module(module, packages)
        found[place], further = modules[module].look_up(name)
        places += further
    return sorted({(name, repr(shape)) for (_, name), shape in found.items() if shape != []})


class _Module:
    """The statements of one module, by the names they bind at its top level."""

    def __init__(self, name: str, packages: set[str]) -> None:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"there is no module {name}", name=name)
        self.name, self.packages = name, packages
        self.statements: dict[str, list[ast.stmt]] = {}
        self.imports: dict[str, list[Place]] = {}
        tree = _Essence().visit(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
        for statement in tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                for alias, place in zip(statement.names, _imported(statement), strict=True):
                    bound = alias.asname or alias.name.split(".")[0]
                    self.imports.setdefault(bound, []).append(place)
            for bound in _bound(statement):
                self.statements.setdefault(bound, []).append(statement)

    def look_up(self, name: str) -> tuple[object, list[Place]]:
        """The shape of the code behind a name, and the places that this code uses."""
        if name == "*":
            return "all", [(self.name, each) for each in (*self.statements, *self.imports)]
        if name in self.imports:
            return self._brought(name), self.imports[name]
        if name in self.statements:
            statements = self.statements[name]
            return _shape(statements), [place for each in statements for place in self._used(each)]
        return "all", [(_submodule(self.name, name), "*")]  # `from package import module`

    def _brought(self, name: str) -> list[Place]:
        """What an import gives this name: nothing new, if it is code of ours by the same name."""
        inside = [place[0].split(".")[0] in self.packages for place in self.imports[name]]
        pairs = zip(self.imports[name], inside, strict=True)
        shown = [("", place[1]) if own and place[1] != "*" else place for place, own in pairs]
        return [place for place in shown if place != ("", name)]

    def _used(self, statement: ast.stmt) -> Iterator[Place]:
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        yield from ((self.name, name) for name in names & (self.statements.keys() | self.imports))
        yield from _imported(statement)  # imports within a function


def _imported(tree: ast.AST) -> Iterator[Place]:
    """Places that import statements within `tree` name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "*") for alias in node.names)


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a statement at the top level of a module defines, imports aside."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    inner = [node.target for node in ast.walk(statement) if isinstance(node, ast.comprehension)]
    own = {id(name) for target in inner for name in ast.walk(target)}  # gone when it is done
    nodes = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return {n.id for n in nodes if isinstance(n.ctx, ast.Store) and id(n) not in own}


def _submodule(package: str, name: str) -> str:
    full = f"{package}.{name}"
    try:
        found = importlib.util.find_spec(full) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise AttributeError(f"module {package} has no {name!r}")
    return full


class _Essence(ast.NodeTransformer):
    """Take out of a syntax tree what leaves results as they are."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """Docstrings go, and calls that check input."""
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        called = node.value.func if isinstance(node.value, ast.Call) else None
        check = isinstance(called, ast.Name) and called.id.startswith("require")
        return None if text or check else self.generic_visit(node)

    def visit_Pass(self, node: ast.Pass) -> None:
        return None  # so that a body with and one without a docstring are alike

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        """Python 3.12 ends some formats with an empty text, which others leave out."""
        empty = [isinstance(part, ast.Constant) and part.value == "" for part in node.values]
        node.values = [part for part, no in zip(node.values, empty, strict=True) if not no]
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        return ast.Raise()

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = None
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)


def _shape(node: object) -> object:
    """A syntax tree as nested lists; without its empty fields, alike in every Python version."""
    if isinstance(node, list):
        return [_shape(each) for each in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in ("ctx", "kind")]
    kept = [(name, _shape(value)) for name, value in fields if value is not None and value != []]
    return [type(node).__name__, *kept]

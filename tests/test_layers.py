"""Imports go down only: proved on the syntax tree of every file, by the tables below."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "neo_components"

# The rooms from the bottom up. A room may import the rooms below it and nothing else of the package.
LAYERS: tuple[set[str], ...] = (
    {"token_indices", "errors", "discovery"},
    {"types"},
    {"registry"},
    {"storage"},
    {"llms", "data", "devices"},
    {"components"},
    {"evaluation", "viewers"},
    {"model"},
    {"estimate", "export"},
    {"recipe"},
    {"training"},
    {"__init__"},
    {"quickstart", "inspection", "pretrained"},
    {"cli"},
)
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}

OUTSIDE = {"tests", "benchmarks", "recipes", "conftest"}
HEAVY = {"transformers", "tensorboard", "webdataset", "matplotlib", "pyarrow", "av", "peft"}
# What transformers itself loads, from an exported folder; nothing of the library does.
FOR_TRANSFORMERS = {f"{PACKAGE}.export.hf.{name}_neo" for name in ("configuration", "modeling", "processing")}


def module_name(file: Path, root: Path = ROOT) -> str:
    """``neo_components/a/b.py`` -> ``neo_components.a.b``; a folder's ``__init__.py`` -> ``neo_components.a``."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imports(source: str, module: str, is_folder: bool, known: set[str]) -> Iterator[str]:
    """Dotted names of all modules that ``source`` imports, wherever it does: at the top, in functions, for types only.

    ``from package import name`` counts as ``package.name`` if that is a module, otherwise as ``package``. Names like
    ``__version__`` belong to the package as such, which is loaded before any of its modules: they count as nothing.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name != PACKAGE or alias.asname)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == PACKAGE:
            yield from resolve(PACKAGE, node.attr, known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                package = parts[: len(parts) - node.level + is_folder]
                base = ".".join([*package, *filter(None, [node.module])])
            for alias in node.names:
                yield from resolve(base, alias.name, known)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def resolve(base: str, name: str, known: set[str]) -> Iterator[str]:
    """The module that ``name`` of ``base`` is or comes from."""
    if not name.startswith("__"):
        yield f"{base}.{name}" if f"{base}.{name}" in known else base


def row(module: str) -> str:
    """The room that a module of the package lies in."""
    return [*module.split("."), "__init__"][1]


def allowed(name: str) -> set[str]:
    """What the modules of entry ``name`` may import of the package."""
    return set().union(*LAYERS[: HEIGHT[name]]) | {name}


def faults(module: str, imported: str) -> str | None:
    """Why ``module`` may not import ``imported``; ``None`` if it may."""
    if imported.split(".")[0] in OUTSIDE:
        return f"{module} imports {imported}, which is no part of the package"
    if imported.split(".")[0] != PACKAGE:
        return None
    if row(imported) not in allowed(row(module)):
        return f"{module} imports {imported}: {row(module)} may import {sorted(allowed(row(module)))}"
    return None


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module: str) -> None:
    is_folder = FILES[module].name == "__init__.py"
    found = imports(FILES[module].read_text(), module, is_folder, set(FILES))
    assert [fault for imported in found if (fault := faults(module, imported))] == []


def test_tables_name_what_is_there() -> None:
    """A new room needs a place in the table, a removed one leaves it."""
    assert set().union(*LAYERS) == {row(module) for module in FILES}


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("neo_components.types", "from neo_components import NEO", "neo_components"),
        ("neo_components.types", "import neo_components\nneo_components.NEO", "neo_components"),
        ("neo_components.types", "import neo_components as neo", "neo_components"),
        ("neo_components.types", "import neo_components.model.neo", "neo_components.model.neo"),
        ("neo_components.recipe.load", "from neo_components.training import run", "neo_components.training"),
        ("neo_components.types", "from neo_components import model", "neo_components.model"),
        ("neo_components.model.neo", "def f():\n    import neo_components.cli", "neo_components.cli"),
        ("neo_components.model.neo", "if TYPE_CHECKING:\n    from neo_components.cli import app", "neo_components.cli"),
        ("neo_components.model.neo", "from .. import cli", "neo_components.cli"),
        ("neo_components.model.neo", "importlib.import_module('neo_components.cli')", "neo_components.cli"),
        ("neo_components.model.neo", "from tests.conftest import data_folder", "tests.conftest"),
        ("neo_components.data.image.images", "from ...model import NEO", "neo_components.model"),
        (
            "neo_components.data.image.images",
            "from neo_components.components import masks",
            "neo_components.components.masks",
        ),
    ],
)
def test_forbidden_imports_are_found(module: str, source: str, expected: str) -> None:
    known = {"neo_components.model", "neo_components.cli", "neo_components.components.masks"}
    assert list(imports(source, module, False, known)) == [expected]
    assert faults(module, expected)


def test_no_module_imports_itself_round_a_circle() -> None:
    """Depth-first over all imports of the package; a module that is met again on its own path closes a circle."""
    graph = {
        module: {name for name in imports(file.read_text(), module, file.name == "__init__.py", set(FILES))}
        & FILES.keys() - {module}
        for module, file in FILES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_version_is_free_to_read() -> None:
    source = "import neo_components\nneo_components.__version__\nfrom neo_components import __version__"
    assert list(imports(source, "neo_components.model", False, set())) == []


def test_relative_imports_of_a_folder() -> None:
    known = {"neo_components.data.image.images", "neo_components.types"}
    source = "from .image.images import load_image\nfrom .image import images\n"
    source += "from ..types import Sample\nfrom .. import types"
    assert list(imports(source, "neo_components.data", True, known)) == [
        "neo_components.data.image.images",
        "neo_components.data.image.images",
        "neo_components.types",
        "neo_components.types",
    ]


def imports_at_load(tree: ast.AST) -> Iterator[str]:
    """First parts of the names that loading a file imports: not those inside functions or under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).split(".")[0]
        yield from imports_at_load(node)


@pytest.mark.parametrize("module", FILES)
def test_heavy_libraries_load_where_they_are_used(module: str) -> None:
    own = {"transformers"} if module in FOR_TRANSFORMERS else set()
    assert HEAVY.intersection(imports_at_load(ast.parse(FILES[module].read_text()))) == own


def test_nothing_loads_what_transformers_loads() -> None:
    for module, file in FILES.items():
        if module not in FOR_TRANSFORMERS:
            found = set(imports(file.read_text(), module, file.name == "__init__.py", set(FILES)))
            assert not found & FOR_TRANSFORMERS, module


def run_python(code: str) -> list[str]:
    """Words of the last line that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def test_import_is_light() -> None:
    loaded = run_python("import sys, neo_components; print('loaded', *sys.modules)")
    assert PACKAGE in loaded
    assert HEAVY.intersection(loaded) == set()


@pytest.mark.parametrize(
    "command",
    [
        "",
        "quickstart",
        "train",
        "evaluate",
        "chat",
        "export",
        "attach",
        "convert",
        "data",
        "inspect",
        "recipes",
        "pretrained list",
    ],
)
def test_help_does_not_load_torch(command: str) -> None:
    arguments = ["neo", *command.split(), "--help"]
    loaded = run_python(
        f"""
import sys
from neo_components.cli.main import main
sys.argv = {arguments}
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("loaded", *sys.modules)
"""
    )
    assert f"{PACKAGE}.cli" in loaded
    assert {"torch", "lightning", *HEAVY}.intersection(loaded) == set()

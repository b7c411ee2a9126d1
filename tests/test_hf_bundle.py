"""The code of an exported folder: which files are copied, and how their imports change."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from neo_components.export.hf.bundle import bundle
from neo_components.export.hf.folder import ROOTS
from neo_components.registry import BRIDGES, EXPERTS, MASKS, PATCH_EMBEDDINGS, ROPES

ROOT = '''"""The root."""

from __future__ import annotations

import json

from neo_components.one import (
    Kept,
    helper,
)

if TYPE_CHECKING:
    from neo_components.deep.two import Kind


def use() -> Kind:
    """As in ``from neo_components.absent import this``."""
    from neo_components.deep.two import late as later

    return later(Kept(), helper)
'''
ONE = '''"""One."""

from neo_components.components.component import Component
from neo_components.root import use


class Kept(Component): ...


helper = use
'''
TWO = "Kind = int\n\n\ndef late(*args):\n    return args\n"
COMPONENT = "class Component: ...\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name with these modules, in place of the library."""
    folder = tmp_path / "neo_components"
    modules = {"root": ROOT, "one": ONE, "deep/two": TWO, "export/hf/stand_ins/component": COMPONENT}
    for name, text in modules.items():
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        (inner / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "neo_components"]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def test_files_are_copied_whole(package: Path) -> None:
    """Only imports change; the base of components has a stand-in; a docstring stays as it is."""
    assert bundle({"neo_components.root": "main.py"}) == {
        "main.py": "# Part of neo-components: neo_components/root.py.\n"
        + ROOT.replace("neo_components.one", ".neo_one").replace("neo_components.deep.two", ".neo_deep_two"),
        "neo_component.py": "# Part of neo-components: neo_components/export/hf/stand_ins/component.py.\n" + COMPONENT,
        "neo_deep_two.py": "# Part of neo-components: neo_components/deep/two.py.\n" + TWO,
        "neo_one.py": "# Part of neo-components: neo_components/one.py.\n"
        + ONE.replace("neo_components.components.component", ".neo_component").replace("neo_components.root", ".main"),
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import neo_components.one\n", "write 'from MODULE import NAME' instead of 'import neo_components.one'"),
        ("from neo_components import one\n", "neo_components is no module of a single file"),
        ("from neo_components.deep import two\n", "neo_components.deep is no module of a single file"),
        ("from neo_components.absent import name\n", "neo_components.absent is no module of a single file"),
        ("from . import one\n", "None is no module of a single file"),
    ],
)
def test_imports_that_cannot_be_rewritten_are_refused(line: str, message: str, package: Path) -> None:
    (package / "root.py").write_text(line)
    with pytest.raises(ValueError, match=message):
        bundle({"neo_components.root": "main.py"})


def test_two_modules_of_one_file_name_are_refused(package: Path) -> None:
    (package / "deep_two.py").write_text(TWO)
    (package / "root.py").write_text(ROOT + "\n\nfrom neo_components.deep_two import Kind\n")
    with pytest.raises(ValueError, match="two modules would become the same file"):
        bundle({"neo_components.root": "main.py"})


# --- the library's own


FILES = bundle(ROOTS)
LIBRARY = Path(__file__).parent.parent / "neo_components"


@pytest.mark.parametrize("name", FILES)
def test_what_computes_needs_torch_numpy_and_pillow_only(name: str) -> None:
    """Anywhere in a file, in functions too: transformers refuses a folder whose imports are not installed."""
    installed = {"torch", "numpy", "PIL", *sys.stdlib_module_names}
    installed |= {"transformers"} if name in ROOTS.values() else set()
    for node in ast.walk(ast.parse(FILES[name])):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= installed
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert str(node.module).split(".")[0] in installed


def test_what_is_taken_along() -> None:
    """Every file as it lies in the library, but for what its imports name; nothing that reads or writes checkpoints."""
    assert {"neo_primitive.py", "neo_rotary.py", "neo_component.py", "neo_rows.py"} <= FILES.keys()
    assert not [name for name in FILES if "storage" in name or "llms" in name or "layouts" in name]
    for name in FILES.keys() - {"neo_discovery.py"}:
        head, copy = FILES[name].split("\n", 1)
        original = LIBRARY.parent / head.removeprefix("# Part of neo-components: ").removesuffix(".")
        plain, copied = (re.sub(r"from \S+ import", "", text) for text in (original.read_text(), copy))
        assert copied == plain, name


def test_every_part_that_ships_is_taken_along() -> None:
    """Each registry that models choose from is filled by the folder's own list."""
    for registry in (ROPES, MASKS, PATCH_EMBEDDINGS, EXPERTS, BRIDGES):
        for name, part in registry.items():
            if part.__module__.startswith("neo_components."):
                file = "neo_" + part.__module__.removeprefix("neo_components.components.").replace(".", "_")
                assert f"from .{file} import " in FILES["neo_discovery.py"], name


def test_relative_imports_name_what_is_there() -> None:
    defined = {
        name: {n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        | {alias.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) for alias in n.names}
        | {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for name, text in FILES.items()
    }
    for name, text in FILES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                # transformers looks for a file of this name, so there may be no dots inside.
                assert node.level == 1 and f"{node.module}.py" in FILES, name
                assert {alias.name for alias in node.names} <= defined[f"{node.module}.py"], name

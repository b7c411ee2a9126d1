"""The code of an exported folder: what is copied, what is left out, how imports change."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from neo_components.export.hf.bundle import bundle
from neo_components.export.hf.folder import ROOTS

ROOT = '''"""The root."""

from __future__ import annotations

import json
import os

from neo_components.one import (
    Kept,
    helper,
)

if TYPE_CHECKING:
    from neo_components.two import Kind


def use() -> Kind:
    from neo_components.two import late

    return late(Kept(), helper)
'''
ONE = '''"""One."""

from __future__ import annotations

import json
from pathlib import Path

import numpy  # noqa: F401 - imported for what it does
from neo_components import two as whole
from neo_components.three import unused, shared
from neo_components.two import Other as Renamed

# What this is.
LIMIT = 3
"""How far."""

FORGOTTEN = json.dumps({})
"""Nobody asks."""


class Kept(Renamed):
    """Kept."""

    size = LIMIT

    def forward(self) -> int:
        return 1

    @classmethod
    def from_pretrained(cls) -> Path:
        """Left out, and what only it needs."""
        return unused(whole)

    def other(self) -> int:
        # Stays.
        return shared


@register_rope("mine")
def registered() -> None:
    """Does something when it is loaded."""


@cache
def helper() -> None:
    pass
'''
TWO = '''"""Two."""

Other, Kind = object, int


def late(*args):
    return args
'''
THREE = '''"""Three."""
shared = 1
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name with these modules, in place of the library."""
    folder = tmp_path / "neo_components"
    folder.mkdir()
    for name, text in {"__init__": "", "root": ROOT, "one": ONE, "two": TWO, "three": THREE}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "neo_components"]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def test_what_is_copied(package: Path) -> None:
    files = bundle({"neo_components.root": "main.py"})
    assert list(files) == ["main.py", "neo_one.py", "neo_three.py", "neo_two.py"]
    assert files["main.py"] == "# Part of neo-components, copied from neo_components/root.py.\n" + ROOT.replace(
        "from neo_components.one import (\n    Kept,\n    helper,\n)", "from .neo_one import Kept, helper"
    ).replace("neo_components.two", ".neo_two")
    assert (
        files["neo_one.py"]
        == '''# Part of neo-components, copied from neo_components/one.py.
"""One."""

from __future__ import annotations

import numpy  # noqa: F401 - imported for what it does
from .neo_three import shared
from .neo_two import Other as Renamed

# What this is.
LIMIT = 3
"""How far."""


class Kept(Renamed):
    """Kept."""

    size = LIMIT

    def forward(self) -> int:
        return 1

    def other(self) -> int:
        # Stays.
        return shared


@register_rope("mine")
def registered() -> None:
    """Does something when it is loaded."""


@cache
def helper() -> None:
    pass
'''
    )
    assert files["neo_three.py"].endswith('"""Three."""\nshared = 1\n')
    assert "class" not in files["neo_two.py"] and "def late" in files["neo_two.py"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import neo_components.two\n", "write 'from MODULE import NAME' instead of 'import neo_components.two'"),
        ("from neo_components import two\n", "neo_components is no module of a single file"),
        ("from neo_components.two import absent\n", "neo_components.two does not define absent"),
    ],
)
def test_imports_that_cannot_be_rewritten_are_refused(line: str, message: str, package: Path) -> None:
    (package / "root.py").write_text(line)
    with pytest.raises(ValueError, match=message):
        bundle({"neo_components.root": "main.py"})


# --- the library's own


FILES = bundle(ROOTS)


def test_the_library_itself() -> None:
    """Nothing that reads checkpoints or trains, no import of the package, and only what transformers' users have."""
    installed = {"torch", "transformers", "numpy", "PIL"}
    for name, text in FILES.items():
        tree = ast.parse(text)
        optional = {part for block in ast.walk(tree) if isinstance(block, ast.Try) for part in ast.walk(block)}
        for node in set(ast.walk(tree)) - optional:  # what is tried may be absent
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [str(node.module)]
            else:
                continue
            strange = {module.split(".")[0] for module in modules} - installed - set(sys.stdlib_module_names)
            assert not strange, f"{name}: {strange}"
        assert "from_pretrained" not in text or name in ROOTS.values(), name
    assert {"neo_model.py", "neo_primitive.py", "neo_rotary.py", "neo_component.py"} <= FILES.keys()
    assert not [name for name in FILES if "checkpoint" in name or "weights" in name or "llms" in name]
    assert "lightning" not in FILES["neo_component.py"].split('"""', 2)[2]


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

"""Copies the files of this library that a model needs into one folder, each as it is.

transformers takes code along by following relative imports of sibling files. So every module that the roots import
becomes one file, and ``from neo_components.x.y import`` becomes a relative import of it. Loading, saving and Lightning
stay behind: :data:`STAND_INS` take their positions. The list of the parts that ship is written out, as an exported
folder has no packages to search (``discovery.py``).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from neo_components.registry import BRIDGES, EXPERTS, MASKS, PATCH_EMBEDDINGS, ROPES

PACKAGE = "neo_components"
DISCOVERY = f"{PACKAGE}.discovery"
STAND_INS = {
    f"{PACKAGE}.components.component": f"{PACKAGE}.export.hf.stand_ins.component",
    f"{PACKAGE}.components.pre_buffer_files": f"{PACKAGE}.export.hf.stand_ins.component",
    f"{PACKAGE}.components.post_llm_files": f"{PACKAGE}.export.hf.stand_ins.component",
    f"{PACKAGE}.model.neo_files": f"{PACKAGE}.export.hf.stand_ins.neo_files",
}
"""Module -> module that takes its position."""

ROOMS = rf"^{PACKAGE}\.(components\.|export\.hf\.(stand_ins\.)?)?"
FROM = re.compile(rf"^(\s*from )({PACKAGE}\.[\w.]+)(?= import )", re.MULTILINE)


def bundle(roots: Mapping[str, str]) -> dict[str, str]:
    """The files of everything that some modules import.

    Args:
        roots: dotted name of a module -> name of its file.

    Returns:
        File name -> source, in alphabetical order. A module that is no root becomes ``neo_<name>.py``.

    Raises:
        ValueError: if a module imports the package in a way that cannot become a relative import.
    """
    sources: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        if (module := waiting.pop()) not in sources:
            sources[module] = _parts_that_ship() if module == DISCOVERY else _read(module)
            waiting += _imports(module, sources[module])
    files = {module: roots.get(module) or _file_name(module) for module in sources}
    if len(set(files.values())) < len(files):
        raise ValueError(f"two modules would become the same file: {sorted(files.values())}")
    names = files | {module: files[other] for module, other in STAND_INS.items() if other in files}

    def relative(found: re.Match[str]) -> str:
        return f"{found[1]}.{names[found[2]].removesuffix('.py')}" if found[2] in names else found[0]

    head = "# Part of neo-components: {}.py.\n"
    return {
        files[module]: head.format(module.replace(".", "/")) + FROM.sub(relative, sources[module])
        for module in sorted(files, key=files.__getitem__)
    }


def _file_name(module: str) -> str:
    """``neo_components.components.ropes.native`` -> ``neo_ropes_native.py``."""
    return f"neo_{re.sub(ROOMS, '', module).replace('.', '_')}.py"


def _read(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None or spec.submodule_search_locations is not None:
        raise ValueError(f"{module} is no module of a single file; import the module that defines the name")
    return Path(spec.origin).read_text(encoding="utf-8")


def _imports(module: str, source: str) -> Iterator[str]:
    """The modules of the package that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
            raise ValueError(f"{module}: write 'from MODULE import NAME' instead of {ast.unparse(node)!r}")
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).split(".")[0] == PACKAGE):
            yield STAND_INS.get(str(node.module), str(node.module))


def _parts_that_ship() -> str:
    """The source of ``discovery.py`` for an exported folder: one name of each file that registers a part."""
    parts = [part for registry in (ROPES, MASKS, PATCH_EMBEDDINGS, EXPERTS, BRIDGES) for part in registry.values()]
    names = {part.__module__: part.__name__ for part in parts if part.__module__.startswith(f"{PACKAGE}.")}
    lines = [f"    from {module} import {name}  # noqa: F401\n" for module, name in sorted(names.items())]
    return (
        '"""Imports the parts that ship with neo-components, so that they register themselves."""\n\n\n'
        f'def import_parts(home: str) -> None:\n    """All parts, whichever registry asks."""\n{"".join(lines)}'
    )

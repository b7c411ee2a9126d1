"""Copies the part of this library that a model needs into files that stand beside each other in one folder.

transformers takes code along by following relative imports of sibling files. So every module that the roots import
becomes one file, its imports of the package become relative, and what nothing asks for any more is left out: the
methods that read and write files (:data:`LEFT_OUT`), then whatever only they used. A user of the folder reads the
components as they are.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "neo_components"
LEFT_OUT = {"from_pretrained", "save_pretrained", "save_description", "push_to_hub", "generate", "attention_maps"}
"""Methods of components that an export does without."""

STAND_INS = {f"{PACKAGE}.components.component": f"{PACKAGE}.export.hf.component"}
"""Modules whose place another takes."""

WIDTH = 120


def bundle(roots: Mapping[str, str]) -> dict[str, str]:
    """The files of everything that some modules need.

    Args:
        roots: dotted name of a module -> name of its file; these are kept whole.

    Returns:
        File name -> source, in alphabetical order. A module that is no root becomes ``neo_<name>.py``.

    Raises:
        ValueError: if a module imports the package in a way that cannot become a relative import of one name.
    """
    modules: dict[str, _Module] = {}
    waiting: list[tuple[str, str | None]] = [(name, None) for name in roots]
    while waiting:
        name, wanted = waiting.pop()
        if name not in modules:
            modules[name] = _Module.read(name, whole=name in roots)
        waiting += modules[name].want(wanted)
    files = {name: roots.get(name) or _file_name(name) for name in modules}
    if len(set(files.values())) < len(files):
        raise ValueError(f"two modules would become the same file: {sorted(files.values())}")
    return {files[name]: modules[name].render(files) for name in sorted(modules, key=files.__getitem__)}


def _file_name(module: str) -> str:
    parts = module.split(".")[1:]
    return "_".join(["neo", *(parts[1:] if parts[0] == "components" and len(parts) > 1 else parts)]) + ".py"


@dataclass
class _Unit:
    """One statement at the top of a module, with the comments before it and the docstring after it.

    Args:
        node: the statement.
        first: its first line, counted from 1.
        last: its last line.
        defines: names that it gives to the module.
        uses: names that it reads.
        always: whether it is kept though nothing asks for it, because it does something.
        cut: lines of methods that are left out.
    """

    node: ast.stmt
    first: int
    last: int
    defines: set[str]
    uses: set[str]
    always: bool
    cut: set[int] = field(default_factory=set)


class _Module:
    """A module, and which of its statements are wanted so far."""

    def __init__(self, name: str, source: str, whole: bool) -> None:
        self.name, self.lines = name, source.splitlines()
        tree = ast.parse(source)
        self.units = list(_units(tree, self.lines))
        self.used_at_first = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | _exported(tree)
        for unit in self.units:
            if isinstance(unit.node, ast.Import | ast.ImportFrom) and not unit.defines <= self.used_at_first:
                unit.always = True  # imported for what it does when it is loaded
        self.wanted: set[str] = set()
        self.kept: list[_Unit] = []
        self.whole = whole

    @classmethod
    def read(cls, name: str, whole: bool) -> _Module:
        spec = find_spec(STAND_INS.get(name, name))
        if spec is None or spec.origin is None or Path(spec.origin).name == "__init__.py":
            raise ValueError(f"{name} is no module of a single file; import the module that defines the name")
        return cls(name, Path(spec.origin).read_text(encoding="utf-8"), whole)

    def want(self, name: str | None) -> list[tuple[str, str | None]]:
        """Keeps what ``name`` (``None``: the module as such) needs; returns what that needs of other modules."""
        if name is not None:
            if not any(name in unit.defines for unit in self.units):
                raise ValueError(f"{self.name} does not define {name}, which another module imports from it")
            self.wanted.add(name)
        asked = len(self.kept)
        names = set(self.wanted)
        self.kept = [unit for unit in self.units if unit.always or self.whole or unit.defines & names]
        while True:
            names = self.wanted.union(*(unit.uses for unit in self.kept))
            kept = [unit for unit in self.units if unit.always or self.whole or unit.defines & names]
            if len(kept) == len(self.kept):
                break
            self.kept = kept
        self.names = names
        return [] if asked and asked == len(self.kept) else list(self._imports())

    def _imports(self) -> Iterator[tuple[str, str | None]]:
        """(module, name) of everything that the kept statements import from the package."""
        for unit in self.kept:
            for node in self._nodes(unit):
                if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
                    raise ValueError(f"{self.name}: write 'from MODULE import NAME' instead of {ast.unparse(node)!r}")
                if isinstance(node, ast.ImportFrom) and _inside(node):
                    yield from ((str(node.module), alias.name) for alias in self._aliases(node))

    def _nodes(self, unit: _Unit) -> Iterator[ast.stmt]:
        """The imports inside a statement, without those in methods that are left out."""
        for node in ast.walk(unit.node):
            if isinstance(node, ast.Import | ast.ImportFrom) and node.lineno not in unit.cut:
                yield node

    def _aliases(self, node: ast.ImportFrom | ast.Import) -> list[ast.alias]:
        """The names of an import that are still read, and those that never were: they are imported for what they do."""

        def kept(alias: ast.alias) -> bool:
            own = (alias.asname or alias.name).split(".")[0]
            return self.whole or own in self.names or own not in self.used_at_first

        return [alias for alias in node.names if kept(alias)]

    def render(self, files: Mapping[str, str]) -> str:
        """The file's text."""
        lines = [f"# Part of neo-components, copied from {self.name.replace('.', '/')}.py."]
        previous: _Unit | None = None
        for unit in self.kept:
            if previous is not None:
                lines += [""] * _blank_lines(self.lines, previous, unit)
            lines += self._text(unit, files)
            previous = unit
        return "\n".join(lines).rstrip() + "\n"

    def _text(self, unit: _Unit, files: Mapping[str, str]) -> Iterator[str]:
        """The lines of a statement with its imports rewritten."""
        new = {}
        for node in self._nodes(unit):
            assert isinstance(node, ast.Import | ast.ImportFrom)
            aliases = self._aliases(node)
            inside = isinstance(node, ast.ImportFrom) and _inside(node)
            if inside or len(aliases) < len(node.names):
                new[node.lineno] = (int(node.end_lineno or 0), _import(node, aliases, files if inside else None))
        line = unit.first
        while line <= unit.last:
            if line in new:
                line, text = new[line][0], new[line][1]
                yield from text
            elif line not in unit.cut:
                yield self.lines[line - 1]
            line += 1


def _units(tree: ast.Module, lines: list[str]) -> Iterator[_Unit]:
    """The statements of a module with their comments; a docstring after an assignment belongs to it."""
    before = 0
    body = list(tree.body)
    for place, node in enumerate(body):
        if place and _is_text(node) and isinstance(body[place - 1], ast.Assign | ast.AnnAssign):
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        while first - 1 > before and lines[first - 2].startswith("#"):
            first -= 1
        last = int(node.end_lineno or node.lineno)
        follower = body[place + 1] if place + 1 < len(body) else None
        if follower is not None and _is_text(follower) and isinstance(node, ast.Assign | ast.AnnAssign):
            last = int(follower.end_lineno or last)
        before = last
        cut = _cut(node) if isinstance(node, ast.ClassDef) else set()
        uses = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.lineno not in cut}
        yield _Unit(node, first, last, _defined(node), uses, _acts(node), cut)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _cut(node: ast.ClassDef) -> set[int]:
    """Lines of a class's methods that are left out, with the blank lines before them."""
    methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
    gone = LEFT_OUT & methods.keys()
    private = {name for name in methods if name.startswith("_") and not name.endswith("__")}
    mentioned = {
        name: {n.attr for n in ast.walk(part) if isinstance(n, ast.Attribute)} for name, part in methods.items()
    }
    # Their helpers go too: private methods that they call and no other method does.
    called = set().union(*(mentioned[name] for name in gone))
    kept = set().union(*(mentioned[name] for name in methods.keys() - gone - private))
    gone |= (private & called) - kept
    lines: set[int] = set()
    end = node.lineno
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name in gone:
            lines |= set(range(end + 1, int(part.end_lineno or 0) + 1))
        end = int(part.end_lineno or 0)
    return lines


def _defined(node: ast.stmt) -> set[str]:
    """Names that a statement gives to its module."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.If):
        return {name for part in node.body for name in _defined(part)}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _acts(node: ast.stmt) -> bool:
    """Whether loading a statement does more than define names: it registers something, or is no definition at all."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return any(ast.unparse(d).split(".")[-1].startswith("register_") for d in node.decorator_list)
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return True
    if isinstance(node, ast.If):
        return not ast.unparse(node.test).endswith("TYPE_CHECKING")
    return not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign)


def _exported(tree: ast.Module) -> set[str]:
    """Names that a module imports only to hand them on: ``__all__`` says so."""
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return {str(c.value) for part in lists for c in ast.walk(part) if isinstance(c, ast.Constant)}


def _inside(node: ast.ImportFrom) -> bool:
    """Whether an import is of the package."""
    return bool(node.level) or str(node.module).split(".")[0] == PACKAGE


def _import(node: ast.Import | ast.ImportFrom, aliases: list[ast.alias], files: Mapping[str, str] | None) -> list[str]:
    """The lines of an import of some names; relative to ``files`` if they are given."""
    if not aliases:
        return []
    space = " " * node.col_offset
    names = [f"{alias.name} as {alias.asname}" if alias.asname else alias.name for alias in aliases]
    if isinstance(node, ast.Import):
        return [f"{space}import {', '.join(names)}"]
    module = str(node.module) if files is None else "." + files[str(node.module)].removesuffix(".py")
    line = f"{space}from {module} import {', '.join(names)}"
    if len(line) <= WIDTH:
        return [line]
    return [f"{space}from {module} import (", *(f"{space}    {name}," for name in names), f"{space})"]


def _blank_lines(lines: list[str], before: _Unit, after: _Unit) -> int:
    """Blank lines between two statements that may have lost what stood between them."""
    imports = ast.Import | ast.ImportFrom
    if isinstance(before.node, imports) and isinstance(after.node, imports):
        between = lines[before.last : after.first - 1]
        return int("" in between)
    gap = 0
    while after.first - gap - 2 >= 0 and not lines[after.first - gap - 2]:
        gap += 1
    return gap

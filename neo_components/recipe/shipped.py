"""Recipes that ship with the library, and modules of the user's own."""

from __future__ import annotations

import difflib
import importlib
import os
import shutil
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import neo_components
from neo_components.recipe.files import read_files

PACKAGE = Path(neo_components.__file__).parent


class Shipped(NamedTuple):
    """A recipe that ships: its name, its file, and the text of its opening comment under ``what:``."""

    name: str
    path: Path
    summary: str


def recipe_folder() -> Path:
    """Folder of the recipes that ship: inside an installed package, or beside the package in a clone."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def list_recipes() -> list[Shipped]:
    """All recipes that ship, by name."""
    folder = recipe_folder()
    files = sorted(folder.rglob("*.yaml"))
    return [Shipped(file.relative_to(folder).with_suffix("").as_posix(), file, _summary(file)) for file in files]


def _summary(file: Path) -> str:
    """The first line of the comment, and the indented ones below it."""
    lines = file.read_text(encoding="utf-8").strip().splitlines() or [""]
    if not lines[0].startswith("#"):
        return ""
    more = takewhile(lambda line: line.startswith("#  "), lines[1:])
    return " ".join(line.lstrip("# ").strip() for line in [lines[0].replace("what:", "", 1), *more])


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe.

    Args:
        name: a path, or the name of a recipe that ships, with or without ``.yaml``. A file of that path comes first.

    Raises:
        FileNotFoundError: if there is neither; the nearest names are proposed.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = {recipe.name: recipe.path for recipe in list_recipes()}
    wanted = Path(name).as_posix().removesuffix(".yaml").removeprefix("recipes/")
    if wanted in shipped:
        return shipped[wanted]
    near = difflib.get_close_matches(wanted, shipped, n=1, cutoff=0.0)
    hint = f"; nearest: {near[0]} (neo recipes lists all)" if near else ""
    raise FileNotFoundError(f"{str(name)!r} is no file, and no recipe that ships has that name{hint}")


def copy_recipe(name: str | Path, destination: str | Path) -> Path:
    """Copies a recipe, to be changed, and the files that it extends to the same locations relative to it.

    Args:
        name: a path, or the name of a recipe that ships.
        destination: a file name ending in ``.yaml``, or a folder.

    Returns:
        The new file.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: if a file would be overwritten.
    """
    source = find_recipe(name)
    target = Path(destination)
    if target.suffix != ".yaml":
        target = target / source.name
    copies = {file.path: _beside(target, source, file.path) for file in read_files(source)}
    taken = [str(copy) for copy in copies.values() if copy.exists()]
    if taken:
        raise ValueError(f"{', '.join(taken)} exists already; remove it or give another destination")
    for original, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, copy)
    return target


def _beside(target: Path, source: Path, other: Path) -> Path:
    """The path of ``other`` relative to ``target`` that it had relative to ``source``."""
    return target if other == source else Path(os.path.normpath(target.parent / os.path.relpath(other, source.parent)))


def import_user_modules(names: Sequence[str]) -> None:
    """Imports modules in which a user registers components of their own; the working folder is searched first.

    Args:
        names: dotted module names, as given by ``--import``.

    Raises:
        ValueError: if a module, or one that it imports, is not found.
    """
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or name
            own = name == missing or name.startswith(f"{missing}.")
            reason = "no such module" if own else f"it imports {missing!r}, which is not installed"
            raise ValueError(
                f"--import {name}: {reason}; looked in {Path.cwd()} and the installed packages. "
                "Give the dotted name of a module, such as my_package.my_rope"
            ) from error

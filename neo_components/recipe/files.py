"""The files and overrides of a recipe, merged: ``extends``, dotted overrides, ``${...}``."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from neo_components.recipe.faults import Fault, Origins, RecipeError

EXTENDS = "extends"


@dataclass(frozen=True)
class RecipeFile:
    """One file.

    Args:
        path: of the file.
        config: its content, without ``extends``.
        locations: (dotted key, file and line) in the order of the file.
    """

    path: Path
    config: DictConfig
    locations: list[tuple[str, str]]


def read_files(path: Path, above: tuple[Path, ...] = ()) -> list[RecipeFile]:
    """A recipe file and those that it extends, the lowest first.

    Args:
        path: of the file.
        above: the files that extend this one.

    Raises:
        FileNotFoundError: if the file does not exist.
        RecipeError: if a file is no YAML mapping, extends a file that is not there, or extends itself.
    """
    text, config = _parse(path)
    locations = list(_locations(yaml.compose(text, Loader=yaml.SafeLoader), path))
    base = OmegaConf.to_container(config).pop(EXTENDS, None)  # type: ignore[union-attr, call-arg, arg-type]
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != EXTENDS])
    file = RecipeFile(path, config, [entry for entry in locations if entry[0] != EXTENDS])
    if base is None:
        return [file]
    location = dict(locations)[EXTENDS]
    if not isinstance(base, str):
        raise RecipeError([Fault(location, EXTENDS, f"got {base!r}, wanted str (the path of one recipe)")])
    target = Path(os.path.normpath(path.parent / base))
    chain = (*above, path)
    if target.resolve() in [file.resolve() for file in chain]:
        text = " -> ".join(str(file) for file in (*chain, target))
        raise RecipeError([Fault(location, EXTENDS, f"goes round in a circle: {text}")])
    if not target.is_file():
        raise RecipeError(
            [Fault(location, EXTENDS, f"{base!r} is no file; looked for {target} (paths start at {path.parent})")]
        )
    return [*read_files(target, chain), file]


def _parse(path: Path) -> tuple[str, DictConfig]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no recipe file")
    try:
        text = path.read_text(encoding="utf-8")
        config = OmegaConf.load(io.StringIO(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        location = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError([Fault(location, "", f"no valid YAML: {error.problem or error.context}")]) from error
    except (UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise RecipeError([Fault(str(path), "", f"no valid YAML: {error}")]) from error
    if not isinstance(config, DictConfig):
        raise RecipeError([Fault(str(path), "", f"must hold sections (key: value), got a {type(config).__name__}")])
    return text, config


def _locations(node: Any, path: Path, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and line of everything in a YAML tree."""
    if isinstance(node, yaml.MappingNode):
        children = [(name.value, name, value) for name, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(n), value, value) for n, value in enumerate(node.value)]
    else:
        return
    for name, mark, value in children:
        inner = f"{key}.{name}" if key else str(name)
        yield inner, f"{path}:{mark.start_mark.line + 1}"
        yield from _locations(value, path, inner)


def merge(files: Sequence[RecipeFile], overrides: Sequence[str], faults: list[Fault]) -> tuple[DictConfig, Origins]:
    """Merges files and then overrides; sections key by key; of lists and values the later one stands.

    Args:
        files: the lowest first.
        overrides: ``dotted.key=value``, the value as in YAML.
        faults: receives what is wrong with overrides.
    """
    origins = Origins(str(files[-1].path))
    for file in files:
        for key, location in file.locations:
            origins.add(key, location)
    merged = OmegaConf.merge(*(file.config for file in files))
    assert isinstance(merged, DictConfig)
    for text in overrides:
        location = f"override {text!r}"
        key, equals, value = text.partition("=")
        if not equals or not key:
            faults.append(Fault(location, "", "must be written dotted.key=value"))
            continue
        try:
            tree = yaml.compose(value, Loader=yaml.SafeLoader)
            merged.merge_with_dotlist([text])
        except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, IndexError) as error:
            faults.append(Fault(location, key, f"cannot be set: {str(error).splitlines()[0]}"))
            continue
        parts = key.split(".")
        made = [".".join(parts[:n]) for n in range(1, len(parts)) if ".".join(parts[:n]) not in origins.locations]
        for inner in (*made, key, *(name for name, _ in _locations(tree, Path(), key))):
            origins.add(inner, location)
    return merged, origins


def resolve(node: Any, origins: Origins, faults: list[Fault], key: str = "", around: tuple[int, ...] = ()) -> Any:
    """Plain values of a merged config, every ``${...}`` replaced; what cannot be resolved is noted and left out."""
    if isinstance(node, DictConfig):
        names: list[Any] = list(node)
    elif isinstance(node, ListConfig):
        names = list(range(len(node)))
    else:
        return node
    values: dict[str, Any] = {}
    for name in names:
        inner = f"{key}.{name}" if key else str(name)
        try:
            child = node[name]
        except MissingMandatoryValue:
            faults.append(Fault(origins.location(inner), inner, "is ???: the recipe leaves this value to you"))
            continue
        except (OmegaConfBaseException, RecursionError) as error:
            faults.append(Fault(origins.location(inner), inner, f"cannot be resolved: {str(error).splitlines()[0]}"))
            continue
        if id(child) in (*around, id(node)):
            faults.append(Fault(origins.location(inner), inner, "cannot be resolved: it refers to what it is in"))
            continue
        values[str(name)] = resolve(child, origins, faults, inner, (*around, id(node)))
    return values if isinstance(node, DictConfig) else list(values.values())

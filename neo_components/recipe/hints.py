"""Type hints as the schema of a recipe: what can be written in YAML, and dataclasses made from signatures."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


class Names:
    """Stands in a type hint for "one of the registered short names"; looked up when asked, so later entries count.

    Args:
        kind: what is registered, for messages.
        registry: its names.
    """

    def __init__(self, kind: str, registry: Collection[str]) -> None:
        self.kind, self.registry = kind, registry


def is_union(hint: Any) -> bool:
    """Whether a type hint is ``A | B``, in either spelling."""
    return get_origin(hint) in (Union, types.UnionType)


def plain(hint: Any) -> Any:
    """The part of a type hint that YAML can express; ``MISSING`` if there is none."""
    if is_union(hint):
        kept = tuple(part for member in get_args(hint) if (part := plain(member)) is not MISSING)
        return Union[kept] if set(kept) - {type(None)} else MISSING  # noqa: UP007, built from a tuple
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return hint
    if origin in (list, tuple, dict, Sequence, Mapping):
        return MISSING if any(plain(part) is MISSING for part in inner if part is not ...) else hint
    if is_dataclass(hint):
        return MISSING if any(plain(part) is MISSING for part in get_type_hints(hint).values()) else hint
    return hint if origin is Literal or hint in (str, int, float, bool, type(None), Path, Any) else MISSING


def arguments(
    name: str,
    function: Callable[..., Any],
    omit: Collection[str] = (),
    replace: Mapping[str, tuple[Any, Any]] | None = None,
    namespace: dict[str, Any] | None = None,
) -> Any:
    """A dataclass with the keyword arguments of a class or function: same names, types and defaults.

    Args:
        name: of the dataclass.
        function: whose signature is read. Arguments that YAML cannot express are left out.
        omit: more arguments to leave out.
        replace: (type, default) of arguments, instead of those of the signature; also adds arguments.
        namespace: attributes of the dataclass.
    """
    hints = hints_of_arguments(function)
    found: dict[str, tuple[Any, Any]] = {}
    for parameter in inspect.signature(function).parameters.values():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if not named or parameter.name in omit:
            continue
        hint = plain(hints[parameter.name])
        if hint is not MISSING:
            found[parameter.name] = hint, MISSING if parameter.default is parameter.empty else parameter.default
    found |= dict(replace or {})
    inside = {
        "__module__": function.__module__,
        "__doc__": f"Arguments of ``{function.__qualname__}``.",
        **(namespace or {}),
    }
    columns = [(key, hint, column(default)) for key, (hint, default) in found.items()]
    return make_dataclass(name, columns, namespace=inside, frozen=True, kw_only=True)


def default_of(function: Callable[..., Any], argument: str) -> Any:
    """The default of one argument."""
    return inspect.signature(function).parameters[argument].default


def hints_of_arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """The type of each argument, from its signature; one that is written as text is looked up."""
    written = get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: written[p.name] if isinstance(p.annotation, str) else p.annotation for p in parameters}


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that have no default."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def column(default: Any) -> Any:
    """A dataclass field with that default, ``MISSING`` for none."""
    if default is MISSING:
        return field()
    if isinstance(default, (list, dict, set)):
        return field(default_factory=lambda: deepcopy(default))
    return field(default=default)


def members(hint: Any) -> list[Any]:
    """The alternatives of a type hint."""
    return list(get_args(hint)) if is_union(hint) else [hint]


def sections_of(hint: Any) -> list[Any]:
    """The dataclasses among the alternatives of a type hint."""
    return [member for member in members(hint) if is_dataclass(member)]


def hints_of(section: Any) -> dict[str, Any]:
    """Type of each key of a section."""
    hints = get_type_hints(section, include_extras=True)
    return {column.name: hints[column.name] for column in fields(section)}


def required(section: Any) -> list[str]:
    """Keys of a section that have no default."""
    return [c.name for c in fields(section) if c.default is MISSING and c.default_factory is MISSING]


def is_choice(value: Any, choices: Iterable[Any]) -> bool:
    """Whether the value is one of the choices, and of its type: ``True`` is not 1."""
    return any(type(value) is type(choice) and value == choice for choice in choices)


def accepts_none(hint: Any) -> bool:
    """Whether ``null`` is a value of the hint."""
    return type(None) in members(hint) or hint is Any


def describe(hint: Any) -> str:
    """A type hint in words."""
    if is_union(hint):
        return " or ".join(dict.fromkeys(describe(member) for member in members(hint)))
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is Annotated:
        return "a name" if get_args(hint)[0] is str else "a name or a mapping (kind: name, option: value)"
    if origin is tuple and inner[-1] is not ...:
        return f"a list of {len(inner)}: {', '.join(map(describe, inner))}"
    if origin in (list, tuple, Sequence):
        return f"a list of {describe(inner[0])}"
    if origin in (dict, Mapping):
        return f"a mapping to {describe(inner[1])}"
    return _WORDS.get(hint, "a mapping (key: value)")


_WORDS = {
    int: "int (a whole number)",
    float: "float (a finite number)",
    bool: "bool (true or false)",
    str: "str (text)",
    Path: "str (a path)",
    type(None): "null",
    Any: "anything",
}

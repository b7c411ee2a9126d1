"""Reads the plain values of a recipe into the dataclasses of the schema, and notes everything that is wrong."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from neo_components.recipe.faults import Fault, Origins
from neo_components.recipe.hints import (
    Names,
    accepts_none,
    describe,
    hints_of,
    is_choice,
    is_union,
    members,
    required,
    sections_of,
)
from neo_components.recipe.parts import Part, part_of
from neo_components.recipe.schema import FROM, keys
from neo_components.registry import KIND

FAULTY: Any = object()
"""What :meth:`Reader.read` returns for a value that it had to refuse."""


class Reader:
    """Reads values against type hints.

    Args:
        origins: where the keys were written.
        unreadable: dotted keys that were given, but whose values are known to be faulty already.

    Attributes:
        faults: everything that was wrong so far.
        sections: dotted key -> (dataclass, good values) of every section that was read, also of faulty ones.
        given: dotted key -> values of every section as they stand in the recipe.
    """

    def __init__(self, origins: Origins, unreadable: Collection[str] = ()) -> None:
        self.origins, self.unreadable = origins, unreadable
        self.faults: list[Fault] = []
        self.sections: dict[str, tuple[Any, dict[str, Any]]] = {}
        self.given: dict[str, dict[str, Any]] = {}

    def fault(self, key: str, text: str) -> None:
        """Notes a fault of that key."""
        self.faults.append(Fault(self.origins.location(key), key, text))

    def read(self, value: Any, hint: Any, key: str) -> Any:
        """The value as the hint wants it, or ``FAULTY``."""
        sections = sections_of(hint)
        others = [member for member in members(hint) if member not in sections and member is not type(None)]
        if sections and (isinstance(value, Mapping) or not others) and not (value is None and accepts_none(hint)):
            return self.section(value, sections, key)
        if is_union(hint):
            return self._union(value, hint, key)
        origin = get_origin(hint)
        if origin is Annotated:
            part = part_of(hint)
            return self._name(value, names_of(hint), key) if part is None else self._part(value, part, hint, key)
        if origin is Literal:
            return value if is_choice(value, get_args(hint)) else self._refuse(value, hint, key)
        if origin in (list, tuple, Sequence):
            return self._items(value, hint, key)
        if origin in (dict, Mapping):
            return self._mapping(value, hint, key)
        good = _scalar(value, hint)
        return self._refuse(value, hint, key) if good is FAULTY else good

    def section(self, value: Any, forms: list[Any], key: str) -> Any:
        """A dataclass, from a mapping; of several forms the one that fits the keys given."""
        hints = [hints_of(form) for form in forms]
        if not isinstance(value, Mapping):
            return self._refuse(value, forms[0], key)
        given = {name: v for name, v in value.items() if not self._removed(v, name, hints, key)}
        known = [name for hint in hints for name in hint]
        meant = {near for name in given if (near := _nearest(name, known, 0.6))}
        choice = next((n for n, hint in enumerate(hints) if (FROM in hint) == (FROM in meant)), 0)
        before = len(self.faults)
        good = {}
        for name, inner in given.items():
            where = _join(key, name)
            if name in hints[choice]:
                read = self.read(inner, hints[choice][name], where)
                if read is not FAULTY:
                    good[name] = read
            else:
                self.fault(where, self._unwanted(name, key, forms[choice], known))
        self._missing(forms, choice, meant, key)
        self.sections[key], self.given[key] = (forms[choice], good), given
        return self._make(forms[choice], good, key, before)

    def _removed(self, value: Any, name: str, hints: list[dict[str, Any]], key: str) -> bool:
        """Whether ``null`` takes away what an earlier file has, instead of being a value."""
        allowed = any(name in hint and accepts_none(hint[name]) for hint in hints)
        return value is None and not allowed and self.origins.replaced(_join(key, name))

    def _unwanted(self, name: str, key: str, form: Any, known: list[str]) -> str:
        """Why a section cannot have that key."""
        owned = getattr(form, "owned", {})
        if name in owned:
            return f"cannot be set here: {owned[name]}"
        if label := getattr(form, "label", None):
            options = [option for option in known if option != KIND]
            near = f"; nearest: {_join(key, _nearest(name, options))}" if options else ""
            here, chosen = (self.origins.location(_join(key, at)).partition(":")[0] for at in (name, KIND))
            inherited = here != chosen and not here.startswith("override ")
            way_out = "; null takes away what an extended recipe has" if inherited else ""
            return f"is no option of {label}{near} (valid here: {', '.join(known)}){way_out}"
        if name in known:
            if FROM in hints_of(form):
                return f"cannot stand beside {_join(key, FROM)}, which brings its own; take one of them away"
            return f"needs {_join(key, FROM)} beside it"
        elsewhere = [other for other in keys() if other.rpartition(".")[2] == name]
        near = _nearest(_join(key, name), elsewhere) or _join(key, _nearest(name, known))
        valid = f" (valid here: {', '.join(dict.fromkeys(known))})" if len(known) <= 20 else ""
        return f"unknown key; nearest: {near}{valid}"

    def _missing(self, forms: list[Any], choice: int, meant: set[str], key: str) -> None:
        """Notes the required keys that are not there; a misspelt one counts as there, as it has its own fault."""
        there = meant | {name for name in required(forms[choice]) if _join(key, name) in self.unreadable}
        lacking = [name for name in required(forms[choice]) if name not in there]
        if lacking:
            other = f", or {_join(key, FROM)} instead" if any(FROM in hints_of(form) for form in forms) else ""
            wanted = ", ".join(_join(key, name) for name in lacking)
            self.fault(key, f"lacks {wanted}{'' if FROM in lacking else other}")

    def _make(self, form: Any, good: dict[str, Any], key: str, before: int) -> Any:
        """The dataclass, if nothing was wrong with its values nor is with their combination."""
        for name, text in (form.problems(good) if hasattr(form, "problems") else {}).items():
            self.fault(_join(key, name), text)
        if len(self.faults) > before or not good.keys() >= set(required(form)):
            return FAULTY
        try:
            return getattr(form, "finish", form)(**good)
        except (ValueError, TypeError) as error:
            self.fault(key, str(error))
            return FAULTY

    def _union(self, value: Any, hint: Any, key: str) -> Any:
        """The first alternative that takes the value; one of the value's very type comes first."""
        for member in sorted(members(hint), key=lambda member: member is not type(value)):
            reader = Reader(self.origins, self.unreadable)
            read = reader.read(value, member, key)
            if not reader.faults or _is_meant(value, member):
                # Faults of the alternative that is meant are better help than that no alternative fits.
                self.faults += reader.faults
                self.sections |= reader.sections
                self.given |= reader.given
                return read
        return self._refuse(value, hint, key)

    def _part(self, value: Any, part: Part, hint: Any, key: str) -> Any:
        """A choice of a part: its name, or a mapping with the options that the part of that ``kind`` has."""
        if not isinstance(value, (str, Mapping)):
            return self._refuse(value, hint, key)
        given = {KIND: value} if isinstance(value, str) else dict(value)
        where = key if isinstance(value, str) else _join(key, KIND)
        if KIND not in given or self._removed(given[KIND], KIND, [], key):
            given[KIND] = part.default
        name = self._name(given[KIND], Names(part.kind, part.names()), where)
        if name is FAULTY:
            return FAULTY
        try:
            form = part.form(name)
        except TypeError as error:
            self.fault(where, str(error))
            return FAULTY
        return self.section(given, [form], key)

    def _name(self, value: Any, names: Names, key: str) -> Any:
        if isinstance(value, str) and value in names.registry:
            return value
        known = sorted(names.registry)
        near = _nearest(str(value), known)
        self.fault(key, f"unknown {names.kind} {value!r}; nearest: {near} (registered: {', '.join(known)})")
        return FAULTY

    def _items(self, value: Any, hint: Any, key: str) -> Any:
        kind, inner = get_origin(hint), get_args(hint)
        fixed = kind is tuple and inner[-1] is not ...
        if not isinstance(value, list) or (fixed and len(value) != len(inner)):
            return self._refuse(value, hint, key)
        wanted = inner if fixed else inner[:1] * len(value)
        pairs = enumerate(zip(value, wanted, strict=True))
        read = [self.read(item, want, _join(key, str(n))) for n, (item, want) in pairs]
        if any(item is FAULTY for item in read):
            return FAULTY
        return list(read) if kind is list else tuple(read)

    def _mapping(self, value: Any, hint: Any, key: str) -> Any:
        if not isinstance(value, Mapping):
            return self._refuse(value, hint, key)
        read = {name: self.read(inner, get_args(hint)[1], _join(key, name)) for name, inner in value.items()}
        return FAULTY if any(inner is FAULTY for inner in read.values()) else read

    def _refuse(self, value: Any, hint: Any, key: str) -> Any:
        """Notes a wrong type or a choice that is not offered."""
        choices = [
            str(choice) for member in members(hint) if get_origin(member) is Literal for choice in get_args(member)
        ]
        near = f"; nearest: {_nearest(value, choices)}" if isinstance(value, str) and choices else ""
        shown = "nothing (null)" if value is None else f"{value!r} ({type(value).__name__})"
        items = [get_args(member)[0] for member in members(hint) if get_origin(member) in (list, tuple, Sequence)]
        single = isinstance(value, (str, int, float)) and any(not sections_of(item) for item in items)
        brackets = f"; write [{value}]" if single else ""
        self.fault(key, f"got {shown}, wanted {describe(hint)}{near}{brackets}")
        return FAULTY


def names_of(hint: Any) -> Names:
    """The names that an ``Annotated`` hint stands for."""
    return next(extra for extra in hint.__metadata__ if isinstance(extra, Names))


def _is_meant(value: Any, member: Any) -> bool:
    """Whether a value is of the kind of an alternative, so that it is faulty rather than of another alternative."""
    if get_origin(member) is Annotated:
        return isinstance(value, str) or (isinstance(value, Mapping) and part_of(member) is not None)
    return isinstance(value, list) and get_origin(member) in (list, tuple, Sequence)


def _scalar(value: Any, hint: Any) -> Any:
    """A single value of type ``hint``, or ``FAULTY``. YAML 1.1 reads 1e-3 as text, so text may give a float."""
    if hint is Any or (hint is type(None) and value is None):
        return value
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError):
            if math.isfinite(number := float(value)):
                return number
        return FAULTY
    return value if type(value) is hint else FAULTY


def _nearest(name: str, known: Iterable[str], cutoff: float = 0.0) -> str:
    """The most similar of the known names; empty if none reaches the cutoff."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), "")


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else str(name)

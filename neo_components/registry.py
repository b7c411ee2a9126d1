"""The parts that recipes choose by name: one registry for each kind.

A part is a class or a function in one file and one registration::

    from neo_components.registry import ROPES

    @ROPES.register("mine")
    class Mine: ...

``ROPES["mine"]`` is the class, ``sorted(ROPES)`` lists the names. What a part wants beside the arguments that the
library hands it are its *options*: they are read from its signature, are keys of recipes
(``rope: {kind: mine, spacing: 2.5}``) and are saved with models and assets. ``docs/extend.md`` has a complete file for
each kind.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, get_type_hints

from neo_components.discovery import import_parts
from neo_components.errors import ArgumentError, nearest

Choice = str | Mapping[str, Any]
"""A part as a recipe names it: its name, or ``{"kind": name, option: value ...}``."""

KIND = "kind"


class Registry(Mapping[str, Any]):
    """Parts of one kind by name.

    The parts that ship are registered when they are first asked for, so that this module imports nothing.

    Args:
        kind: what the parts are, as the argument or recipe key is called; for messages.
        home: module that registers the parts that ship, or package of such modules.
        given: parameters of a part that the library passes: all others are options.
    """

    def __init__(self, kind: str, home: str, given: tuple[str, ...] = ()) -> None:
        self.kind, self.given = kind, given
        self._home: str | None = home
        self._parts: dict[str, Any] = {}
        self._options: dict[Any, dict[str, inspect.Parameter]] = {}

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator that enters a class or a function.

        Args:
            name: short name for recipes and configs.

        Raises:
            ValueError: if another part has that name.
        """

        def enter(part: Any) -> Any:
            known = self._parts.get(name)
            if known is not None and _origin(known) != _origin(part):  # the same one again: a notebook's cell
                raise ValueError(f"{self.kind} {name!r} is registered already: {_origin(known)}")
            self._parts[name] = part
            return part

        return enter

    def __getitem__(self, name: str) -> Any:
        if name not in self._parts:
            self._load()
        if name not in self._parts:
            raise ArgumentError(
                self.kind,
                f"{name!r} is unknown; registered: {', '.join(sorted(self._parts))}; if it is your own, import the "
                f"module that registers it (neo ... --import MODULE){nearest(name, self._parts)}",
            )
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._parts)

    def __len__(self) -> int:
        self._load()
        return len(self._parts)

    def get(self, name: str, default: Any = None) -> Any:
        """The part of that name, or ``default``."""
        return self._parts[name] if name in self else default

    def remove(self, name: str) -> None:
        """Takes a part away, for tests and notebooks that register one."""
        del self._parts[name]

    def _load(self) -> None:
        """Registers the parts that ship, once."""
        if self._home is not None:
            home, self._home = self._home, None
            import_parts(home)

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """The options of a part: its parameters without those that the library passes, annotations as types."""
        part = self[name]
        if part not in self._options:
            self._options[part] = {
                p.name: p.replace(annotation=_resolved(p.annotation, part))
                for p in inspect.signature(part).parameters.values()
                if p.name not in self.given and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            }
        return self._options[part]

    def complete(self, choice: Choice) -> Choice:
        """A choice with every option: the form that configs keep. A part without options is its name alone.

        Raises:
            ArgumentError: (a ``ValueError``) if the name or an option is unknown, or an option without default is
                missing.
        """
        name, chosen = split(choice, self.kind)
        options = self.options(name)
        for option in chosen:
            if option not in options:
                known = ", ".join(options) or "none"
                raise ArgumentError(
                    self.kind, f"{name!r} has no option {option!r} (options: {known}){nearest(option, options)}"
                )
        missing = [n for n, p in options.items() if n not in chosen and p.default is inspect.Parameter.empty]
        if missing:
            given = f" (the library itself passes {', '.join(self.given)})" if self.given else ""
            raise ArgumentError(self.kind, f"{name!r} needs the option {missing[0]!r}{given}")
        defaults = {option: parameter.default for option, parameter in options.items()}
        return {KIND: name, **defaults, **chosen} if options else name

    def name_of(self, part: Any) -> str:
        """The name under which a class or a function is registered.

        Raises:
            ValueError: if it is not.
        """
        for name in self:
            if self[name] is part:
                return name
        raise ValueError(f"{part} is not registered as {self.kind}; decorate it with .register(name)")

    def make(self, choice: Choice, *args: Any, **given: Any) -> Any:
        """Calls a part with its options and what the library passes.

        Args:
            choice: name, or mapping of ``kind`` and options.
            args: passed on.
            given: the arguments named in ``self.given``; one that the part does not take is left out.
        """
        name, options = split(self.complete(choice), self.kind)
        takes = inspect.signature(self[name]).parameters
        return self[name](*args, **{key: value for key, value in given.items() if key in takes}, **options)


def split(choice: Choice, kind: str = "part") -> tuple[str, dict[str, Any]]:
    """Name and options of a choice.

    Raises:
        ArgumentError: (a ``ValueError``) if a mapping has no ``kind``.
    """
    if isinstance(choice, str):
        return choice, {}
    if not isinstance(choice, Mapping) or not isinstance(choice.get(KIND), str):
        raise ArgumentError(kind, f"must be a name or a mapping with {KIND!r}, got {choice!r}")
    return choice[KIND], {name: value for name, value in choice.items() if name != KIND}


def _resolved(annotation: Any, part: Any) -> Any:
    """The type of an annotation that was written as text; ``Any`` where there is none."""
    if annotation is inspect.Parameter.empty:
        return Any
    classes = reversed(getattr(part, "__mro__", (part,)))  # an option may be written in the module of a base class
    names = {name: value for one in classes for name, value in vars(sys.modules[one.__module__]).items()}
    return get_type_hints(SimpleNamespace(__annotations__={"it": annotation}), names, include_extras=True)["it"]


def _origin(part: Any) -> str:
    """Where a class or a function was defined; of anything else what it is."""
    return f"{part.__module__}.{part.__qualname__}" if hasattr(part, "__qualname__") else repr(part)


ROPES = Registry("rope", "neo_components.components.ropes", given=("base_h", "base_w"))
"""RoPE variants: classes with an index rule and a table of axes and frequencies (``components/rotary.py``)."""

MASKS = Registry("attention", "neo_components.components.mask_rules", given=("query", "key"))
"""Mask rules: functions of two :class:`~neo_components.components.masks.Tokens`, ``True`` where the query attends."""

PATCH_EMBEDDINGS = Registry("patch_embedding", "neo_components.components.patch_embeddings", given=("hidden_size",))
"""Patch embeddings: components that turn an image's patches into its tokens."""

EXPERTS = Registry("experts", "neo_components.components.experts", given=("block",))
"""Expert routing by modality: functions that give a block parts of its own for visual tokens."""

BRIDGES = Registry("bridge", "neo_components.components.bridge", given=("in_width", "out_width"))
"""Bridges: components that map between the widths of a pre-Buffer and of another language model."""

LLM_FAMILIES = Registry("model_type", "neo_components.llms")
"""Language model families by the ``model_type`` of their config."""

CONVERTERS = Registry("converter", "neo_components.data.convert")
"""Converters: readers of other data formats; their options are options of ``neo data NAME``."""

PICTURES = Registry("picture source", "neo_components.data.pictures", given=("packages",))
"""Sources of pictures that ``neo data pretrain-mix`` draws from."""

METRICS = Registry("metric", "neo_components.evaluation.metrics", given=("kinds",))
"""Metrics: subclasses of :class:`~neo_components.evaluation.AnswerMetric`; ``neo evaluate --metric NAME``."""

"""Parts that a recipe chooses by name, with options: a type hint that is read by the part's own signature.

``rope: native`` and ``rope: {kind: mine, spacing: 2.5}`` are both choices. What keys a mapping may have depends on its
``kind``: the options of the part of that name (``Registry.options``), so a part that is registered later counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, fields, make_dataclass
from typing import Any

from neo_components.recipe.hints import column, plain
from neo_components.registry import KIND, Choice, Registry, split


class Part:
    """Stands in a type hint for a choice of a registered part.

    Args:
        registry: the parts.
        default: the part that is meant where a mapping has no ``kind``.
        beside: type and default of keys that stand beside the options. One that is an argument which the library passes
            to parts of this registry (``Registry.given``) is a key only where the part takes it.
        also: names that may be given without being a part.
        problems: ``problems(values)``: what is wrong with the values of the keys beside the options, by key.
    """

    def __init__(
        self,
        registry: Registry,
        default: str,
        beside: Mapping[str, tuple[Any, Any]] | None = None,
        also: Collection[str] = (),
        problems: Callable[[Mapping[str, Any]], dict[str, str]] = lambda values: {},
    ) -> None:
        self.registry, self.default, self._problems = registry, default, problems
        self.beside, self.also = dict(beside or {}), tuple(also)

    @property
    def kind(self) -> str:
        """What the parts are, for messages."""
        return self.registry.kind

    def names(self) -> list[str]:
        """All names that may be given."""
        return sorted({*self.registry, *self.also})

    def form(self, name: str) -> Any:
        """The keys of a choice of that name, as a dataclass whose ``finish`` makes the choice from their values.

        Raises:
            TypeError: if the part has an option without default that YAML cannot express.
        """
        columns: dict[str, tuple[Any, Any]] = {}
        if name not in self.also:
            for option, parameter in self.registry.options(name).items():
                hint, needed = plain(parameter.annotation), parameter.default is inspect.Parameter.empty
                if hint is not MISSING:
                    columns[option] = hint, MISSING if needed else parameter.default
                elif needed:
                    raise TypeError(f"{name!r} needs {option}: {parameter.annotation}, which YAML cannot express")
            takes = inspect.signature(self.registry[name]).parameters
            columns |= {n: c for n, c in self.beside.items() if n not in self.registry.given or n in takes}
        return make_dataclass(
            f"{self.kind}_{name}",
            [(KIND, str, column(name)), *((key, hint, column(default)) for key, (hint, default) in columns.items())],
            namespace={
                "label": f"{self.kind} {name!r}",
                "problems": staticmethod(self.problems),
                "finish": classmethod(_choice),
            },
            kw_only=True,
        )

    def problems(self, values: Mapping[str, Any]) -> dict[str, str]:
        """What is wrong with the keys beside the options; the part itself checks its options."""
        return self._problems({key: value for key, value in values.items() if key in self.beside})

    def of_arguments(self, name: str, arguments: Mapping[str, Any]) -> Choice:
        """The choice that a component was built with: its argument ``name``, and those beside the options.

        One beside them whose default is ``None`` keeps it: something else brings its value along.
        """
        kind, options = split(self.registry.complete(arguments[name]), self.kind)
        form = self.form(kind)
        beside = [key.name for key in fields(form) if key.name in self.beside and key.default is not None]
        return form.finish(**{KIND: kind, **options}, **{key: arguments[key] for key in beside})

    def choice(self) -> Choice:
        """The default part with the defaults of its options and of the keys beside them."""
        return self.form(self.default).finish()


def _choice(form: Any, **values: Any) -> Choice:
    """The choice, complete; a part without options is its name alone."""
    whole = form(**values)
    found = {key.name: getattr(whole, key.name) for key in fields(form)}
    return found if len(found) > 1 else found[KIND]


def part_of(hint: Any) -> Part | None:
    """The part that an ``Annotated`` hint stands for; ``None`` if it stands for none."""
    return next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Part)), None)


def keys_of(part: Part) -> Iterator[str]:
    """Every key that a choice may have, whatever its name."""
    yield KIND
    for name in part.registry:
        yield from (key.name for key in fields(part.form(name)) if key.name != KIND)


def split_beside(choice: Choice, beside: Collection[str]) -> tuple[Choice, dict[str, Any]]:
    """A choice without the keys that stand beside its options, and these."""
    if isinstance(choice, str):
        return choice, {}
    kept = {key: value for key, value in choice.items() if key not in beside}
    return kept if len(kept) > 1 else kept[KIND], {key: choice[key] for key in beside if key in choice}

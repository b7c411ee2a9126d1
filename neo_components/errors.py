"""The error of an argument that has an impossible value; it knows which argument."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ArgumentError(ValueError):
    """An argument cannot have the value that it was given.

    Whoever read the value from a file looks up where it was written: by :attr:`argument`, not by words of the message.

    Args:
        argument: name of the argument.
        text: value seen, values allowed, what to do; follows the name in the message.
        others: names of arguments that the value does not go together with.
    """

    def __init__(self, argument: str, text: str, *others: str) -> None:
        super().__init__(f"{argument} {text}")
        self.argument, self.text, self.others = argument, text, others

    def __reduce__(self) -> Any:  # as raised in a data worker
        return type(self), (self.argument, self.text, *self.others)


class ArgumentErrors(ValueError):
    """Several arguments cannot have the values that they were given.

    Args:
        errors: one for each.
    """

    def __init__(self, errors: Iterable[ArgumentError]) -> None:
        self.errors = list(errors)
        super().__init__("; ".join(map(str, self.errors)))

    def __reduce__(self) -> Any:
        return type(self), (self.errors,)


class UnknownFlopsError(ValueError):
    """The FLOPs of a part are not known; the message says what the part must have so that they are."""


def one_of(argument: str, value: Any, allowed: Iterable[str]) -> None:
    """Checks a choice between names.

    Raises:
        ArgumentError: (a ``ValueError``) if ``value`` is none of them; it lists them and proposes the nearest.
    """
    names = list(allowed)
    if value not in names:
        raise ArgumentError(argument, f"must be one of {', '.join(names)}, got {value!r}{nearest(value, names)}")


def nearest(value: Any, names: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the most similar name; empty if none is similar."""
    near = difflib.get_close_matches(str(value), list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""

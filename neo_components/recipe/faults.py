"""What is wrong with a recipe: single faults, their places in the files, and the error that lists them all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Args:
        place: file and line, or the override.
        key: dotted key; empty if the fault is the file's.
        text: value seen, values allowed, what to do.
    """

    place: str
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.place, self.key, self.text)))


class RecipeError(ValueError):
    """A recipe cannot be used; the message lists every fault, one per line.

    Args:
        faults: all of them.
    """

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = list(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__("\n  ".join([f"{count} in the recipe:", *map(str, self.faults)]))


@dataclass
class Origins:
    """Where each dotted key was written, in the order in which files and overrides are laid over each other.

    Args:
        file: the recipe, the place of what was not written at all.
    """

    file: str
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, key: str, place: str) -> None:
        """Notes that the key was (also) written there."""
        self.places.setdefault(key, []).append(place)

    def place(self, key: str) -> str:
        """Where the key, or the nearest section around it, was written last."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places[key][-1] if key else self.file

    def replaced(self, key: str) -> bool:
        """Whether the key was written more than once, so that the last writing replaced another."""
        return len(self.places.get(key, ())) > 1

"""What is wrong with a recipe: single faults, their locations in the files, and the error that lists them all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Args:
        location: file and line, or the override.
        key: dotted key; empty if the fault is the file's.
        text: value seen, values allowed, what to do.
    """

    location: str
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.location, self.key, self.text)))


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
    """Where each dotted key was written, in the order in which files and overrides are merged.

    Args:
        file: the recipe, the location of a key that was not written at all.
    """

    file: str
    locations: dict[str, list[str]] = field(default_factory=dict)

    def add(self, key: str, location: str) -> None:
        """Notes that the key was (also) written there."""
        self.locations.setdefault(key, []).append(location)

    def location(self, key: str) -> str:
        """Where the key, or the nearest section around it, was written last."""
        while key and key not in self.locations:
            key = key.rpartition(".")[0]
        return self.locations[key][-1] if key else self.file

    def replaced(self, key: str) -> bool:
        """Whether the key was written more than once, so that the last one replaced another."""
        return len(self.locations.get(key, ())) > 1

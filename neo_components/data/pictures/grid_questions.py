"""Questions on named things in the cells of a grid: where, what, how many, left and right, larger, color, presence."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from neo_components.data.pictures.naming import Thing, with_article

Turn = tuple[str, str]

_COLUMNS = {1: ("",), 2: ("left", "right"), 3: ("left", "middle", "right")}
_ROWS = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
_CLEARLY_LARGER = 1.4


@dataclass(frozen=True)
class Placed:
    """A thing in a cell.

    Args:
        thing: what it is.
        column: of its cell, from 0 on.
        row: of its cell.
        place: the cell in words, from :func:`place_of`.
        side: longer side in pixels.
        color: its main color if it has one.
    """

    thing: Thing
    column: int
    row: int
    place: str
    side: int
    color: str | None

    @property
    def name(self) -> str:
        """With the definite article."""
        return f"the {self.thing.name}"


def place_of(column: int, row: int, grid: tuple[int, int]) -> str:
    """A cell in words: ``top left``, ``bottom``, ``middle``.

    Args:
        column: from 0 on.
        row: from 0 on.
        grid: number of columns and rows, 1 to 3 each.
    """
    words = [word for word in (_ROWS[grid[1]][row], _COLUMNS[grid[0]][column]) if word]
    return "middle" if words == ["middle", "middle"] else " ".join(words)


def ask_about(placed: Sequence[Placed], absent: Thing | None, rng: random.Random) -> tuple[list[Turn], str]:
    """Draws one to four questions, each of another kind, whose answers earlier turns do not give away.

    Args:
        placed: two things or more.
        absent: a thing that is not there.
        rng: of the choice.

    Returns:
        (question, answer) pairs, and the kind of the last.
    """
    if rng.random() < 0.15:
        return [(rng.choice(("describe the picture.", "what is where?", "caption:")), describe(placed))], "caption"
    names = [one.thing.name for one in placed]
    single = [one for one in placed if names.count(one.thing.name) == 1]
    makers: dict[str, Callable[[], Turn | None]] = {
        "count": lambda: _count(placed, rng),
        "where": lambda: _where(single, rng),
        "what": lambda: _what(placed, rng),
        "relation": lambda: _relation(single, rng),
        "size": lambda: _larger(single, rng),
        "color": lambda: _color(single, rng),
        "presence": lambda: _presence(placed, absent, rng),
    }
    wanted = rng.choices((1, 2, 3, 4), (3, 3, 2, 1))[0]
    turns: list[Turn] = []
    kind = ""
    for name in rng.sample(list(makers), len(makers)):
        turn = makers[name]()
        if turn is None or any(_reveals(before, turn) for before in turns):
            continue
        turns.append(turn)
        kind = name
        if len(turns) == wanted:
            break
    return turns, kind


def _reveals(before: Turn, turn: Turn) -> bool:
    """Whether an earlier turn has the answer, or its answer stands in this question."""
    answers = turn[1] in before[0] if len(turn[1]) > 3 else turn[1] == before[1] and turn[1].isdigit()
    return answers or turn[1] == before[1] or (len(before[1]) > 3 and before[1] in turn[0])


def describe(placed: Sequence[Placed]) -> str:
    """What is where, row by row."""
    order = sorted(placed, key=lambda one: (one.row, one.column))
    parts = [f"{with_article(one.thing.name)} at the {one.place}" for one in order]
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) + "."


def _count(placed: Sequence[Placed], rng: random.Random) -> Turn:
    if rng.random() < 0.5:
        return rng.choice(("how many things are there?", "count the things.")), str(len(placed))
    one = rng.choice(placed)
    count = sum(other.thing.name == one.thing.name for other in placed)
    return f"how many times is {one.name} shown?", str(count)


def _where(single: Sequence[Placed], rng: random.Random) -> Turn | None:
    if not single:
        return None
    one = rng.choice(single)
    return rng.choice(("where is {}?", "in which part of the picture is {}?")).format(one.name), one.place


def _what(placed: Sequence[Placed], rng: random.Random) -> Turn:
    one = rng.choice(placed)
    return rng.choice(("what is at the {}?", "what do you see at the {}?")).format(one.place), one.thing.name


def _relation(single: Sequence[Placed], rng: random.Random) -> Turn | None:
    pairs = [(one, other) for one in single for other in single if one is not other]
    rng.shuffle(pairs)
    for one, other in pairs:
        if one.column != other.column and (one.row == other.row or rng.random() < 0.5):
            true, false = ("left", "right") if one.column < other.column else ("right", "left")
            true, false = f"to the {true} of", f"to the {false} of"
        elif one.row != other.row:
            true, false = ("above", "below") if one.row < other.row else ("below", "above")
        else:
            continue
        yes = rng.random() < 0.5
        return f"is {one.name} {true if yes else false} {other.name}?", "yes" if yes else "no"
    return None


def _larger(single: Sequence[Placed], rng: random.Random) -> Turn | None:
    pairs = [(a, b) for a in single for b in single if a.side > _CLEARLY_LARGER * b.side]
    if not pairs:
        return None
    large, small = rng.choice(pairs)
    first, second = rng.sample((large, small), 2)
    if rng.random() < 0.5:
        return f"which is larger, {first.name} or {second.name}?", large.thing.name
    return f"which is smaller, {first.name} or {second.name}?", small.thing.name


def _color(single: Sequence[Placed], rng: random.Random) -> Turn | None:
    colored = [one for one in single if one.color is not None]
    if not colored:
        return None
    one = rng.choice(colored)
    return f"what color is {one.name} mostly?", str(one.color)


def _presence(placed: Sequence[Placed], absent: Thing | None, rng: random.Random) -> Turn:
    thing = absent if absent is not None and rng.random() < 0.5 else rng.choice(placed).thing
    return f"is there {with_article(thing.name)} in the picture?", "no" if thing is absent else "yes"

"""How sources ask: a form of each question, a few questions for each picture, yes as often as no."""

from __future__ import annotations

import random
from collections.abc import Sequence

Turn = tuple[str, str]
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


def one_form(rng: random.Random, forms: str, **values: object) -> str:
    """One of the forms of a question, which ``|`` separates, with its values filled in."""
    return rng.choice(forms.split("|")).strip().format(**values)


def some(rng: random.Random, first: Sequence[Turn], others: Sequence[Turn], most: int = 4) -> tuple[Turn, ...]:
    """One to ``most`` different questions in random order, nearly always one of ``first``, which is the chief matter.

    The chance of one more question is a half each time.
    """
    first, others = list(first), list(others)
    rng.shuffle(first)
    rng.shuffle(others)
    ranked = first[:1] + others + first[1:] if rng.random() < 0.85 or not others else others + first
    count = 1
    while count < min(most, len(ranked)) and rng.random() < 0.5:
        count += 1
    chosen = ranked[:count]
    rng.shuffle(chosen)
    return tuple(dict(chosen).items())


def place_name(x: float, y: float) -> str:
    """``top left`` to ``bottom right``, of a position from 0 to 1 to the right and down."""
    return f"{ROWS[min(2, int(y * 3))]} {COLUMNS[min(2, int(x * 3))]}"


def is_clear(x: float, y: float, room: float = 0.05) -> bool:
    """Whether a position is farther than ``room`` from the lines between the nine places."""
    return all(abs(value - line / 3) > room for value in (x, y) for line in (1, 2))


def yes_no(truth: bool) -> str:
    """``yes`` or ``no``."""
    return "yes" if truth else "no"

"""Printed formulas as a source of pictures, to be read off as text: fractions, powers, indices, roots and sums."""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

from neo_components.data.pictures import palette
from neo_components.data.pictures.asking import Turn, one_form, some, yes_no
from neo_components.data.pictures.fonts import NEEDS, Fonts
from neo_components.data.pictures.formula_layout import Part, lay_out
from neo_components.data.pictures.ink import lay, scaled_to_fit
from neo_components.data.pictures.picture import DETAIL, FRAME, MIRROR, SPLITS, TURN, Picture, PictureSource
from neo_components.errors import one_of
from neo_components.registry import PICTURES

VARIABLES = "abcnkmpqrstuvwxyz"
READ = (
    "read the formula.|what is the formula?|write the formula as text.|which formula is shown?|transcribe the formula."
)
KINDS = ("sum of terms", "fraction", "power", "root", "index", "equation", "sum")

Written = tuple[Part, str]
"""A formula and how it is read off: ``x^2``, ``a/b``, ``sqrt(x)``, ``x_1``, ``sum(k=1..n) k``."""


@PICTURES.register("formulas")
class Formulas(PictureSource):
    """Formulas in plain fonts; the held-out ones are set in held-out fonts.

    They are read off as ``(a + b)/2``, ``x^2``, ``x_1``, ``sqrt(x)`` and ``sum(k=1..n) k``.
    """

    license: ClassVar[str] = "OFL-1.1 AND Apache-2.0"
    origin: ClassVar[str] = "drawn at random; fonts of PyPI packages fontpkg-*"
    needs: ClassVar[tuple[str, ...]] = NEEDS

    def __init__(self, packages: Path) -> None:
        super().__init__(packages)
        self.fonts = Fonts(packages)

    def items(self, split: str) -> None:
        """Formulas are drawn without end."""
        one_of("split", split, SPLITS)

    def draw(self, number: int, split: str, rng: random.Random) -> Picture:
        """A formula with its questions."""
        face = self.fonts.pick_plain(rng, split)
        kind = rng.choice(KINDS)
        part, text = formula(rng, kind)
        box = lay_out(part, face, rng.randint(20, 44))
        mask = scaled_to_fit(box.mask, 204, 150)
        wide, high = (max(72, mask.width + rng.randint(10, 20)), max(48, mask.height + rng.randint(12, 50)))
        if rng.random() < 0.7:
            grays = (rng.randint(0, 60), rng.randint(215, 255))
            ink, ground = ((gray,) * 3 for gray in (grays if rng.random() < 0.85 else grays[::-1]))
        else:
            _, ink, _, ground = palette.pair(rng, 4)
        image = palette.ground(rng, (wide, high), ground)
        lay(image, mask, ink, (rng.uniform(4, wide - mask.width - 4), rng.uniform(4, high - mask.height - 4)))
        turns = some(rng, [(one_form(rng, READ), text)], formula_turns(rng, text), most=3)
        return Picture(image, turns, "formula", frozenset({TURN, MIRROR, FRAME, DETAIL}))


def formula_turns(rng: random.Random, text: str) -> list[Turn]:
    """Questions whether a sign is there, asked so that both answers are as frequent as they come."""
    turns = []
    letters = sorted(
        {sign for sign in text.replace("sqrt", "").replace("sum", "").replace("prod", "") if sign.isalpha()}
    )
    truth = rng.random() < 0.5
    missing = [sign for sign in VARIABLES if sign not in letters]
    if letters:
        letter = rng.choice(letters if truth else missing)
        turns.append(
            (one_form(rng, "does the formula contain {x}?|is there {x} in the formula?", x=letter), yes_no(truth))
        )
    digits = sorted({sign for sign in text if sign.isdigit()})
    if digits:
        truth = rng.random() < 0.5
        digit = rng.choice(digits if truth else [sign for sign in "0123456789" if sign not in digits])
        turns.append(
            (
                one_form(rng, "does the formula contain the digit {x}?|is there a {x} in the formula?", x=digit),
                yes_no(truth),
            )
        )
    if " = " in text:
        turns.append((one_form(rng, "what is on the left of the equals sign?"), text.split(" = ")[0]))
        turns.append((one_form(rng, "what is on the right of the equals sign?"), text.split(" = ")[1]))
    return turns


def formula(rng: random.Random, kind: str) -> Written:
    """A random formula of a kind of :data:`KINDS`."""
    if kind == "equation":
        left, right = _expression(rng), _atom(rng)
        return _row(left[0], _text(" = "), right[0]), f"{left[1]} = {right[1]}"
    if kind == "sum of terms":
        return _terms(rng, rng.randint(2, 3))
    return _BUILD[kind](rng)


def _text(text: str) -> Part:
    return Part("text", text)


def _row(*parts: Part) -> Part:
    return Part("row", parts=parts)


def _atom(rng: random.Random) -> Written:
    text = (
        rng.choice(VARIABLES)
        if rng.random() < 0.6
        else str(rng.randint(1, 9) if rng.random() < 0.6 else rng.randint(10, 99))
    )
    return _text(text), text


def _term(rng: random.Random) -> Written:
    """A number, a letter, a number times a letter, or a power."""
    chance = rng.random()
    if chance < 0.4:
        return _atom(rng)
    if chance < 0.7:
        text = f"{rng.randint(2, 9)}{rng.choice(VARIABLES)}"
        return _text(text), text
    return _power(rng)


def _terms(rng: random.Random, count: int) -> Written:
    part, text = _term(rng)
    parts = [part]
    for _ in range(count - 1):
        sign = rng.choice("+-")
        part, more = _term(rng)
        parts += [_text("\u2212" if sign == "-" else "+"), part]
        text = f"{text} {sign} {more}"
    return _row(*parts), text


def _power(rng: random.Random) -> Written:
    base = rng.choice(VARIABLES) if rng.random() < 0.8 else str(rng.randint(2, 9))
    raised = str(rng.choice((2, 2, 3, 4, 5, 6, 7, 8, 9))) if rng.random() < 0.75 else rng.choice("nkmp")
    return Part("power", parts=(_text(base), _text(raised))), f"{base}^{raised}"


def _index(rng: random.Random) -> Written:
    letter = rng.choice("abcpqrtuvwxyz")
    low, other = rng.choice((("1", "2"), ("n", "n+1"), ("0", "1"), ("k", "n"), ("i", "j"), ("1", "n")))
    one = Part("index", parts=(_text(letter), _text(low)))
    two = Part("index", parts=(_text(letter), _text(other)))
    sign = rng.choice("+-=")
    shown = "\u2212" if sign == "-" else sign
    second = f"{letter}_{other}" if len(other) == 1 else f"{letter}_({other})"
    return _row(one, _text(shown), two), f"{letter}_{low} {sign} {second}"


def _fraction(rng: random.Random) -> Written:
    above, below = _expression_flat(rng), _expression_flat(rng)
    text = "/".join(one if one.isalnum() and len(one) < 3 else f"({one})" for _, one in (above, below))
    part: Part = Part("fraction", parts=(above[0], below[0]))
    if rng.random() < 0.3:
        more, read = _atom(rng)
        sign = rng.choice("+-")
        return _row(part, _text("\u2212" if sign == "-" else "+"), more), f"{text} {sign} {read}"
    return part, text


def _expression_flat(rng: random.Random) -> Written:
    return _atom(rng) if rng.random() < 0.6 else _terms(rng, 2)


def _expression(rng: random.Random) -> Written:
    return rng.choice((_power, _fraction, _root, _term))(rng) if rng.random() < 0.6 else _terms(rng, 2)


def _root(rng: random.Random) -> Written:
    inner = _expression_flat(rng)
    return Part("root", parts=(inner[0],)), f"sqrt({inner[1]})"


def _sum(rng: random.Random) -> Written:
    letter, symbol = rng.choice("kijn"), rng.choice(("sum", "sum", "prod"))
    first, last = (
        rng.choice("01"),
        rng.choice(("n", "m", str(rng.randint(3, 20)))) if letter != "n" else str(rng.randint(3, 20)),
    )
    inner: Written = rng.choice((
        (_text(letter), letter),
        (Part("power", parts=(_text(letter), _text("2"))), f"{letter}^2"),
        (Part("index", parts=(_text("x"), _text(letter))), f"x_{letter}"),
        (Part("index", parts=(_text("a"), _text(letter))), f"a_{letter}"),
        (Part("fraction", parts=(_text("1"), _text(letter))), f"1/{letter}"),
    ))  # fmt: skip
    part = Part("sum", symbol, (_text(f"{letter}={first}"), _text(last), inner[0]))
    return part, f"{symbol}({letter}={first}..{last}) {inner[1]}"


_BUILD = {"fraction": _fraction, "power": _power, "root": _root, "index": _index, "sum": _sum}

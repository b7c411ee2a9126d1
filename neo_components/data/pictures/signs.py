"""Questions about single letters and digits, and what distortions of pictures of text must leave as it is."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence

from neo_components.data.pictures import palette
from neo_components.data.pictures.asking import Turn, one_form, yes_no
from neo_components.data.pictures.picture import COLOR, DETAIL, FRAME, MIRROR, TURN

ABOUT_COLOR = re.compile(rf"\b(color|light|lighter|{'|'.join(palette.NAMES)})\b")
"""What a question has if its answer rests on colors."""
LETTERS = tuple(letter for letter in string.ascii_letters if letter != "l")
"""A small l on its own is a capital I in many fonts."""
CASE_SHOWS = frozenset("abdeghnqrtABDEGHNQRT")
"""Letters that show on their own whether they are capitals."""
ALIKE = frozenset("0Oo1Ii")
"""Digits and letters that look alike: what stands beside them distinguishes them."""
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def keeps(turns: Sequence[Turn]) -> frozenset[str]:
    """What distortions of a picture of text must not change: colors only if they are asked about."""
    asked = any(ABOUT_COLOR.search(question) for question, _ in turns)
    return frozenset({TURN, MIRROR, FRAME, DETAIL, *([COLOR] if asked else [])})


def sign_turns(
    rng: random.Random, sign: str, small_letters: bool = True, digits_per_letter: float = 1
) -> tuple[list[Turn], list[Turn]]:
    """Questions about a single letter or digit: which one it is, and others.

    Args:
        rng: source of randomness.
        sign: the letter or digit.
        small_letters: whether the font has them.
        digits_per_letter: how many digits are drawn for each letter, so that either answer comes equally often.
    """
    if sign.isdigit():
        forms = (
            "what digit is this?|which digit is shown?|what number is this?|name the digit.|which number do you see?"
        )
        first = [(one_form(rng, forms), sign)]
        if rng.random() < 0.3:
            forms = "what digit is this, as a word?|write the digit as a word.|spell the digit that is shown."
            first = [(one_form(rng, forms), DIGIT_NAMES[int(sign)])]
    else:
        forms = "what letter is this?|which letter is shown?|name the letter.|which letter do you see?"
        first = [(one_form(rng, forms), sign.upper())]
    truth = rng.random() < 0.5
    pool = string.digits if sign.isdigit() else string.ascii_uppercase
    other = sign.upper() if truth else rng.choice([one for one in pool if one != sign.upper()])
    article = "an" if other in "AEFHILMNORSX8" else "a"
    others = [(one_form(rng, "is this {a} {other}?|is it {a} {other}?", a=article, other=other), yes_no(truth))]
    if sign in CASE_SHOWS and small_letters:
        forms = "is it a capital letter?|is this an upper case letter?|is the letter upper case?"
        others.append((one_form(rng, forms), yes_no(sign.isupper())))
    if sign not in ALIKE and (not sign.isdigit() or rng.random() < 1 / digits_per_letter):
        forms = "is it a letter or a digit?|is this a digit or a letter?"
        others.append((one_form(rng, forms), "digit" if sign.isdigit() else "letter"))
    return first, others

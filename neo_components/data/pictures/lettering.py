"""Printed text as a source of pictures: letters, digits, words, numbers, lines, labels, prices, times and dates."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from neo_components.data.pictures import words
from neo_components.data.pictures.asking import Turn, is_clear, one_form, place_name, some, yes_no
from neo_components.data.pictures.fonts import NEEDS, Face, Fonts
from neo_components.data.pictures.picture import Picture, PictureSource
from neo_components.data.pictures.sheets import LABELS, Sheet, color_turns, write, write_label
from neo_components.data.pictures.signs import LETTERS, keeps, sign_turns
from neo_components.data.pictures.words import Words
from neo_components.registry import PICTURES

READ = (
    "what does it say?|what is written here?|read the text.|what text is shown?|transcribe the text.|what can you read?"
    "|what does the text say?"
)

Drawn = tuple[Sheet, list[Turn], list[Turn]]
"""A text with the questions that are its chief matter, and others."""


@PICTURES.register("lettering")
class Lettering(PictureSource):
    """Printed text in many fonts. Answers that are a single letter are capitals; read-offs keep small letters.

    The number chooses the family of fonts, so that all are drawn equally often.
    """

    license: ClassVar[str] = "OFL-1.1 AND Apache-2.0 AND MIT"
    origin: ClassVar[str] = "drawn text; fonts of PyPI packages fontpkg-* (Google Fonts), words of wonderwords"
    needs: ClassVar[tuple[str, ...]] = (*NEEDS, words.PACKAGE)

    def __init__(self, packages: Path) -> None:
        super().__init__(packages)
        self.fonts, self.words = Fonts(packages), Words(packages)

    def items(self, split: str) -> int:
        """Number of families of fonts."""
        return len(self.fonts.families(split))

    def draw(self, number: int, split: str, rng: random.Random) -> Picture:
        """A text in the font of a number."""
        families = self.fonts.families(split)
        face = rng.choice(self.fonts.faces(families[number % len(families)]))
        kind = rng.choices(tuple(_KINDS), [often for often, _ in _KINDS.values()])[0]
        sheet, first, others = _KINDS[kind][1](rng, face, self.words)
        turns = some(rng, first, others)
        return Picture(sheet.image, turns, "text", keeps(turns))


def reading(rng: random.Random, shown: str) -> Turn:
    """Asks for the whole text, its lines joined by spaces."""
    return one_form(rng, READ), " ".join(shown.split())


def cased(rng: random.Random, face: Face, word: str) -> str:
    """A word in small letters, in capitals or with a first capital, as the font has them."""
    if not face.has_small_letters:
        return word.upper()
    chance = rng.random()
    if face.kind == "hand":
        return word if chance < 0.6 else word.capitalize() if chance < 0.85 else word.upper()
    return word if chance < 0.4 else word.upper() if chance < 0.8 else word.capitalize()


def _sign(rng: random.Random, face: Face, _: Words) -> Drawn:
    sign = rng.choice(string.digits if rng.random() < 0.5 else LETTERS)
    if not face.has_small_letters:
        sign = sign.upper()
    sheet = write(rng, face, sign)
    what = "digit" if sign.isdigit() else "letter"
    first, others = sign_turns(rng, sign, face.has_small_letters)
    if is_clear(sheet.x, sheet.y):
        forms = "where is the {what}?|in which part of the picture is the {what}?"
        others.append((one_form(rng, forms, what=what), place_name(sheet.x, sheet.y)))
    return sheet, first, others + color_turns(rng, sheet, text=what)


def _word(rng: random.Random, face: Face, vocabulary: Words) -> Drawn:
    word = cased(rng, face, vocabulary.word(rng))
    sheet = write(rng, face, word)
    first = [(one_form(rng, READ + "|which word is shown?|what word is this?|read the word."), word)]
    return (
        sheet,
        first,
        _about_word(rng, word, vocabulary, face) + color_turns(rng, sheet, text=rng.choice(("text", "word"))),
    )


def _about_word(rng: random.Random, word: str, vocabulary: Words, face: Face) -> list[Turn]:
    truth = rng.random() < 0.5
    other = word if truth else vocabulary.similar(rng, word)
    turns = [
        (
            one_form(rng, 'does it say "{other}"?|is the word "{other}"?|is "{other}" written here?', other=other),
            yes_no(truth),
        ),
        (
            one_form(rng, "how many letters does the word have?|how many letters are there?|count the letters."),
            str(len(word)),
        ),
        (one_form(rng, "what is the first letter?|with which letter does the word begin?"), word[0].upper()),
        (one_form(rng, "what is the last letter?|with which letter does the word end?"), word[-1].upper()),
    ]
    letter = (
        rng.choice(word)
        if rng.random() < 0.5
        else rng.choice([one for one in string.ascii_lowercase if one not in word.lower()])
    )
    turns.append((f"does the word contain the letter {letter.upper()}?", yes_no(letter in word)))
    # A first capital is never asked about: as it is, words in capitals and in small letters are equally many.
    if face.has_small_letters and face.kind != "hand" and (word.isupper() or word.islower()):
        forms = "is the word in capital letters?|is it written in upper case?|is everything in capitals?"
        turns.append((one_form(rng, forms), yes_no(word.isupper())))
    return turns


def _number(rng: random.Random, face: Face, _: Words) -> Drawn:
    shown = words.number(rng)
    sheet = write(rng, face, shown)
    forms = "what number is this?|which number is shown?|read the number.|what is the number?|what number do you see?"
    digits = [sign for sign in shown if sign.isdigit()]
    others = [
        (one_form(rng, "how many digits does it have?|how many digits are there?|count the digits."), str(len(digits))),
        (one_form(rng, "what is the first digit?|with which digit does it begin?"), digits[0]),
        (one_form(rng, "what is the last digit?|with which digit does it end?"), digits[-1]),
    ]
    truth = rng.random() < 0.5
    other = shown if truth else _other_number(rng, shown)
    others.append(
        (one_form(rng, "is this {other}?|is the number {other}?|does it say {other}?", other=other), yes_no(truth))
    )
    return sheet, [(one_form(rng, forms), shown)], others + color_turns(rng, sheet, text=rng.choice(("number", "text")))


def _other_number(rng: random.Random, shown: str) -> str:
    """The number with one digit changed, or another one."""
    if rng.random() < 0.5:
        index = rng.choice([index for index, sign in enumerate(shown) if sign.isdigit()])
        return shown[:index] + rng.choice([one for one in "123456789" if one != shown[index]]) + shown[index + 1 :]
    while (other := words.number(rng)) == shown:
        pass
    return other


def _phrase(rng: random.Random, face: Face, vocabulary: Words, count: int) -> str:
    parts = [vocabulary.word(rng) for _ in range(count)]
    if rng.random() < 0.2:
        parts[rng.randrange(count)] = str(rng.randint(1, 99))
    text = " ".join(parts)
    if not face.has_small_letters or (face.kind != "hand" and rng.random() < 0.25):
        return text.upper()
    return text if rng.random() < 0.5 else text[0].upper() + text[1:]


def _line(rng: random.Random, face: Face, vocabulary: Words) -> Drawn:
    shown = _phrase(rng, face, vocabulary, rng.randint(2, 4))
    sheet, parts = write(rng, face, shown if len(shown) < 22 else _folded(shown)), shown.split()
    truth = rng.random() < 0.5
    word = rng.choice(parts)
    other = word if truth else vocabulary.similar(rng, word)
    if other in parts:
        truth = True
    others = [
        (one_form(rng, "how many words are there?|how many words does it have?|count the words."), str(len(parts))),
        (one_form(rng, "what is the first word?|which word comes first?"), parts[0]),
        (one_form(rng, "what is the last word?|which word comes last?"), parts[-1]),
        (one_form(rng, 'is the word "{other}" there?|can you read "{other}"?', other=other), yes_no(truth)),
    ]
    return sheet, [reading(rng, shown)], others + color_turns(rng, sheet)


def _folded(text: str) -> str:
    """In two lines, broken at the space nearest to the middle."""
    spaces = [index for index, sign in enumerate(text) if sign == " "]
    middle = min(spaces, key=lambda index: abs(index - len(text) / 2))
    return text[:middle] + "\n" + text[middle + 1 :]


def _lines(rng: random.Random, face: Face, vocabulary: Words) -> Drawn:
    rows = [_phrase(rng, face, vocabulary, rng.choice((1, 1, 2))) for _ in range(rng.randint(2, 4))]
    if rng.random() < 0.3:
        rows[rng.randrange(len(rows))] = rng.choice((words.number, words.price, words.clock))(rng)
    sheet = write(rng, face, "\n".join(rows))
    asked = rng.randrange(len(rows))
    names = ("first", "second", "third", "fourth")
    others = [
        (one_form(rng, "what is written at the top?|what does the top line say?|what is the top line?"), rows[0]),
        (
            one_form(rng, "what is written at the bottom?|what does the bottom line say?|what is the last line?"),
            rows[-1],
        ),
        (
            one_form(
                rng, "what does the {n} line say?|read the {n} line.|what is on line {k}?", n=names[asked], k=asked + 1
            ),
            rows[asked],
        ),
        (one_form(rng, "how many lines are there?|how many lines of text are shown?|count the lines."), str(len(rows))),
    ]
    row = rng.choice(rows)
    upper = rng.choice(rows[: len(rows) // 2 + 1])
    lower = [line for line in rows if line != upper]
    if lower:
        other = rng.choice(lower)
        forms = 'is "{one}" above "{other}"?|is "{one}" written higher than "{other}"?'
        one, other = (upper, other) if rng.random() < 0.5 else (other, upper)
        if rows.count(one) == rows.count(other) == 1:
            others.append((one_form(rng, forms, one=one, other=other), yes_no(rows.index(one) < rows.index(other))))
    if rows.count(row) == 1 and row != rows[-1]:
        forms = 'what is written below "{row}"?|which line follows "{row}"?'
        others.append((one_form(rng, forms, row=row), rows[rows.index(row) + 1]))
    return sheet, [reading(rng, " ".join(rows))], others + color_turns(rng, sheet)


def _label(rng: random.Random, face: Face, vocabulary: Words) -> Drawn:
    shown = cased(rng, face, vocabulary.word(rng)) if rng.random() < 0.6 else _phrase(rng, face, vocabulary, 2)
    if len(shown) > 12:
        shown = shown.replace(" ", "\n")
    shape = rng.choice(LABELS[:3])
    sheet = write_label(rng, face, shown, shape)
    forms = READ + "|what is on the label?|what does the label say?|what does the sign say?"
    others = color_turns(rng, sheet, "label")
    if shape != "rounded":
        answer = "round" if shape == "ellipse" else "angular"
        others.append((one_form(rng, "is the label round or angular?|is the sign angular or round?"), answer))
    return sheet, [(one_form(rng, forms), " ".join(shown.split()))], others


def _price(rng: random.Random, face: Face, vocabulary: Words) -> Drawn:
    cost, thing = words.price(rng), cased(rng, face, rng.choice(vocabulary.nouns))
    with_thing = rng.random() < 0.5
    shown = rng.choice((f"{thing}\n{cost}", f"{cost}\n{thing}")) if with_thing else cost
    sheet = write_label(rng, face, shown, rng.choice(LABELS))
    forms = "what does it cost?|what is the price?|how much is it?|which price is shown?|read the price."
    others = color_turns(rng, sheet, "price tag")
    if with_thing:
        others.append((one_form(rng, "what is sold?|what is it that is sold here?|which thing has this price?"), thing))
    truth = rng.random() < 0.5
    asked = cost if truth else words.price(rng)
    others.append((f"is the price {asked}?", yes_no(asked == cost)))
    return sheet, [(one_form(rng, forms), cost)], others


def _time(rng: random.Random, face: Face, _: Words) -> Drawn:
    shown = words.clock(rng)
    sheet = write(rng, face, shown) if rng.random() < 0.6 else write_label(rng, face, shown, rng.choice(LABELS[:3]))
    hour, minute = shown.split(" ")[0].split(":")
    others = [
        (one_form(rng, "what is the hour?|which hour is it?"), hour),
        (one_form(rng, "how many minutes past the hour is it?|what are the minutes?"), minute),
    ]
    forms = "what time is it?|what time is shown?|read the time.|which time does it say?"
    return sheet, [(one_form(rng, forms), shown)], others + color_turns(rng, sheet)


def _date(rng: random.Random, face: Face, _: Words) -> Drawn:
    shown, day, month, year = words.date(rng)
    if not face.has_small_letters:
        shown, month = shown.upper(), month.upper()
    sheet = write(rng, face, shown if rng.random() < 0.5 else _folded(shown))
    others = [
        (one_form(rng, "which month is it?|what is the month?|what month is written?"), month),
        (one_form(rng, "which year is it?|what is the year?|what year is written?"), year),
        (one_form(rng, "what is the day of the month?|which day of the month is it?"), day),
    ]
    forms = "what date is it?|what is the date?|which date is shown?|read the date."
    return sheet, [(one_form(rng, forms), shown)], others + color_turns(rng, sheet)


_KINDS: dict[str, tuple[int, Callable[[random.Random, Face, Words], Drawn]]] = {
    "sign": (5, _sign), "word": (6, _word), "number": (3, _number), "line": (3, _line), "lines": (3, _lines),
    "label": (2, _label), "price": (1, _price), "time": (1, _time), "date": (1, _date),
}  # fmt: skip
"""How often each kind of text is drawn, and by what."""

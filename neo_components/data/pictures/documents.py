"""Simple documents as a source of pictures: receipts, letters, notices and forms, with questions on what they say."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from PIL import Image, ImageDraw

from neo_components.data.pictures import palette, words
from neo_components.data.pictures.asking import Turn, one_form, some, yes_no
from neo_components.data.pictures.chart_data import NAME_SETS
from neo_components.data.pictures.fonts import Face
from neo_components.data.pictures.picture import DETAIL, FRAME, MIRROR, TURN, Picture
from neo_components.data.pictures.typeset import TypesetSource
from neo_components.data.pictures.words import Words
from neo_components.registry import PICTURES

PEOPLE = NAME_SETS[4]
TITLES = {
    "receipt": ("RECEIPT", "Invoice", "Bill", "Your order", "SHOP"),
    "letter": ("Letter", "Memo", "Note", "Message", "MEMO"),
    "notice": ("NOTICE", "Welcome", "Meeting", "Concert", "For sale", "Closed", "Lost"),
    "form": ("Form", "Ticket", "Pass", "Member card", "Label"),
}


@dataclass
class Page:
    """A document: lines of text, and what is asked about them.

    Args:
        title: the heading.
        lines: left and right part of each line; the right one may be empty.
        first: questions that are its chief matter.
        others: further questions.
    """

    title: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    first: list[Turn] = field(default_factory=list)
    others: list[Turn] = field(default_factory=list)


@PICTURES.register("documents")
class Documents(TypesetSource):
    """Documents of three to eight lines, black on light paper; the held-out ones are set in held-out fonts."""

    origin: ClassVar[str] = "drawn at random; fonts of PyPI packages fontpkg-*, words of wonderwords"

    def draw(self, number: int, split: str, rng: random.Random) -> Picture:
        """A document with its questions."""
        kind = rng.choice(tuple(_PAGES))
        page = Page(rng.choice(TITLES[kind]))
        _PAGES[kind](rng, page, self.words)
        forms = "what is the title?|what does the heading say?|what is written at the top?|what is the heading?"
        page.others.append((one_form(rng, forms), page.title))
        if rng.random() < 0.25:
            forms = "what kind of document is this?|is this a receipt, a letter, a notice or a form?"
            page.first = [(one_form(rng, forms), kind)]
        image = render(rng, page, self.fonts.pick_plain(rng, split))
        return Picture(image, some(rng, page.first, page.others), "document", frozenset({TURN, MIRROR, FRAME, DETAIL}))


def render(rng: random.Random, page: Page, face: Face) -> Image.Image:
    """Draws a document; the size of its text is as large as its longest line allows."""
    width = rng.randint(144, 224)
    margin = rng.randint(6, 14)
    room = width - 2 * margin
    rows = [left + ("   " + right if right else "") for left, right in page.lines]
    # Measuring takes as long as drawing: the two rows of most letters are enough.
    longest = max(face.at(16).getlength(row) for row in sorted(rows, key=len)[-2:]) / 16
    size = int(min(18, room / longest))
    if size < 12:  # a wider page rather than text that cannot be read
        width = min(224, round(width * 12 / max(size, 8)))
        size = max(11, int(min(12, (width - 2 * margin) / longest)))
    pitch = round(size * rng.uniform(1.3, 1.6))
    height = 2 * margin + round(size * 2.2) + pitch * len(rows)
    paper = palette.pale(rng) if rng.random() < 0.6 else (rng.randint(244, 255),) * 3
    image = palette.ground(rng, (width, min(224, max(96, height))), paper)
    draw, ink = ImageDraw.Draw(image), (rng.randint(0, 70),) * 3
    head = min(round(size * rng.uniform(1.15, 1.6)), int(16 * (width - 2 * margin) / face.at(16).getlength(page.title)))
    center = rng.random() < 0.6
    draw.text(
        (width / 2 if center else margin, margin), page.title, ink, face.at(max(11, head)), "ma" if center else "la"
    )
    y = margin + round(size * 2.2)
    if rng.random() < 0.4:
        draw.line((margin, y - size * 0.35, width - margin, y - size * 0.35), fill=ink)
    for left, right in page.lines:
        draw.text((margin, y), left, ink, face.at(size), "la")
        if right:
            draw.text((width - margin, y), right, ink, face.at(size), "ra")
        y += pitch
    if rng.random() < 0.25:
        draw.rectangle((1, 1, width - 2, image.height - 2), outline=ink)
    return image


def _receipt(rng: random.Random, page: Page, vocabulary: Words) -> None:
    date = words.date(rng)[0] if rng.random() < 0.6 else ""
    goods = rng.sample(vocabulary.nouns, rng.randint(2, 4))
    prices = [f"{rng.randint(1, 30)}.{rng.choice(('00', '50', '99', f'{rng.randint(0, 99):02d}'))}" for _ in goods]
    total = f"{sum(round(float(price) * 100) for price in prices) / 100:.2f}"
    page.lines = [(date, "")] if date else []
    page.lines += [*zip(goods, prices, strict=True), ("Total", total)]
    asked = rng.randrange(len(goods))
    page.first = [
        (one_form(rng, "what is the total?|how much is it in all?|which sum is to be paid?|read the total."), total),
        (
            one_form(rng, "what does the {g} cost?|what is the price of the {g}?|how much is the {g}?", g=goods[asked]),
            prices[asked],
        ),
    ]
    if prices.count(prices[asked]) == 1:
        page.first.append((one_form(rng, "what costs {p}?|which thing costs {p}?", p=prices[asked]), goods[asked]))
    page.others = [(one_form(rng, "how many things were bought?|how many items are listed?"), str(len(goods)))]
    truth = rng.random() < 0.5
    thing = rng.choice(goods) if truth else rng.choice(vocabulary.nouns)
    page.others.append((one_form(rng, "is {g} on the receipt?|was {g} bought?", g=thing), yes_no(thing in goods)))
    if date:
        page.others.append((one_form(rng, "what is the date?|which date is on it?|read the date."), date))


def _letter(rng: random.Random, page: Page, vocabulary: Words) -> None:
    to, sender = rng.sample(PEOPLE, 2)
    date = words.date(rng)[0]
    lines = [f"{rng.choice(vocabulary.adjectives)} {rng.choice(vocabulary.nouns)}" for _ in range(rng.randint(1, 3))]
    page.lines = [(date, ""), (f"Dear {to},", ""), *((line, "") for line in lines), (sender, "")]
    page.first = [
        (one_form(rng, "who is it written to?|whom is the letter to?|who gets the letter?"), to),
        (one_form(rng, "who wrote it?|who signed it?|from whom is the letter?"), sender),
        (one_form(rng, "what is the date?|when was it written?|read the date."), date),
    ]
    page.others = [
        (one_form(rng, "what does the line below the greeting say?|what comes after the greeting?"), lines[0])
    ]
    truth = rng.random() < 0.5
    name = to if truth else rng.choice([one for one in PEOPLE if one != to])
    page.others.append((f"is the letter to {name}?", yes_no(truth)))


def _notice(rng: random.Random, page: Page, vocabulary: Words) -> None:
    day, clock = rng.choice(words.DAYS), words.clock(rng)
    room = f"{rng.choice(('Room', 'Hall', 'Gate', 'Floor'))} {rng.randint(1, 99)}"
    thing = f"{rng.choice(vocabulary.adjectives)} {rng.choice(vocabulary.nouns)}"
    page.lines = [(thing, ""), (day, ""), (clock, ""), (room, "")]
    if rng.random() < 0.5:
        cost = words.price(rng)
        page.lines.append((f"Price: {cost}", ""))
        page.others.append((one_form(rng, "what is the price?|what does it cost?|how much is it?"), cost))
    page.first = [
        (one_form(rng, "which day is it?|on which day is it?|which day of the week is named?"), day),
        (one_form(rng, "what time is it?|at what time is it?|when does it begin?"), clock),
        (one_form(rng, "where is it?|which place is named?|where does it take place?"), room),
        (one_form(rng, "what is it about?|what does the first line below the title say?"), thing),
    ]
    truth = rng.random() < 0.5
    other = day if truth else rng.choice([one for one in words.DAYS if one != day])
    page.others.append((f"is it on {other}?", yes_no(truth)))


def _form(rng: random.Random, page: Page, vocabulary: Words) -> None:
    values = {
        "Name": f"{rng.choice(PEOPLE)} {rng.choice(vocabulary.nouns).capitalize()}",
        "No.": str(rng.randint(100, 99999)),
        "Date": words.date(rng)[0],
        "City": rng.choice(NAME_SETS[6]),
        "Age": str(rng.randint(5, 95)),
        "Seat": f"{rng.randint(1, 40)}{rng.choice('ABCDEF')}",
        "Code": "".join(rng.choices("ABCDEFGHKMNPRSTUVWXYZ23456789", k=5)),
        "Color": rng.choice(palette.NAMES),
    }
    keys = rng.sample(list(values), rng.randint(3, 5))
    apart = rng.random() < 0.4
    page.lines = [(f"{key}:", values[key]) if apart else (f"{key}: {values[key]}", "") for key in keys]
    for key in keys:
        plain = {"No.": "number"}.get(key, key.lower())
        forms = "what is the {key}?|which {key} is given?|read the {key}."
        page.first.append((one_form(rng, forms, key=plain), values[key]))
    page.others = [(one_form(rng, "how many entries are there?|how many lines are below the title?"), str(len(keys)))]
    truth = rng.random() < 0.5
    pool = [key for key in values if key != "No." and (key in keys) == truth]
    if pool:
        page.others.append((f"is a {rng.choice(pool).lower()} given?".replace("a age", "an age"), yes_no(truth)))


_PAGES: dict[str, Callable[[random.Random, Page, Words], None]] = {
    "receipt": _receipt, "letter": _letter, "notice": _notice, "form": _form,
}  # fmt: skip

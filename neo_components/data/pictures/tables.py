"""Small tables of random data as a source of pictures: cells to be looked up, rows and columns, largest values."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image, ImageDraw

from neo_components.data.pictures import palette
from neo_components.data.pictures.asking import Turn, one_form, some, yes_no
from neo_components.data.pictures.chart_data import SERIES, some_names
from neo_components.data.pictures.fonts import Face
from neo_components.data.pictures.ink import line_height
from neo_components.data.pictures.picture import DETAIL, FRAME, MIRROR, TURN, Picture
from neo_components.data.pictures.typeset import TypesetSource
from neo_components.data.pictures.words import Words
from neo_components.registry import PICTURES

LONGEST_SIDE = 224
HEADS = ("item", "name", "place", "team", "month", "city", "type", "group")
"""What the first column is called."""
COLUMNS = (
    "price", "age", "count", "size", "score", "year", "sold", "stock", "points", "hours", "wins", "cost", "sum",
)  # fmt: skip


@dataclass
class Table:
    """A table: ``cells[row][column]`` are whole numbers, each row and column has a name.

    Args:
        head: name of the column of names; may be empty.
        rows: names of the rows.
        columns: names of the columns of numbers.
        cells: the numbers, no two of a column alike.
    """

    head: str
    rows: list[str]
    columns: list[str]
    cells: list[list[int]]


@PICTURES.register("tables")
class Tables(TypesetSource):
    """Tables of two to five rows and one to three columns of numbers beside the column of names."""

    origin: ClassVar[str] = "drawn from random data; fonts of PyPI packages fontpkg-*, words of wonderwords"

    def draw(self, number: int, split: str, rng: random.Random) -> Picture:
        """A table with its questions."""
        table = random_table(rng, self.words)
        image = render(rng, table, self.fonts.pick_plain(rng, split))
        first, others = table_turns(rng, table)
        return Picture(image, some(rng, first, others), "table", frozenset({TURN, MIRROR, FRAME, DETAIL}))


def random_table(rng: random.Random, vocabulary: Words) -> Table:
    """A table of random names and numbers."""
    rows = some_names(rng, vocabulary, rng.randint(2, 5), longest=7)
    count = rng.randint(1, 3)
    columns = list(rng.choice(SERIES)) if count == 2 and rng.random() < 0.4 else rng.sample(COLUMNS, count)
    top = rng.choice((9, 20, 99, 99, 999))
    columns_of_cells = [rng.sample(range(1, top + 1), len(rows)) for _ in columns]
    cells = [list(row) for row in zip(*columns_of_cells, strict=True)]
    return Table(rng.choice((*HEADS, "")), rows, columns, cells)


def render(rng: random.Random, table: Table, face: Face) -> Image.Image:
    """Draws a table: with lines or stripes or neither, its head in another color at times."""
    size = rng.randint(12, 18)
    grid = [
        [table.head, *table.columns],
        *([name, *map(str, row)] for name, row in zip(table.rows, table.cells, strict=True)),
    ]
    while True:
        font = face.at(size)
        pad = round(size * 0.5)
        widths = [round(max(font.getlength(row[column]) for row in grid)) + 2 * pad for column in range(len(grid[0]))]
        if sum(widths) < 212 or size <= 11:
            break
        size -= 1
    high = round(line_height(font) * rng.uniform(1.15, 1.5))
    margin = rng.randint(3, 12)
    wide, tall = sum(widths) + 2 * margin, high * len(grid) + 2 * margin
    image = Image.new("RGB", (max(96, wide), tall), palette.pale(rng) if rng.random() < 0.7 else (255, 255, 255))
    draw = ImageDraw.Draw(image)
    left, ink = (image.width - sum(widths)) // 2, (rng.randint(0, 70),) * 3
    _, head_rgb = palette.apart(rng, 1, (255, 255, 255), 2)[0]
    colored, striped, lined = rng.random() < 0.4, rng.random() < 0.3, rng.choice((0, 1, 1, 2))
    right = rng.random() < 0.6
    for number, row in enumerate(grid):
        y = margin + number * high
        filled = head_rgb if colored and number == 0 else (222, 226, 232) if striped and number % 2 == 0 else None
        if filled:
            draw.rectangle((left, y, left + sum(widths), y + high), fill=filled)
        fill = ink if not filled or palette.contrast(ink, filled) > palette.contrast((255,) * 3, filled) else (255,) * 3
        x = left
        for column, (text, width) in enumerate(zip(row, widths, strict=True)):
            to_right = right and column > 0
            draw.text(
                (x + width - pad if to_right else x + pad, y + high / 2), text, fill, font, "rm" if to_right else "lm"
            )
            x += width
        if lined == 2 or (lined == 1 and number == 1):
            draw.line((left, y, left + sum(widths), y), fill=ink)
    if lined == 2:
        draw.rectangle((left, margin, left + sum(widths), margin + high * len(grid)), outline=ink)
        for column in range(1, len(widths)):
            x = left + sum(widths[:column])
            draw.line((x, margin, x, margin + high * len(grid)), fill=ink)
    if max(image.size) > LONGEST_SIDE:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return image


def table_turns(rng: random.Random, table: Table) -> tuple[list[Turn], list[Turn]]:
    """Questions about a table: on its cells, and others."""
    row, column = rng.randrange(len(table.rows)), rng.randrange(len(table.columns))
    name, head, value = table.rows[row], table.columns[column], table.cells[row][column]
    forms = (
        "what is the {head} of {name}?|in the row {name}, what is under {head}?|read the cell {name}, {head}."
        "|which number is in row {name}, column {head}?"
    )
    first = [(one_form(rng, forms, head=head, name=name), str(value))]
    forms = "which row has {value} under {head}?|where is the {head} {value}?|for which row is {head} {value}?"
    first.append((one_form(rng, forms, value=value, head=head), name))
    largest = rng.random() < 0.5
    numbers = [cells[column] for cells in table.cells]
    best = table.rows[numbers.index(max(numbers) if largest else min(numbers))]
    word = rng.choice(("largest", "highest") if largest else ("smallest", "lowest"))
    first.append((one_form(rng, "which row has the {w} {head}?|where is the {head} {w}?", w=word, head=head), best))
    one, other = rng.sample(range(len(table.rows)), 2)
    truth = rng.random() < 0.5
    if (numbers[one] > numbers[other]) != truth:
        one, other = other, one
    question = f"is the {head} of {table.rows[one]} larger than that of {table.rows[other]}?"
    others = [
        (question, yes_no(truth)),
        (
            one_form(
                rng, "how many rows are there below the head?|how many rows does the table have, without the head?"
            ),
            str(len(table.rows)),
        ),
        (
            one_form(rng, "how many columns are there?|how many columns does the table have?"),
            str(len(table.columns) + 1),
        ),
        (one_form(rng, "what is the last column called?|what is the head of the last column?"), table.columns[-1]),
        (one_form(rng, "what is the name of the first row?|which name comes first?"), table.rows[0]),
        (one_form(rng, "what is the name of the last row?|which name comes last?"), table.rows[-1]),
    ]
    return first, others

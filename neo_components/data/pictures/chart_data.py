"""What charts and tables show: categories, series and values at random, and names for them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from neo_components.data.pictures import palette
from neo_components.data.pictures.words import DAYS, MONTHS, Words

NAME_SETS: tuple[tuple[str, ...], ...] = (
    tuple("ABCDEFGH"),
    ("Q1", "Q2", "Q3", "Q4"),
    tuple(month[:3] for month in MONTHS),
    tuple(day[:3] for day in DAYS),
    (
        "Ann",
        "Ben",
        "Cara",
        "Dan",
        "Eva",
        "Finn",
        "Gus",
        "Ida",
        "Jon",
        "Kim",
        "Leo",
        "Mia",
        "Ned",
        "Olga",
        "Paul",
        "Rosa",
    ),
    ("apple", "pear", "plum", "fig", "kiwi", "lime", "peach", "mango", "cherry", "grape"),
    ("Rome", "Oslo", "Lima", "Paris", "Cairo", "Delhi", "Tokyo", "Bern", "Quito", "Miami"),
    ("cat", "dog", "cow", "pig", "hen", "fox", "owl", "bee", "ant", "bat"),
    ("bus", "car", "train", "bike", "ship", "plane", "tram", "taxi"),
    ("tea", "milk", "juice", "water", "cola", "beer", "wine", "coffee"),
)
ORDERED = (1, 2, 3)
"""Which of the sets have an order that is kept: quarters, months, days."""
TOPS = (10, 20, 50, 100, 100, 200, 500, 1000)
TITLES = (
    "Sales", "Visitors", "Points", "Votes", "Rain", "Output", "Income", "Costs", "Growth", "Orders", "Score", "Stock",
    "Exports", "Profit", "Users", "Energy", "Weight", "Traffic", "Hours", "Members", "Prices", "Results", "Demand",
)  # fmt: skip
SERIES = (
    ("2019", "2020"), ("2023", "2024"), ("men", "women"), ("north", "south"), ("plan", "actual"), ("old", "new"),
    ("day", "night"), ("in", "out"), ("east", "west"), ("home", "away"),
)  # fmt: skip


@dataclass
class ChartData:
    """What a chart shows.

    Args:
        title: over the chart; may be empty.
        categories: names along its axis, or of its slices.
        series: names of the series; one empty name if there is only one.
        values: of each category, by series; whole numbers.
        top: end of the value axis.
        colors: name and shade of each series, or of each category if ``by_category``.
        by_category: whether each category has its own color.
        printed: whether the values are written in the chart.
    """

    title: str
    categories: list[str]
    series: list[str]
    values: list[list[int]]
    top: int
    colors: list[tuple[str, palette.RGB]]
    by_category: bool
    printed: bool


def some_names(rng: random.Random, words: Words, count: int, longest: int = 6) -> list[str]:
    """Different names of one kind, of at most ``longest`` letters; months and days in their order."""
    fitting = {number: [name for name in names if len(name) <= longest] for number, names in enumerate(NAME_SETS)}
    number = rng.choice([number for number, names in fitting.items() if len(names) >= count])
    if rng.random() < 0.35:
        nouns: set[str] = set()
        while len(nouns) < count:
            noun = rng.choice(words.nouns)
            if len(noun) <= longest:
                nouns.add(noun)
        return rng.sample(sorted(nouns), count)
    names = fitting[number]
    if number in ORDERED or (number == 0 and rng.random() < 0.7):
        start = rng.randint(0, len(names) - count)
        return names[start : start + count]
    return rng.sample(names, count)


def random_values(rng: random.Random, count: int, top: int, trend: int = 0) -> list[int]:
    """Whole numbers from a twelfth of ``top`` on, mostly apart.

    Args:
        rng: source of randomness.
        count: how many.
        top: the largest one.
        trend: 1 to rise from the first to the last, -1 to fall, 0 for any order.
    """
    low = max(1, top // 12)
    # Drawn from a grid of levels, so that no two are too near to be told apart.
    levels = rng.sample(range(12), count) if count <= 12 else [rng.randrange(12) for _ in range(count)]
    if trend:
        levels.sort(reverse=trend < 0)
    step = (top - low) / 12
    return [min(top, low + round((level + rng.uniform(0.3, 0.9)) * step)) for level in levels]


def shares(rng: random.Random, count: int) -> list[int]:
    """Percentages that add up to 100, none below 5."""
    parts = [rng.uniform(0.4, 1) * rng.choice((1, 2, 3)) for _ in range(count)]
    whole = [5 + round((100 - 5 * count) * part / sum(parts)) for part in parts]
    whole[whole.index(max(whole))] += 100 - sum(whole)
    return whole


def clear_extreme(values: Sequence[int], top: int, largest: bool) -> int | None:
    """Index of the largest or smallest value if it is apart from the next by 6 % of the axis."""
    order = sorted(range(len(values)), key=lambda index: values[index], reverse=largest)
    if len(order) < 2 or abs(values[order[0]] - values[order[1]]) < 0.06 * top:
        return None
    return order[0]

"""Questions about charts: kind, title, highest and lowest, values that are printed, colors, counts and trends."""

from __future__ import annotations

import random
from itertools import pairwise

from neo_components.data.pictures.asking import Turn, one_form, yes_no
from neo_components.data.pictures.chart_data import ChartData, clear_extreme
from neo_components.data.pictures.chart_drawing import color_of

KIND_NAMES = {
    "bar": "bar chart", "horizontal bar": "bar chart", "grouped bar": "bar chart", "line": "line chart",
    "pie": "pie chart", "scatter": "scatter plot",
}  # fmt: skip
PARTS = {
    "bar": "bar", "horizontal bar": "bar", "grouped bar": "group", "line": "point", "pie": "slice", "donut": "slice",
    "stacked bar": "bar", "dot": "dot",
}  # fmt: skip
"""What a category is called in each kind of chart."""

Turns = tuple[list[Turn], list[Turn]]


def chart_turns(rng: random.Random, kind: str, data: ChartData, named: bool = True) -> Turns:
    """Questions about a chart: on its values, and others.

    Args:
        rng: source of randomness.
        kind: of chart.
        data: that it shows.
        named: whether to ask what kind of chart it is.
    """
    others = _frame_turns(rng, kind, data, named)
    if len(data.series) > 1:
        return _double_turns(rng, kind, data), others
    return _value_turns(rng, kind, data), others + _color_turns(rng, kind, data)


def _frame_turns(rng: random.Random, kind: str, data: ChartData, named: bool) -> list[Turn]:
    turns = []
    if named:
        forms = "what kind of chart is this?|what type of chart is shown?|which kind of diagram is this?"
        turns.append((one_form(rng, forms), KIND_NAMES[kind]))
        if kind in ("bar", "horizontal bar"):
            forms = "are the bars vertical or horizontal?|do the bars go up or to the side: vertical or horizontal?"
            turns.append((one_form(rng, forms), "horizontal" if kind == "horizontal bar" else "vertical"))
    if data.title:
        forms = (
            "what is the title?|what is the chart called?|what is the title of the chart?|what does the heading say?"
        )
        turns.append((one_form(rng, forms), data.title))
    if kind not in ("grouped bar", "line", "scatter"):
        forms = "how many {p}s are there?|count the {p}s.|how many {p}s does the chart have?"
        turns.append((one_form(rng, forms, p=PARTS[kind]), str(len(data.categories))))
    return turns


def _value_turns(rng: random.Random, kind: str, data: ChartData) -> list[Turn]:
    values, turns = data.values[0], []
    part = PARTS[kind]
    largest = rng.random() < 0.5
    if (found := clear_extreme(values, data.top, largest)) is not None:
        word = "largest" if largest else "smallest"
        high = rng.choice(("highest", "largest") if largest else ("lowest", "smallest"))
        forms = {
            "slice": "which slice is the {word}?|which category is the {word}?|what has the {word} share?",
            "point": "where is the line {high}?|at which category is it {high}?|which category has the {high} value?",
        }.get(part, "which {part} is the {high}?|which category has the {high} value?|what has the {high} {part}?")
        if part == "point":
            high = "highest" if largest else "lowest"
        turns.append((one_form(rng, forms, word=word, high=high, part=part), data.categories[found]))
    one, other = rng.sample(range(len(values)), 2)
    if abs(values[one] - values[other]) > 0.06 * data.top:
        truth = rng.random() < 0.5
        word = rng.choice(("larger", "smaller") if part == "slice" else ("higher", "lower"))
        if (values[one] > values[other]) != (truth == (word in ("larger", "higher"))):
            one, other = other, one
        forms = "is {a} {word} than {b}?|is the value of {a} {word} than that of {b}?"
        names = {"a": data.categories[one], "b": data.categories[other]}
        turns.append((one_form(rng, forms, word=word, **names), yes_no(truth)))
    if data.printed:
        asked = rng.randrange(len(values))
        forms = (
            "what is the value of {name}?|which value does {name} have?|how much is {name}?|read the value of {name}."
        )
        unit = "%" if part == "slice" else ""
        turns.append((one_form(rng, forms, name=data.categories[asked]), f"{values[asked]}{unit}"))
        if values.count(values[asked]) == 1:
            forms = "which category has the value {v}?|what has the value {v}?"
            turns.append((one_form(rng, forms, v=f"{values[asked]}{unit}"), data.categories[asked]))
    if kind == "line":
        rising = all(one < other for one, other in pairwise(values))
        falling = all(one > other for one, other in pairwise(values))
        answer = "rising" if rising else "falling" if falling else "neither"
        forms = (
            "is the line rising, falling or neither?|does the line go steadily up or down: rising, falling or neither?"
        )
        turns.append((one_form(rng, forms), answer))
    return turns or [("what is the first category?", data.categories[0])]


def _color_turns(rng: random.Random, kind: str, data: ChartData) -> list[Turn]:
    part = PARTS[kind]
    if not data.by_category:
        noun = "line" if kind == "line" else f"{part}s"
        verb = "is" if kind == "line" else "are"
        return [(one_form(rng, "what color {verb} the {noun}?", verb=verb, noun=noun), data.colors[0][0])]
    turns, asked = [], rng.randrange(len(data.categories))
    name, color = data.categories[asked], data.colors[asked][0]
    turns.append((one_form(rng, "what color is {name}?|which color does {name} have?", name=name), color))
    turns.append(
        (
            one_form(
                rng,
                "which category is {color}?|what is shown in {color}?|what does the {color} {part} stand for?",
                color=color,
                part=part,
            ),
            name,
        )
    )
    largest = rng.random() < 0.5
    if (found := clear_extreme(data.values[0], data.top, largest)) is not None:
        words = ("largest", "smallest") if part == "slice" else ("highest", "lowest")
        turns.append((f"what color is the {words[not largest]} {part}?", color_of(data, 0, found)[0]))
    return turns


def _double_turns(rng: random.Random, kind: str, data: ChartData) -> list[Turn]:
    """About two series."""
    asked = rng.randrange(2)
    name, color = data.series[asked], data.colors[asked][0]
    turns = [
        (one_form(rng, "which color stands for {name}?|what color is {name}?", name=name), color),
        (one_form(rng, "what does {color} stand for?|which series is {color}?", color=color), name),
    ]
    category = rng.randrange(len(data.categories))
    first, second = (values[category] for values in data.values)
    if abs(first - second) > 0.06 * data.top:
        larger = rng.random() < 0.5
        word = "larger" if larger else "smaller"
        answer = data.series[(first > second) != larger]
        turns.append((f"which series is {word} at {data.categories[category]}?", answer))
        question = f"at {data.categories[category]}, is {data.series[0]} larger than {data.series[1]}?"
        turns.append((question, yes_no(first > second)))
    if kind == "stacked bar":
        totals = [sum(pair) for pair in zip(*data.values, strict=True)]
        largest = rng.random() < 0.5
        if (found := clear_extreme(totals, data.top, largest)) is not None:
            turns.append((f"which bar is the {'highest' if largest else 'lowest'}?", data.categories[found]))
    elif (found := clear_extreme(data.values[asked], data.top, largest=True)) is not None:
        turns.append((f"where is {name} highest?", data.categories[found]))
    return turns


def scatter_turns(rng: random.Random, data: ChartData, points: list[list[tuple[float, float]]], trend: int) -> Turns:
    """Questions about points: how many, whether they rise, and their colors."""
    forms = (
        "do the points rise, fall or neither from left to right?|from left to right: do points rise, fall or neither?"
    )
    first = (
        [(one_form(rng, forms), {1: "rise", -1: "fall", 0: "neither"}[trend])] if trend or len(points[0]) > 6 else []
    )
    if len(data.series) > 1:
        asked = rng.randrange(2)
        name, color = data.series[asked], data.colors[asked][0]
        first.append((one_form(rng, "which color stands for {name}?|what color is {name}?", name=name), color))
        first.append((f"how many {color} points are there?", str(len(points[asked]))))
        if len(points[0]) != len(points[1]):
            more = len(points[0]) > len(points[1])
            first.append(("which color has more points?", data.colors[not more][0]))
    else:
        first.append((one_form(rng, "how many points are there?|count the points."), str(len(points[0]))))
        first.append((one_form(rng, "what color are the points?"), data.colors[0][0]))
    return first, _frame_turns(rng, "scatter", data, True)

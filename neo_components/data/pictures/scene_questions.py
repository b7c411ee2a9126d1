"""Questions about a scene of flat shapes, one function each; ``None`` where the scene gives no clear answer."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import permutations

from neo_components.data.pictures.asking import Turn, is_clear, one_form, place_name, yes_no
from neo_components.data.pictures.naming import with_article
from neo_components.data.pictures.palette import NAMES
from neo_components.data.pictures.shapes import SHAPES, Thing

Pairs = Sequence[tuple[str, str]]
CLEAR = 0.08
"""By how much of the width or height two things must differ for one to be left of or above the other."""
LARGER = 1.35
"""By how much larger a thing must be to be called so."""
DESCRIBE = "describe the picture.|what do you see?|what is in the picture?|write a caption.|describe the scene."


def plural(shape: str, count: int = 2) -> str:
    """``crosses`` for ``cross``."""
    return shape if count == 1 else shape + ("es" if shape.endswith("ss") else "s")


def caption(things: Sequence[Thing]) -> str:
    """All things with fill and place, from top left to bottom right."""
    ordered = sorted(things, key=lambda thing: (int(thing.y * 3), int(thing.x * 3)))
    parts = []
    for thing in ordered:
        fill = "" if thing.fill == "filled" else f"{thing.fill} "
        parts.append(f"{with_article(fill + thing.name)} at the {place_name(thing.x, thing.y)}")
    return ", ".join(parts)


def names(things: Sequence[Thing]) -> list[Thing]:
    """The things that one name stands for: no other has the same color and shape."""
    counts = Counter(thing.name for thing in things)
    return [thing for thing in things if counts[thing.name] == 1]


def count_turn(rng: random.Random, kind: str, pair: tuple[str, str], things: Sequence[Thing]) -> Turn:
    """How many things have a color, a shape, or both."""
    color, shape = pair
    if kind == "color":
        count = sum(thing.color == color for thing in things)
        noun = f"{color} {rng.choice(('shapes', 'things', 'objects'))}"
    elif kind == "shape":
        count, noun = sum(thing.shape == shape for thing in things), plural(shape)
    else:
        count, noun = sum((thing.color, thing.shape) == pair for thing in things), f"{color} {plural(shape)}"
    forms = "how many {noun} are there?|count the {noun}.|what is the number of {noun}?|how many {noun} do you see?"
    return one_form(rng, forms, noun=noun), str(count)


def _total(rng: random.Random, things: Sequence[Thing], _: Pairs) -> Turn | None:
    forms = (
        "how many shapes are there?|how many things are there in all?|count the shapes.|how many objects do you see?"
    )
    return one_form(rng, forms), str(len(things))


def _where(rng: random.Random, things: Sequence[Thing], _: Pairs) -> Turn | None:
    clear = [thing for thing in names(things) if is_clear(thing.x, thing.y)]
    if not clear:
        return None
    thing = rng.choice(clear)
    forms = "where is the {name}?|in which part of the picture is the {name}?|where do you see the {name}?"
    return one_form(rng, forms, name=thing.name), place_name(thing.x, thing.y)


def _what_is_there(rng: random.Random, things: Sequence[Thing], _: Pairs) -> Turn | None:
    places = Counter(place_name(thing.x, thing.y) for thing in things)
    clear = [t for t in things if is_clear(t.x, t.y) and places[place_name(t.x, t.y)] == 1]
    if not clear:
        return None
    thing = rng.choice(clear)
    forms = "what is at the {place}?|which shape is at the {place}?|what do you see at the {place}?"
    return one_form(rng, forms, place=place_name(thing.x, thing.y)), thing.name


def _relation(rng: random.Random, things: Sequence[Thing], _: Pairs) -> Turn | None:
    if len(names(things)) < 2:
        return None
    one, other = rng.sample(names(things), 2)
    truth = rng.random() < 0.5
    across = [axis for axis in ("x", "y") if abs(getattr(one, axis) - getattr(other, axis)) > CLEAR]
    if not across:
        return None
    axis = rng.choice(across)
    before = getattr(one, axis) < getattr(other, axis)
    words = {"x": ("to the left of", "to the right of"), "y": ("above", "below")}[axis]
    relation = words[before != truth]
    return one_form(rng, "is the {a} {r} the {b}?", a=one.name, r=relation, b=other.name), yes_no(truth)


def _relation_open(rng: random.Random, things: Sequence[Thing], _: Pairs) -> Turn | None:
    if len(names(things)) < 2:
        return None
    one, other = rng.sample(names(things), 2)
    axis, words = rng.choice((("x", ("left", "right")), ("y", ("above", "below"))))
    if abs(getattr(one, axis) - getattr(other, axis)) < CLEAR:
        return None
    answer = words[getattr(one, axis) > getattr(other, axis)]
    forms = (
        "is the {a} to the left or to the right of the {b}?|left or right: where is the {a}, seen from the {b}?"
        if axis == "x"
        else "is the {a} above or below the {b}?|above or below: where is the {a}, seen from the {b}?"
    )
    return one_form(rng, forms, a=one.name, b=other.name), answer


def _extreme(rng: random.Random, things: Sequence[Thing], _: Pairs) -> Turn | None:
    """The thing farthest to a side."""
    if len(things) < 2:
        return None
    word, axis, sign = rng.choice(
        (("leftmost", "x", 1), ("rightmost", "x", -1), ("highest", "y", 1), ("lowest", "y", -1))
    )
    first, second = sorted(things, key=lambda thing: sign * getattr(thing, axis))[:2]
    if abs(getattr(first, axis) - getattr(second, axis)) < CLEAR:
        return None
    form, answer = rng.choice((
        ("which shape is the {w} one?", first.name), ("what is the {w} shape?", first.name),
        ("what color is the {w} shape?", first.color),
    ))  # fmt: skip
    return form.format(w=word), answer


def _nearest(rng: random.Random, things: Sequence[Thing], _: Pairs) -> Turn | None:
    """The color of the thing nearest to another; never that which the question names."""
    if len(things) < 3 or not names(things):
        return None
    thing = rng.choice(names(things))
    ranked = sorted((math.hypot(o.x - thing.x, o.y - thing.y), n) for n, o in enumerate(things) if o is not thing)
    found = things[ranked[0][1]]
    if ranked[1][0] < 1.2 * ranked[0][0] or found.color == thing.color:
        return None
    forms = ("what color is the shape nearest to the {name}?", "which shape is nearest to the {name}?")
    index = rng.randrange(2)
    return forms[index].format(name=thing.name), (found.color, found.name)[index]


def _color(rng: random.Random, things: Sequence[Thing], _: Pairs) -> Turn | None:
    shapes = Counter(thing.shape for thing in things)
    alone = [thing for thing in things if shapes[thing.shape] == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    forms = "what color is the {shape}?|which color does the {shape} have?|name the color of the {shape}."
    return one_form(rng, forms, shape=thing.shape), thing.color


def _shape(rng: random.Random, things: Sequence[Thing], _: Pairs) -> Turn | None:
    colors = Counter(thing.color for thing in things)
    alone = [thing for thing in things if colors[thing.color] == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    forms = (
        "what shape is {color}?|which shape is {color}?|what is the {color} thing?|what shape is the {color} object?"
    )
    return one_form(rng, forms, color=thing.color), thing.shape


def _size(rng: random.Random, things: Sequence[Thing], _: Pairs) -> Turn | None:
    if len(names(things)) < 2:
        return None
    one, other = rng.sample(names(things), 2)
    if max(one.half, other.half) < LARGER * min(one.half, other.half):
        return None
    if rng.random() < 0.5:
        word = rng.choice(("larger", "smaller"))
        truth = (one.half > other.half) == (word == "larger")
        return f"is the {one.name} {word} than the {other.name}?", yes_no(truth)
    word = rng.choice(("larger", "smaller"))
    answer = one if (one.half > other.half) == (word == "larger") else other
    return f"which is {word}, the {one.name} or the {other.name}?", answer.name


def _largest(rng: random.Random, things: Sequence[Thing], _: Pairs) -> Turn | None:
    if len(things) < 3:
        return None
    word = rng.choice(("largest", "smallest"))
    first, second = sorted(things, key=lambda thing: thing.half * (-1 if word == "largest" else 1))[:2]
    if max(first.half, second.half) < 1.2 * min(first.half, second.half):
        return None
    return one_form(rng, "what is the {w} shape?|which shape is the {w}?", w=word), first.name


def _exists(rng: random.Random, things: Sequence[Thing], pairs: Pairs) -> Turn | None:
    """Is there such a thing? Where there is not, its color and its shape are often both there, apart."""
    truth = rng.random() < 0.5
    there = {(thing.color, thing.shape) for thing in things}
    colors, shapes = {color for color, _ in there}, {shape for _, shape in there}
    kind = rng.choice(("both", "both", "color", "shape"))
    if truth:
        color, shape = rng.choice(sorted(there))
    elif kind == "both":
        missing = [pair for pair in pairs if pair not in there]
        near = [pair for pair in missing if pair[0] in colors and pair[1] in shapes]
        color, shape = rng.choice(near if near and rng.random() < 0.7 else missing)
    else:
        color = rng.choice([name for name in NAMES if name not in colors])
        shape = rng.choice([name for name in SHAPES if name not in shapes])
    if kind == "color":
        return one_form(
            rng, "is anything {c}?|is there something {c}?|is there {a} shape?", c=color, a=with_article(color)
        ), yes_no(truth)
    what = shape if kind == "shape" else f"{color} {shape}"
    return one_form(rng, "is there {a}?|do you see {a}?|does the picture show {a}?", a=with_article(what)), yes_no(
        truth
    )


def _fill(rng: random.Random, things: Sequence[Thing], _: Pairs) -> Turn | None:
    fills = Counter(thing.fill for thing in things)
    usable = [thing for thing in names(things) if fills[thing.fill] < len(things) or len(fills) > 1]
    if len(fills) < 2 or not usable:
        return None
    thing = rng.choice(usable)
    if fills[thing.fill] == 1 and rng.random() < 0.5:
        return one_form(rng, "which shape is {fill}?|what is {fill}?", fill=thing.fill), thing.name
    forms = (
        "is the {name} filled, outlined, striped, dotted or checked?",
        "how is the {name} drawn: filled, outlined or patterned?",
    )
    index = rng.randrange(2)
    answer = thing.fill if index == 0 or thing.fill in ("filled", "outlined") else "patterned"
    return forms[index].format(name=thing.name), answer


def _points(rng: random.Random, things: Sequence[Thing], _: Pairs) -> Turn | None:
    arrows = [thing for thing in things if thing.shape == "arrow"]
    if len(arrows) != 1:
        return None
    forms = "which way does the arrow point?|in which direction does the arrow point?|where does the arrow point?"
    return one_form(rng, forms), arrows[0].direction


def _alike(rng: random.Random, things: Sequence[Thing], _: Pairs) -> Turn | None:
    """Do two things have the same color or shape? Asked only where either answer could come."""
    what, by = rng.choice((("color", "shape"), ("shape", "color")))
    counts = Counter(getattr(thing, by) for thing in things)
    clear = [thing for thing in things if counts[getattr(thing, by)] == 1]
    found: dict[bool, list[tuple[Thing, Thing]]] = {True: [], False: []}
    for one, other in permutations(clear, 2):
        found[getattr(one, what) == getattr(other, what)].append((one, other))
    if not all(found.values()):
        return None
    truth = rng.random() < 0.5
    nouns = [getattr(thing, by) + ("" if what == "color" else " thing") for thing in rng.choice(found[truth])]
    return f"do the {nouns[0]} and the {nouns[1]} have the same {what}?", yes_no(truth)


def _count(rng: random.Random, things: Sequence[Thing], _: Pairs) -> Turn | None:
    """How many of a color or shape of which there are several, or at times none or one."""
    kind = rng.choice(("color", "shape"))
    counts = Counter(getattr(thing, kind) for thing in things)
    several = [name for name, count in counts.items() if count > 1]
    if not several or rng.random() < 0.3:
        name = rng.choice(NAMES if kind == "color" else SHAPES) if rng.random() < 0.5 else rng.choice(list(counts))
    else:
        name = rng.choice(several)
    return count_turn(rng, kind, (name, name), things)


QUESTIONS: tuple[Callable[[random.Random, Sequence[Thing], Pairs], Turn | None], ...] = (
    _total, _where, _what_is_there, _relation, _relation_open, _extreme, _nearest, _color, _shape, _size, _largest,
    _exists, _fill, _points, _alike, _count,
)  # fmt: skip

"""Which arms of benchmarks/reuse.py are compared, and by what: medians over seeds with their quartiles.

The control of an arm is the one with the same language model, task, training pairs, way of text and trained parts, and
new weights: at each measure the better of plain and whitened.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

NEW, REUSED = ("random", "whitened"), "reused"


class Done(Protocol):
    """An arm that was trained, as benchmarks/reuse.py keeps it."""

    weights: str
    train: str
    text: str
    llm: str
    task: str
    data: str
    source: str
    asset: str
    pairs: int
    seed: int
    blind: float
    device: str
    curve: list[tuple[int, float]]
    scores: list[tuple[int, dict[str, float]]]
    geometry: list[tuple[int, dict[str, float]]]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over seeds."""

    low: float
    median: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value, which may be infinite; quartiles are values or means of two neighbors."""
        ordered = sorted(values)
        low, median, high = (_between(ordered, part) for part in (0.25, 0.5, 0.75))
        return cls(low, median, high, len(ordered))

    def __str__(self) -> str:
        if self.count == 1:
            return number(self.median)
        return f"{number(self.median)} ({number(self.low)} to {number(self.high)})"


def _between(ordered: Sequence[float], part: float) -> float:
    """The quantile by linear interpolation."""
    place = part * (len(ordered) - 1)
    below, above = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
    return below if below == above else below + (place - int(place)) * (above - below)


def number(value: float) -> str:
    return "never" if value == inf else f"{value:.3f}"


@dataclass(frozen=True)
class Comparison:
    """Arms that differ in the weights of the pre-Buffer and in the seed, and in nothing else."""

    llm: str
    task: str
    train: str
    text: str
    pairs: int
    arms: tuple[Done, ...]

    @property
    def name(self) -> str:
        """Which one it is."""
        return f"{self.task} {self.llm} {self.train} {self.text}"

    @property
    def steps(self) -> int:
        """After which all were evaluated, the last ones."""
        return max(self.asked)

    @property
    def asked(self) -> list[int]:
        """Steps after which all were evaluated.

        Raises:
            ValueError: if there are none.
        """
        both = set.intersection(*({step for step, _ in arm.scores} for arm in self.arms))
        if not both:
            raise ValueError(
                f"the arms of {self.name} were evaluated after different steps; run all with the same --steps"
            )
        return sorted(both)

    def of(self, weights: str) -> list[Done]:
        """Its arms of some weights, by seed."""
        return sorted((arm for arm in self.arms if arm.weights == weights), key=lambda arm: arm.seed)

    def score(self, weights: str, step: int | None = None) -> Spread:
        """Exact match after a step, by default the last one that all have."""
        step = step or self.steps
        return Spread.of([dict(arm.scores)[step]["overall"] for arm in self.of(weights)])

    def loss(self, weights: str, step: int | None = None) -> Spread:
        """Smoothed validation loss after a step."""
        step = step or self.steps
        return Spread.of([dict(smooth(arm.curve))[step] for arm in self.of(weights)])

    @property
    def new(self) -> list[str]:
        """The kinds of new weights that were trained."""
        return [weights for weights in NEW if self.of(weights)]

    def best(self, step: int | None = None) -> str:
        """The kind of new weights with the higher exact match; of equal ones that with the lower loss."""
        return max(self.new, key=lambda name: (self.score(name, step).median, -self.loss(name, step).median))

    def fraction(self) -> Spread:
        """Samples that reused weights need for the control's final loss, as a fraction of the control's; seed by seed.

        The control is the kind of new weights with the lower median final loss. Steps have equally many tokens.
        """
        finals = {name: Spread.of([smooth(arm.curve)[-1][1] for arm in self.of(name)]).median for name in self.new}
        control = {arm.seed: smooth(arm.curve) for arm in self.of(min(finals, key=lambda name: finals[name]))}
        found = []
        for arm in self.of(REUSED):
            if arm.seed in control:
                last, level = control[arm.seed][-1]
                reached = next((step for step, value in smooth(arm.curve) if value <= level), inf)
                found.append(reached / last)
        if not found:
            raise ValueError(f"no seed of {self.name} has both new and reused weights")
        return Spread.of(found)


def smooth(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each loss as the mean of a validation and the two before it: a single one is luck by a hundredth or two."""
    return [
        (step, statistics.mean(value for _, value in curve[max(0, index - 2) : index + 1]))
        for index, (step, _) in enumerate(curve)
    ]


def comparisons(arms: Iterable[Done]) -> list[Comparison]:
    """The arms that are comparable, together; those without new or without reused weights are left out."""
    groups: dict[tuple[str, str, str, str, int], list[Done]] = {}
    for arm in arms:
        groups.setdefault((arm.llm, arm.task, arm.train, arm.text, arm.pairs), []).append(arm)
    found = [Comparison(*key, tuple(some)) for key, some in groups.items()]
    return sorted(
        (one for one in found if one.new and one.of(REUSED)), key=lambda one: (one.llm, one.task, one.train, one.text)
    )

"""Tables and targets from the arms of benchmarks/reuse.py.

All values are medians over seeds with their quartiles. The control of an arm is the one with the same language model,
task, training pairs, way of text and trained parts, and new weights: at each measure the better of plain and whitened.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Protocol, TypeVar

Key = TypeVar("Key")
NEW, REUSED = ("random", "whitened"), "reused"
QUARTER = 0.25
"""Of the control's samples, for its final loss."""
HALF = 0.5
"""Of the control's probe error."""
AHEAD = 0.15
"""Exact match after training on few pairs, over that of the control."""
MARKS = ("<!-- report -->", "<!-- end of report -->")
"""Of the part of a page that holds the report."""
MET, MISSED = "met", "missed"


class Done(Protocol):
    """An arm that was trained, as benchmarks/reuse.py keeps it."""

    weights: str
    train: str
    text: str
    llm: str
    task: str
    source: str
    pairs: int
    seed: int
    blind: float
    device: str
    curve: list[tuple[int, float]]
    scores: list[tuple[int, dict[str, float]]]
    geometry: list[tuple[int, dict[str, float]]]


class Probed(Protocol):
    """Errors of linear probes, as benchmarks/reuse_probe.py finds them."""

    source: str
    weights: str
    task: str
    seed: int
    features: str
    error: float


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
            return _number(self.median)
        return f"{_number(self.median)} ({_number(self.low)} to {_number(self.high)})"


def _between(ordered: Sequence[float], part: float) -> float:
    """The quantile by linear interpolation."""
    place = part * (len(ordered) - 1)
    below, above = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
    return below if below == above else below + (place - int(place)) * (above - below)


def _number(value: float) -> str:
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


def report(arms: Sequence[Done], probes: Sequence[Probed] = ()) -> str:
    """Tables and targets, as Markdown.

    Raises:
        ValueError: if there are arms of several sources, or none to compare.
    """
    if len(sources := {arm.source for arm in arms}) > 1:
        raise ValueError(
            f"arms of several sources are not compared: {', '.join(sorted(sources))}; choose one by --source"
        )
    found = comparisons(arms)
    if not found:
        raise ValueError("there is nothing to compare: no task has arms of new and of reused weights")
    most = {one.llm: max(other.pairs for other in found if other.llm == one.llm) for one in found}
    whole, few = ([one for one in found if (one.pairs == most[one.llm]) is all_pairs] for all_pairs in (True, False))
    parts = [table(some) for some in _groups(whole, lambda one: one.llm).values()]
    parts.append(geometry_table(whole))
    parts += [few_table(few)] * bool(few) + [probe_table(probes)] * bool(probes)
    parts.append("\n".join(targets(whole, few, probes)))
    parts.append("Device: " + "; ".join(sorted({arm.device for arm in arms})))
    return "\n\n".join(parts)


def _groups(some: Iterable[Comparison], by: Callable[[Comparison], Key]) -> dict[Key, list[Comparison]]:
    groups: dict[Key, list[Comparison]] = {}
    for one in some:
        groups.setdefault(by(one), []).append(one)
    return groups


def table(some: Sequence[Comparison]) -> str:
    """Loss, exact match, and samples to the control's final loss, for one language model."""
    seeds = max(len(one.of(REUSED)) for one in some)
    lines = [
        f"Language model {some[0].llm}, {some[0].pairs} training pairs, {some[0].steps} steps, {seeds} seeds", "",
        "| task | trained | text | weights | loss | exact match half way | exact match | samples for control's loss |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for one in some:
        for name in (*one.new, REUSED):
            half = one.asked[0]
            fraction = str(one.fraction()) if name == REUSED else ""
            cells = [one.task, one.train, one.text, name, one.loss(name), one.score(name, half), one.score(name)]
            lines.append(f"| {' | '.join(map(str, cells))} | {fraction} |")
    lines += ["", "Exact match without pictures: " + ", ".join(f"{t} {b:.2f}" for t, b in _blind(some).items())]
    return "\n".join(lines)


def _blind(some: Sequence[Comparison]) -> dict[str, float]:
    return {one.task: one.arms[0].blind for one in some}


GEOMETRY = {"visual/norm": "norm", "visual/mean_share": "share of the common mean", "visual/effective_rank": "rank"}


def geometry_table(some: Sequence[Comparison]) -> str:
    """Geometry of the visual tokens before the first and after the last step, medians over tasks and seeds."""
    lines = [
        "Visual tokens as they enter the language model, before and after training", "",
        f"| LLM | trained | text | weights | {' | '.join(GEOMETRY.values())} | norm of words |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (llm, train, text), group in _groups(some, lambda one: (one.llm, one.train, one.text)).items():
        for weights in (*NEW, REUSED):
            arms = [arm for one in group for arm in one.of(weights) if arm.geometry]
            if arms:
                ends = [
                    " to ".join(f"{statistics.median(arm.geometry[at][1][name] for arm in arms):.2f}" for at in (0, -1))
                    for name in (*GEOMETRY, "words/norm")
                ]
                lines.append(f"| {llm} | {train} | {text} | {weights} | {' | '.join(ends)} |")
    return "\n".join(lines)


def few_table(some: Sequence[Comparison]) -> str:
    """Exact match after training on few pairs."""
    lines = [
        "Few training pairs",
        "",
        "| task | LLM | trained | text | pairs | control | reused | ahead |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in sorted(some, key=lambda one: (one.llm, one.task, one.train, one.text, one.pairs)):
        control, reused = one.score(one.best()), one.score(REUSED)
        cells = [one.task, one.llm, one.train, one.text, one.pairs, f"{one.best()} {control}", reused]
        lines.append(f"| {' | '.join(map(str, cells))} | {reused.median - control.median:+.3f} |")
    return "\n".join(lines)


def probe_errors(probes: Sequence[Probed]) -> dict[tuple[str, str], tuple[float, float]]:
    """Median errors of new (the better kind) and of reused weights, by task and features."""
    found = {}
    for task, features in sorted({(one.task, one.features) for one in probes}):
        medians = {}
        for weights in (*NEW, REUSED):
            errors = [p.error for p in probes if (p.task, p.features, p.weights) == (task, features, weights)]
            if errors:
                medians[weights] = statistics.median(errors)
        if REUSED in medians and len(medians) > 1:
            found[task, features] = min(medians[name] for name in NEW if name in medians), medians[REUSED]
    return found


def probe_table(probes: Sequence[Probed]) -> str:
    """Errors of the linear probes."""
    lines = [
        "Errors of linear probes on frozen features",
        "",
        "| task | features | new weights | reused | ratio |",
        "|---|---|---|---|---|",
    ]
    for (task, features), (new, reused) in probe_errors(probes).items():
        lines.append(f"| {task} | {features} | {new:.3f} | {reused:.3f} | {ratio(reused, new):.2f} |")
    return "\n".join(lines)


def ratio(reused: float, new: float) -> float:
    """One error over another; 1 where both are 0."""
    return 1.0 if reused == new else reused / new if new else inf


def targets(whole: Sequence[Comparison], few: Sequence[Comparison], probes: Sequence[Probed]) -> list[str]:
    """A line for each target, met or missed, and where it is missed."""
    fractions = {one.name: one.fraction().median for one in whole}
    ahead = {one.name: one.score(REUSED).low - one.score(one.best()).high for one in whole}
    below = {
        f"{one.name} after {step}": one.score(REUSED, step).median - one.score(one.best(step), step).median
        for one in whole
        for step in one.asked
    }
    probed = {f"{task} {features}": ratio(*errors[::-1]) for (task, features), errors in probe_errors(probes).items()}
    fewer = {f"{one.name} {one.pairs}": one.score(REUSED).median - one.score(one.best()).median for one in few}
    return [
        _target("The control's final loss in at most a quarter of its samples", fractions, lambda v: v <= QUARTER),
        _target("Exact match ahead: lower quartile above the control's upper quartile", ahead, lambda v: v > 0),
        _target("Probe error at most half of that of new weights", probed, lambda v: v <= HALF),
        _target("Few pairs: at least 15 points ahead", fewer, lambda v: v >= AHEAD),
        _target("Exact match never below new weights, in the median", below, lambda v: v >= 0),
    ]  # fmt: skip


def into_page(text: str, page: Path) -> None:
    """Writes a report into a page, between :data:`MARKS`.

    Raises:
        ValueError: if the page has no such marks.
    """
    written = page.read_text(encoding="utf-8")
    if not all(mark in written for mark in MARKS):
        raise ValueError(f"{page} lacks the lines {MARKS[0]} and {MARKS[1]}, between which the report goes")
    before, after = written.split(MARKS[0])[0], written.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}", encoding="utf-8")


def _target(name: str, values: dict[str, float], good: Callable[[float], bool]) -> str:
    if not values:
        return f"- {name}: not measured"
    # Of quotients that are a hundredth of a hundredth over or under a limit none is meant.
    bad = {where: value for where, value in values.items() if not good(round(value, 6))}
    line = f"- {name}: {MISSED if bad else MET}, {len(values) - len(bad)} of {len(values)}"
    if bad:
        line += "; not " + ", ".join(f"{where} ({_number(value)})" for where, value in bad.items())
    return line

"""Tables and targets from the arms of benchmarks/reuse.py, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from math import inf
from pathlib import Path
from typing import Protocol, TypeVar

from reuse_compare import NEW, REUSED, Comparison, Done, comparisons, number

from neo_components.training.callbacks.visual_geometry import NAMES

Key = TypeVar("Key")
QUARTER = 0.25
"""Of the control's samples, for its final loss."""
HALF = 0.5
"""Of the control's probe error."""
AHEAD = 0.15
"""Exact match after training on few pairs, over that of the control."""
MARKS = ("<!-- report -->", "<!-- end of report -->")
"""Of the part of a page that holds the report."""
MET, MISSED = "met", "missed"


class Probed(Protocol):
    """Errors of linear probes, as benchmarks/reuse_probe.py finds them."""

    source: str
    weights: str
    task: str
    seed: int
    features: str
    error: float


def report(arms: Sequence[Done], probes: Sequence[Probed] = ()) -> str:
    """Tables and targets, as Markdown.

    Raises:
        ValueError: if there are arms of several sources or of several versions of a task, or none to compare.
    """
    if len(sources := {f"{arm.source} {arm.asset[:12]}" for arm in arms}) > 1:
        raise ValueError(
            f"arms of several sources are not compared: {', '.join(sorted(sources))}; choose one by --source, a name, "
            "a folder or the beginning of a checksum"
        )
    for task in {arm.task for arm in arms}:
        if len({arm.data for arm in arms if arm.task == task}) > 1:
            raise ValueError(f"task {task} had other samples in some of the arms; choose another --root for each")
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


def geometry_table(some: Sequence[Comparison]) -> str:
    """Geometry of the visual tokens before the first and after the last step, medians over tasks and seeds."""
    lines = [
        "Visual tokens as they enter the language model, before and after training", "",
        "| LLM | trained | text | weights | norm | share of the common mean | rank | norm of words |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (llm, train, text), group in _groups(some, lambda one: (one.llm, one.train, one.text)).items():
        for weights in (*NEW, REUSED):
            arms = [arm for one in group for arm in one.of(weights) if arm.geometry]
            if arms:
                ends = [
                    " to ".join(f"{statistics.median(arm.geometry[at][1][name] for arm in arms):.2f}" for at in (0, -1))
                    for name in NAMES
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
        line += "; not " + ", ".join(f"{where} ({number(value)})" for where, value in bad.items())
    return line

"""Tables and curves from the arms of benchmarks/reuse.py."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from neo_components.viewers.figure import COLOURS, new_figure, save

GOAL = "random bypass"
"""The arm whose lowest loss the others are to reach."""
DRAWN = ("random bypass", "random", "own", "none", "tuned bypass", "frozen bypass", "tuned")
LANGUAGE_MODELS = {"b": "same family, other width", "c": "other family, other tokenizer"}


class Done(Protocol):
    """An arm that was trained, as benchmarks/reuse.py keeps it."""

    arm: str
    llm: str
    source: str
    task: str
    seed: int
    device: str
    curve: list[tuple[int, float]]
    scores: list[tuple[int, dict[str, float]]]


Setting = tuple[str, str, str]
"""Task of the source, task that is learnt, language model."""


def report(arms: Sequence[Done], pictures: Path | None = None) -> str:
    """A table for each setting, as Markdown; the curves too if there is a folder for them."""
    settings = settings_of(arms)
    parts = [table(setting, some) for setting, some in settings.items()]
    parts += ["Device: " + "; ".join(sorted({arm.device for arm in arms}))]
    if pictures is not None:
        draw(settings, pictures / "reuse.png")
    return "\n\n".join(parts)


def settings_of(arms: Iterable[Done]) -> dict[Setting, list[Done]]:
    """The arms that are comparable, together. One that reuses nothing stands beside those of every source."""
    arms = list(arms)
    found: dict[Setting, list[Done]] = {}
    for source, task, llm in sorted({(arm.source, arm.task, arm.llm) for arm in arms}):
        found[source, task, llm] = [
            arm
            for arm in arms
            if (arm.task, arm.llm) == (task, llm) and (arm.source == source or reuses_nothing(arm.arm))
        ]
    return found


def reuses_nothing(arm: str) -> bool:
    """Whether the source does not matter to an arm."""
    return arm in (GOAL, "random", "own", "none")


def table(setting: Setting, arms: Sequence[Done]) -> str:
    """One line for each arm: means over its seeds, and the spread."""
    source, task, llm = setting
    steps = min(arm.curve[-1][0] for arm in arms)
    lines = [f"Source {source}, task {task}, language model {llm} ({LANGUAGE_MODELS.get(llm, 'of the source')})", ""]
    lines += [f"| arm | seeds | loss at {steps} | exact match at {steps} | lowest loss of `{GOAL}` reached | of its steps |"]
    lines.append("|---|---|---|---|---|---|")
    goals = {arm.seed: min(arm.curve, key=lambda point: point[1]) for arm in arms if arm.arm == GOAL}
    for name in dict.fromkeys(arm.arm for arm in arms):
        some = [arm for arm in arms if arm.arm == name]
        loss = spread([dict(arm.curve)[steps] for arm in some])
        score = spread([dict(arm.scores)[steps]["overall"] for arm in some])
        pairs = [(first_at(arm.curve, goals[arm.seed][1]), goals[arm.seed][0]) for arm in some if arm.seed in goals]
        lines.append(f"| {name} | {len(some)} | {loss} | {score} | {reached(pairs)} |")
    return "\n".join(lines)


def reached(pairs: Sequence[tuple[int | None, int]]) -> str:
    """Two cells: after how many steps an arm was there, on the mean of its seeds, and as a share of the goal's steps.

    Args:
        pairs: for each seed the arm's step, if it got there, and the step of the arm that set the goal.
    """
    there = [(step, goal) for step, goal in pairs if step is not None]
    if not there:
        return ("not reached" if pairs else "") + " | "
    when = f"step {statistics.mean(step for step, _ in there):.0f}"
    if len(there) < len(pairs):
        when += f" ({len(pairs) - len(there)} of {len(pairs)} seeds: not reached)"
    return f"{when} | {statistics.mean(step / goal for step, goal in there):.2f}"


def first_at(curve: Sequence[tuple[int, float]], loss: float) -> int | None:
    """The first validated step with a loss that low."""
    return next((step for step, value in curve if value <= loss), None)


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def draw(settings: dict[Setting, list[Done]], path: Path) -> Path:
    """Validation loss against steps, a diagram for each setting: mean of the seeds, and their range."""
    columns = min(3, len(settings))
    rows = -(-len(settings) // columns)
    figure = new_figure(4.2 * columns, 3.2 * rows)
    handles: dict[str, Any] = {}
    for place, ((source, task, llm), arms) in enumerate(settings.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        for number, name in enumerate(DRAWN):
            curves = [arm.curve for arm in arms if arm.arm == name]
            if not curves:
                continue
            steps = [step for step, _ in curves[0] if step]  # what is not trained at all is far above
            values = [[dict(curve)[step] for curve in curves] for step in steps]
            colour = [c for c in COLOURS if c != "#F0E442"][number]
            [handles[name]] = axes.plot(steps, [statistics.mean(some) for some in values], color=colour, label=name)
            axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)
        axes.set_yscale("log")
        axes.set_title(f"{source} to {task}, language model {llm}", fontsize=9)
        axes.set_xlabel("steps", fontsize=8)
        axes.set_ylabel("validation loss", fontsize=8)
        axes.tick_params(labelsize=7, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=6, frameon=False, fontsize=9)
    return save(figure, path)

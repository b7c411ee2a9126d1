"""Tables and curves from the arms of benchmarks/reuse.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from neo_components.viewers.figure import COLOURS, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOALS = ("random bypass", "random, LLM fixed")
"""The random arms, whose lowest loss the others are to reach: the second is that where the language model is fixed."""
FIXED = ", LLM fixed"
"""Ends the names of arms in which the language model does not learn."""
DRAWN = {
    "random bypass": COLOURS[0], "random, LLM fixed": COLOURS[0], "random": COLOURS[5], "own": COLOURS[4],
    "none": COLOURS[7], "tuned bypass": COLOURS[3], "tuned, LLM fixed": COLOURS[3], "frozen bypass": COLOURS[2],
    "frozen, LLM fixed": COLOURS[2], "tuned": COLOURS[1],
}  # fmt: skip
"""Arms whose curves are drawn, and in which colour."""
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
    return arm in (*GOALS, "random", "own", "none")


def table(setting: Setting, arms: Sequence[Done]) -> str:
    """One line for each arm: means over its seeds, and the spread."""
    source, task, llm = setting
    asked = set.intersection(*({step for step, _ in arm.scores} for arm in arms))
    if not asked:
        raise ValueError(
            f"the arms of {setting} were asked after different steps; run all of them with the same --steps"
        )
    steps = max(asked)
    named = LANGUAGE_MODELS.get(llm, "of the source")
    lines = [f"Source {source}, task {task}, language model {llm} ({named})", ""]
    lines.append(
        f"| arm | seeds | loss at {steps} | exact match at {steps} | random arm has that loss at | "
        "reaches the random arm's lowest loss at | of its steps |"
    )
    lines.append("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(arm.arm for arm in arms):
        some = [arm for arm in arms if arm.arm == name]
        loss = spread([dict(arm.curve)[steps] for arm in some])
        score = spread([dict(arm.scores)[steps]["overall"] for arm in some])
        goals = {arm.seed: arm.curve for arm in arms if arm.arm == GOALS[name.endswith(FIXED)]}
        pairs = [(arm.curve, goals[arm.seed]) for arm in some if arm.seed in goals]
        lows = [min(goal, key=lambda point: point[1]) for _, goal in pairs]
        back = [first_at(goal, dict(curve)[steps]) for curve, goal in pairs]
        there = [first_at(curve, low[1]) for (curve, _), low in zip(pairs, lows, strict=True)]
        shares = [step / low[0] for step, low in zip(there, lows, strict=True) if step is not None]
        share = f"{statistics.mean(shares):.2f}" if shares else ""
        lines.append(f"| {name} | {len(some)} | {loss} | {score} | {when(back)} | {when(there)} | {share} |")
    return "\n".join(lines)


def when(steps: Sequence[int | None]) -> str:
    """The mean of some steps, and how many of them never came."""
    known = [step for step in steps if step is not None]
    if not known:
        return "never" if steps else ""
    lost = f" ({len(steps) - len(known)} of {len(steps)} never)" if len(known) < len(steps) else ""
    return f"step {statistics.mean(known):.0f}{lost}"


def first_at(curve: Sequence[tuple[int, float]], loss: float) -> int | None:
    """The first validated step with a loss that low."""
    return next((step for step, value in curve if value <= loss), None)


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def draw(settings: dict[Setting, list[Done]], path: Path) -> Path:
    """Validation loss against steps, a diagram for each setting and each of: all learns, the language model is fixed.
    Lines are means over the seeds, and bands their range."""
    panels = [
        (setting, fixed, [arm for arm in arms if arm.arm in DRAWN and arm.arm.endswith(FIXED) == fixed])
        for setting, arms in settings.items()
        for fixed in (False, True)
    ]
    panels = [
        (setting, fixed, arms) for setting, fixed, arms in panels if not all(reuses_nothing(arm.arm) for arm in arms)
    ]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(4.2 * columns, 3.0 * rows + 0.5)
    handles: dict[str, Any] = {}
    for place, ((source, task, llm), fixed, arms) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        for name in dict.fromkeys(arm.arm for arm in arms):
            handles[name.replace(FIXED, " bypass")] = _line(axes, name, [arm.curve for arm in arms if arm.arm == name])
        goal = [value for arm in arms if arm.arm in GOALS for step, value in arm.curve if step]
        if goal:  # where words pass untrained bridges, the first steps are far above all else
            axes.set_ylim(top=1.25 * max(goal))
        axes.set_title(f"{source} to {task}, LLM {llm}{', fixed' if fixed else ''}", fontsize=9)
        axes.set_xlabel("steps", fontsize=8)
        axes.set_ylabel("validation loss", fontsize=8)
        axes.tick_params(labelsize=7, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=6, frameon=False, fontsize=9)
    return save(figure, path)


def _line(axes: Axes, name: str, curves: Sequence[Sequence[tuple[int, float]]]) -> Any:
    """One arm's line and band, from the first validation in training on."""
    steps = [step for step, _ in min(curves, key=len) if step]
    values = [[dict(curve)[step] for curve in curves] for step in steps]
    [line] = axes.plot(steps, [statistics.mean(some) for some in values], color=DRAWN[name])
    axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=DRAWN[name], alpha=0.15, linewidth=0)
    return line

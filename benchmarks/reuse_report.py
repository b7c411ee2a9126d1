"""Tables and curves from the arms of benchmarks/reuse.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from neo_components.viewers.figure import COLORS, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOALS = ("random", "random bypass")
"""The random arms. An arm is compared with the one that leads text the same way."""
PARTS = (0.5, 0.75, 1.0)
"""After these parts of its steps a random arm has the losses that others are to reach."""
DRAWN = {
    "random bypass": COLORS[0], "random": COLORS[5], "own": COLORS[4], "none": COLORS[7],
    "tuned bypass": COLORS[3], "frozen bypass": COLORS[2], "tuned": COLORS[1],
}  # fmt: skip
"""Arms whose curves are drawn, and in which color."""
Curve = Sequence[tuple[int, float]]
"""(step, validation loss) of each validation."""


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


Setting = tuple[str, str]
"""Task of the source, task of the arms."""


def report(arms: Sequence[Done], figures: Path | None = None) -> str:
    """A table for each setting, as Markdown; the curves too if there is a folder for them."""
    settings = settings_of(arms)
    parts = [table(setting, some) for setting, some in settings.items()]
    parts += ["Device: " + "; ".join(sorted({arm.device for arm in arms}))]
    if figures is not None:
        draw(settings, figures / "reuse.png")
    return "\n\n".join(parts)


def settings_of(arms: Iterable[Done]) -> dict[Setting, list[Done]]:
    """The arms that are comparable, together. Arms that reuse nothing are kept under their task; the random ones are
    listed with every source."""
    arms = list(arms)
    order = sorted({(arm.task, arm.source != arm.task, arm.source) for arm in arms if not reuses_nothing(arm.arm)})
    return {
        (source, task): [arm for arm in arms if arm.task == task and (arm.source == source or arm.arm in GOALS)]
        for task, _, source in order
    }


def reuses_nothing(arm: str) -> bool:
    """Whether the source does not matter to an arm."""
    return arm in (*GOALS, "own", "none")


def goal_of(arm: str) -> str:
    """The random arm that an arm is compared with."""
    return "random bypass" if arm.endswith("bypass") or arm == "none" else "random"


def table(setting: Setting, arms: Sequence[Done]) -> str:
    """One line for each arm, means over its seeds with the spread, and three columns for each language model."""
    asked = set.intersection(*({step for step, _ in arm.scores} for arm in arms))
    if not asked:
        raise ValueError(
            f"the arms of {setting} were evaluated after different steps; run all of them with the same --steps"
        )
    steps, llms = max(asked), sorted({arm.llm for arm in arms})
    last = max(max(step for step, _ in arm.curve) for arm in arms)
    levels = ", ".join(f"{part * last:.0f}" for part in PARTS)
    head = [
        f"LLM {llm}: loss at {steps} | exact match at {steps} | steps for random's loss at {levels}" for llm in llms
    ]
    lines = [f"Source {setting[0]}, task {setting[1]}", "", f"| arm | {' | '.join(head)} |"]
    lines.append("|---" * (1 + 3 * len(llms)) + "|")
    order = [*DRAWN, *sorted({arm.arm for arm in arms} - set(DRAWN))]
    for name in sorted({arm.arm for arm in arms}, key=lambda name: (not reuses_nothing(name), order.index(name))):
        cells = [cell for llm in llms for cell in _cells(name, [arm for arm in arms if arm.llm == llm], steps)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(name: str, arms: Sequence[Done], steps: int) -> list[str]:
    """Loss, exact match, and steps to a random arm's losses as fractions of its steps, of one language model."""
    some = [arm for arm in arms if arm.arm == name]
    if not some:
        return ["", "", ""]
    goals = {arm.seed: arm.curve for arm in arms if arm.arm == goal_of(name) != name}
    loss = spread([dict(smooth(arm.curve))[steps] for arm in some])
    score = spread([dict(arm.scores)[steps]["overall"] for arm in some])
    pairs = [(smooth(arm.curve), smooth(goals[arm.seed])) for arm in some if arm.seed in goals]
    return [loss, score, ", ".join(_fraction(pairs, part) for part in PARTS) if pairs else ""]


def _fraction(pairs: Sequence[tuple[Curve, Curve]], part: float) -> str:
    """Steps that curves need for the loss of others after a part of their steps, divided by those of the others.

    A curve that ends before counts with its last step, and the mean is a lower bound.
    """
    fractions, ended = [], False
    for curve, goal in pairs:
        at = part * goal[-1][0]
        low = min(value for step, value in goal if step <= at)
        there = next((step for step, value in curve if value <= low), None)
        ended = ended or there is None
        fractions.append((curve[-1][0] if there is None else there) / first_at(goal, low))
    return f"{'over ' * ended}{statistics.mean(fractions):.2f}"


def first_at(curve: Curve, loss: float) -> int:
    """The first validated step with a loss that low."""
    return next(step for step, value in curve if value <= loss)


def smooth(curve: Curve) -> Curve:
    """Each loss as the mean of a validation and the two before it: a single one is luck by a hundredth or two."""
    return [
        (step, statistics.mean(value for _, value in curve[max(0, index - 2) : index + 1]))
        for index, (step, _) in enumerate(curve)
    ]


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def draw(settings: dict[Setting, list[Done]], path: Path) -> Path:
    """Validation loss against steps, a diagram for each setting and language model. Lines are means over the seeds, and
    bands their range."""
    panels = [
        (f"{source} to {task}, LLM {llm}", [arm for arm in arms if arm.llm == llm and arm.arm in DRAWN])
        for (source, task), arms in settings.items()
        for llm in sorted({arm.llm for arm in arms})
    ]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(3.6 * columns, 3.0 * rows + 0.5)
    handles: dict[str, Any] = {}
    for index, (title, arms) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for name in dict.fromkeys(arm.arm for arm in arms):
            handles[name] = _line(axes, name, [arm.curve for arm in arms if arm.arm == name])
        goal = [value for arm in arms if arm.arm in GOALS for step, value in arm.curve if step]
        if goal:  # where text passes untrained bridges, the first steps are far above all else
            axes.set_ylim(0.9 * min(value for arm in arms for _, value in arm.curve), 1.5 * statistics.median(goal))
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("steps", fontsize=8)
        axes.set_ylabel("validation loss", fontsize=8)
        axes.tick_params(labelsize=7, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=6, frameon=False, fontsize=9)
    return save(figure, path)


def _line(axes: Axes, name: str, curves: Sequence[Curve]) -> Any:
    """One arm's line and band, from the first validation in training on."""
    steps = [step for step, _ in min(curves, key=len) if step]
    values = [[dict(curve)[step] for curve in curves] for step in steps]
    [line] = axes.plot(steps, [statistics.mean(some) for some in values], color=DRAWN[name])
    axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=DRAWN[name], alpha=0.15, linewidth=0)
    return line

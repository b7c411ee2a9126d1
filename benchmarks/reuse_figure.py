"""The curves of benchmarks/reuse.py as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reuse_compare import Comparison, Done, Spread, comparisons

from neo_components.viewers.figure import BLUE, ORANGE, RED, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN = {"random": BLUE, "whitened": ORANGE, "reused": RED}
STYLES = {"tuned": "-", "frozen": "--"}


def draw(arms: Sequence[Done], path: Path, text: str = "bypass") -> Path:
    """Validation loss against steps with all training pairs: a diagram for each task and language model. Lines are
    medians over seeds, bands reach from quartile to quartile."""
    found = [one for one in comparisons(arms) if one.text == text]
    found = [one for one in found if one.pairs == max(other.pairs for other in found if other.llm == one.llm)]
    panels: dict[tuple[str, str], list[Comparison]] = {}
    for one in found:
        panels.setdefault((one.llm, one.task), []).append(one)
    columns = min(5, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(3.2 * columns, 2.8 * rows + 0.5)
    handles: dict[str, Any] = {}
    for index, ((llm, task), some) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        for one in some:
            for weights in (*one.new, "reused"):
                name = f"{weights}, {one.train}"
                handles[name] = _line(axes, one.of(weights), DRAWN[weights], STYLES[one.train])
        axes.set_title(f"{task}, {llm}", fontsize=9)
        axes.set_xlabel("steps", fontsize=8)
        axes.set_ylabel("validation loss", fontsize=8)
        axes.set_yscale("log")
        axes.tick_params(labelsize=7, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=6, frameon=False, fontsize=8)
    return save(figure, path)


def _line(axes: Axes, arms: Sequence[Done], color: str, style: str) -> Any:
    """One kind of weights, from the first validation in training on."""
    steps = [step for step, _ in min((arm.curve for arm in arms), key=len) if step]
    spreads = [Spread.of([dict(arm.curve)[step] for arm in arms]) for step in steps]
    [line] = axes.plot(steps, [spread.median for spread in spreads], color=color, linestyle=style, linewidth=1.2)
    low, high = [spread.low for spread in spreads], [spread.high for spread in spreads]
    axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    return line

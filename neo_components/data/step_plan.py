"""Which rank gets which planned row at which step, and where a run stands in that, whatever its ranks and workers.

Rows are planned in blocks. The rows of a step have about the same number of visual tokens, so that no rank waits for
another one's images, and over the steps every rank gets every source in its share. Every worker of every rank works
out the same plan from the same few numbers, so nothing passes between them, and a run may go on with other numbers of
ranks, rows or workers: what was not taken yet is dealt anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from neo_components.data.row_plan import PlannedRow, RowPlan

STEPS_PER_BLOCK = 32

Step = list[list[PlannedRow]]
"""The rows of each rank at one step."""


class StepPlan:
    """The steps of a run.

    Args:
        plan: the rows; at its beginning.
        ranks: how many processes train together.
        rows: rows of a step on each rank, B.
        place: from :meth:`state`, to go on there.
    """

    def __init__(self, plan: RowPlan, ranks: int, rows: int, place: Mapping[str, Any] | None = None) -> None:
        self._plan, self._ranks, self._rows = plan, ranks, rows
        self._dealt = np.zeros((ranks, len(plan.shares) + 1))
        self._steps: list[Step] = []
        self._block = self._next = -1
        self._start: dict[str, Any] = {}
        self._parts: list[list[int]] = []
        if place is None:
            self._begin_block()
        else:
            self._reopen(place)

    def next_step(self) -> Step | None:
        """The rows of each rank; ``None`` at the end of validation.

        The last step of validation may hold fewer rows, even none for a rank of a tiny set.
        """
        if self._next == len(self._steps):
            self._begin_block()
            if not self._steps:
                return None
        self._next += 1
        self._parts[-1][3] = self._next
        return self._steps[self._next - 1]

    def state(self) -> dict[str, Any]:
        """The place behind the last step, in plain values; the same on every rank.

        ``start`` is the place at which the block begins, ``parts`` tells how its rows were dealt: to how many ranks, in
        how many rows each, how many rows of the block were planned, and how many steps were taken. There is more than
        one part if the run was resumed within the block with other ranks or rows.
        """
        return {**self._start, "parts": [list(part) for part in self._parts]}

    def _begin_block(self) -> None:
        self._block += 1
        dealt = self._dealt.tolist() if self._ranks > 1 else []
        self._start = {"block": self._block, "start": self._plan.state(), "dealt": dealt}
        planned = self._rows_of_plan(STEPS_PER_BLOCK * self._ranks * self._rows)
        self._steps, self._next = list(self._deal(planned)), 0
        self._parts = [[self._ranks, self._rows, len(planned), 0]]

    def _reopen(self, place: Mapping[str, Any]) -> None:
        """Plans the block again and leaves out what was taken."""
        self._block = place["block"]
        self._start = {"block": self._block, "start": place["start"], "dealt": place["dealt"]}
        self._plan.load_state(place["start"])
        parts, left, planned = [list(part) for part in place["parts"]], [], 0
        now = (self._ranks, self._rows)
        for number, (ranks, rows, total, taken) in enumerate(parts):
            left += self._rows_of_plan(total - planned)
            planned = total
            self._ranks, self._rows = ranks, rows
            keeps = number == 0 and ranks > 1
            self._dealt = np.array(place["dealt"]) if keeps else np.zeros((ranks, len(self._plan.shares) + 1))
            self._steps, self._next, self._parts = list(self._deal(left)), taken, parts[: number + 1]
            left = [row for step in self._steps[taken:] for rank in step for row in rank]
        if now != (self._ranks, self._rows):
            self._ranks, self._rows = now
            self._dealt = np.zeros((self._ranks, len(self._plan.shares) + 1))
            more = -len(left) % (self._ranks * self._rows)
            left += self._rows_of_plan(more)
            self._steps, self._next = list(self._deal(left)), 0
            self._parts.append([self._ranks, self._rows, planned + more, 0])

    def _rows_of_plan(self, count: int) -> list[PlannedRow]:
        rows: list[PlannedRow] = []
        while len(rows) < count and (row := self._plan.next_row()) is not None:
            rows.append(row)
        return rows

    def _deal(self, rows: Sequence[PlannedRow]) -> Iterator[Step]:
        """Divides rows among steps and ranks."""
        size = self._ranks * self._rows
        if self._ranks == 1 or not rows:
            yield from ([list(rows[first : first + size])] for first in range(0, len(rows), size))
            return
        whole = len(rows) // size * size
        deviations = self._deviations(rows)
        for group in self._groups(rows[:whole], deviations):
            yield self._to_ranks(group, rows, deviations)
        if whole < len(rows):
            yield self._last(list(rows[whole:]))

    def _groups(self, rows: Sequence[PlannedRow], deviations: np.ndarray) -> Iterator[np.ndarray]:
        """Numbers of the rows of each step: those of about the same visual tokens, none beyond the end of its epoch."""
        size, first = self._ranks * self._rows, 0
        while first < len(rows):
            crossing = next((n for n in range(first, len(rows)) if rows[n].crosses), len(rows))
            stop = first + (crossing - first) // size * size
            order = first + np.argsort([row.visual for row in rows[first:stop]], kind="stable")
            yield from _evenly([order[n : n + size] for n in range(0, len(order), size)], deviations)
            if stop < len(rows):
                yield np.arange(stop, stop + size)
            first = stop + size

    def _to_ranks(self, group: np.ndarray, rows: Sequence[PlannedRow], deviations: np.ndarray) -> Step:
        """Gives each rank rows that make up for what it had too much or too little of; the most unusual row first."""
        step: Step = [[] for _ in range(self._ranks)]
        for number in sorted(group, key=lambda n: -float(deviations[n] @ deviations[n])):
            after = self._dealt + deviations[number]
            cost = (after * after).sum(axis=1) - (self._dealt * self._dealt).sum(axis=1)
            cost[[len(mine) == self._rows for mine in step]] = np.inf
            rank = int(cost.argmin())
            self._dealt[rank] = after[rank]
            step[rank].append(rows[number])
        return step

    def _deviations(self, rows: Sequence[PlannedRow]) -> np.ndarray:
        """[rows, sources + 1]: how far each row is from its sources' shares and from the mean of visual tokens.

        In units of an average row, the visual tokens ten times as heavy.
        """
        amounts = np.array([row.amounts for row in rows], np.float64).reshape(len(rows), len(self._plan.shares))
        visual = np.array([row.visual for row in rows], np.float64)
        average = max(amounts.sum() / len(rows), 1)
        mixture = (amounts - amounts.sum(axis=1, keepdims=True) * self._plan.shares) / average
        return np.column_stack([mixture, 10 * (visual - visual.mean()) / max(visual.mean(), 1)])

    def _last(self, rows: list[PlannedRow]) -> Step:
        """The last step of validation: samples are spread until every rank has a row, as far as they reach."""
        while len(rows) < self._ranks and (longest := max(rows, key=lambda row: len(row.members))).members[1:]:
            rows.remove(longest)
            half = len(longest.members) // 2
            # The counts of the halves are not needed any more: nothing is dealt after them.
            rows += [longest._replace(members=part) for part in (longest.members[:half], longest.members[half:])]
        return [rows[rank :: self._ranks] for rank in range(self._ranks)]


def _evenly(groups: list[np.ndarray], deviations: np.ndarray) -> Iterator[np.ndarray]:
    """Orders groups of rows so that at any time the mixture and the visual tokens so far are about the average."""
    sums = [deviations[group].sum(axis=0) for group in groups]
    left, total = list(range(len(groups))), np.zeros(deviations.shape[1])
    while left:
        best = min(left, key=lambda n: float(((total + sums[n]) ** 2).sum()))
        left.remove(best)
        total += sums[best]
        yield groups[best]

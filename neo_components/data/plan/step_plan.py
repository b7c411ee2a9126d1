"""Which rank gets which planned row at which step, and where a run stands in that, whatever its ranks and workers.

Rows are planned in blocks. In each step all ranks have about the same number of visual tokens, so that none waits for
another one's images, and over the steps every rank gets every source in its share. Every worker of every rank works
out the same plan from the same few numbers, so nothing passes between them, and a run may go on with other numbers of
ranks, rows or workers: what was not taken yet is dealt anew. With one rank the rows come as they were planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from neo_components.data.plan.balance import Balance
from neo_components.data.plan.row_plan import PlannedRow, RowPlan

STEPS_PER_BLOCK = 32
"""At least so many."""

ROWS_PER_BLOCK = 2048
"""At least so many, if there are several ranks and samples: among more rows there are more that go well together."""

SPREAD = 50
"""For each so many ranks every step gets one of the rows with the fewest visual tokens, which it hardly feels."""

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
        planned = self._rows_of_plan(self._rows_of_block())
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
            # In the order of the plan within each step: the ends of epochs are told by it.
            left = [row for step in self._steps[taken:] for row in sorted(chain(*step), key=lambda row: row.number)]
        if now != (self._ranks, self._rows):
            self._ranks, self._rows = now
            self._dealt = np.zeros((self._ranks, len(self._plan.shares) + 1))
            more = -len(left) % (self._ranks * self._rows)
            left += self._rows_of_plan(more)
            self._steps, self._next = list(self._deal(left)), 0
            self._parts.append([self._ranks, self._rows, planned + more, 0])

    def _rows_of_block(self) -> int:
        size = self._ranks * self._rows
        wanted = min(ROWS_PER_BLOCK, self._plan.epoch) if self._ranks > 1 else 0
        return max(STEPS_PER_BLOCK, -(-wanted // size)) * size

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
        if whole:
            segments = list(self._segments(rows[:whole]))
            places = self._balanced(rows[:whole], np.concatenate(segments))
            first = 0
            for segment in segments:
                yield from self._in_order(places[first : first + len(segment) * self._ranks])
                first += len(segment) * self._ranks
        if whole < len(rows):
            yield self._last(list(rows[whole:]))

    def _segments(self, rows: Sequence[PlannedRow]) -> Iterator[np.ndarray]:
        """[steps, ranks * B] numbers of rows, of about the same visual tokens in each step.

        A segment ends where an epoch does: no row moves beyond. The step with the end is a segment of its own.
        """
        size, first = self._ranks * self._rows, 0
        while first < len(rows):
            crossing = next((n for n in range(first, len(rows)) if rows[n].crosses), len(rows))
            stop = first + (crossing - first) // size * size
            if stop > first:
                order = first + np.argsort([row.visual for row in rows[first:stop]], kind="stable")
                steps = len(order) // size
                few = self._ranks // SPREAD * steps
                yield np.hstack([order[:few].reshape(-1, steps).T, order[few:].reshape(steps, -1)])
            if stop < len(rows):
                yield np.arange(stop, stop + size)[None]
            first = stop + size

    def _balanced(self, rows: Sequence[PlannedRow], steps: np.ndarray) -> list[list[PlannedRow]]:
        """[steps * ranks] the rows of each rank at each step, after they have traded.

        Nothing is traded between what lies before and what lies behind the end of an epoch, nor with the row in which
        it is.
        """
        visual = np.array([row.visual for row in rows])
        place_of = np.empty(len(rows), np.int64)
        # The heaviest row to the first rank, ..., and back: every rank has B of them.
        there = np.arange(self._ranks)
        snake = np.concatenate([there if turn % 2 == 0 else there[::-1] for turn in range(self._rows)])
        for step, group in enumerate(steps):
            place_of[group[np.argsort(-visual[group], kind="stable")]] = step * self._ranks + snake
        crosses = np.array([row.crosses for row in rows])
        members = [member for row in rows for member in row.members]
        balance = Balance(
            lengths=np.array([length for _, _, length in members], np.int64),
            visual=np.array([self._plan.visual(source, number) for source, number, _ in members], np.int64),
            row_of=np.repeat(np.arange(len(rows)), [len(row.members) for row in rows]),
            place_of=place_of,
            part_of=2 * np.cumsum(crosses) - crosses,
            ranks=self._ranks,
            seq_len=self._plan.seq_len,
        )
        balance.improve()
        changed: list[list[tuple[int, int, int]]] = [[] for _ in rows]
        for member, row in zip(members, balance.row_of.tolist(), strict=True):
            changed[row].append(member)
        places: list[list[PlannedRow]] = [[] for _ in range(steps.shape[0] * self._ranks)]
        for row, mine, place in zip(rows, changed, balance.place_of.tolist(), strict=True):
            places[place].append(row if mine == row.members else self._plan.with_members(row, mine))
        return places

    def _in_order(self, places: list[list[PlannedRow]]) -> Iterator[Step]:
        """The steps of a segment, in such an order that at any time the mixture so far is about the average."""
        deviations = self._deviations(places)
        numbers = np.arange(len(places)).reshape(-1, self._ranks)
        for group in _evenly(numbers, deviations):
            yield self._to_ranks(group, places, deviations)

    def _to_ranks(self, group: np.ndarray, places: list[list[PlannedRow]], deviations: np.ndarray) -> Step:
        """Gives each rank what makes up for what it had too much or too little of; the most unusual first."""
        step: Step = [[] for _ in range(self._ranks)]
        unusual = (deviations * deviations).sum(axis=1)
        for number in sorted(group, key=lambda n: -float(unusual[n])):
            after = self._dealt + deviations[number]
            cost = (after * after).sum(axis=1) - (self._dealt * self._dealt).sum(axis=1)
            cost[[bool(mine) for mine in step]] = np.inf
            rank = int(cost.argmin())
            self._dealt[rank] = after[rank]
            step[rank] = places[number]
        return step

    def _deviations(self, places: list[list[PlannedRow]]) -> np.ndarray:
        """[places, sources + 1]: how far each is from its sources' shares and from the mean of visual tokens.

        In units of an average place, the visual tokens ten times as heavy.
        """
        amounts = np.array([[row.amounts for row in rows] for rows in places], np.float64).sum(axis=1)
        visual = np.array([sum(row.visual for row in rows) for rows in places], np.float64)
        average = max(amounts.sum() / len(places), 1)
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


def _evenly(groups: np.ndarray, deviations: np.ndarray) -> Iterator[np.ndarray]:
    """Orders groups of places so that at any time the mixture and the visual tokens so far are about the average."""
    sums = deviations[groups].sum(axis=1)
    left, total = np.ones(len(groups), bool), np.zeros(deviations.shape[1])
    for _ in groups:
        after = total + sums
        best = int(np.where(left, (after * after).sum(axis=1), np.inf).argmin())
        left[best], total = False, after[best]
        yield groups[best]

"""The plan of a run's steps: which rank gets which packed sequences, whatever the number of ranks and workers.

Sequences are dealt in blocks. In each step all ranks have about the same number of visual tokens, so that none waits
for the images of another, and over the steps every rank gets every source by its weight. Every worker of every rank
computes the same plan from the same few numbers, so nothing passes between them. A run may continue with other numbers
of ranks, workers or another micro-batch size: what was not taken yet is dealt again. With one rank the sequences come
as they were planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np

from neo_components.data.plan.balance import Balance
from neo_components.data.plan.pack_plan import PackPlan, PlannedSequence

STEPS_PER_BLOCK = 32
"""At least so many."""

SEQUENCES_PER_BLOCK = 2048
"""At least so many, if there are several ranks and samples: the more sequences, the more that go well together."""

SPREAD = 50
"""For each so many ranks every step gets one of the sequences with the fewest visual tokens, which costs it little."""

Step = list[list[PlannedSequence]]
"""The planned sequences of each rank at one step."""


class StepPlan:
    """The steps of a run.

    Args:
        plan: plans the sequences; at its beginning.
        ranks: how many processes train together.
        micro_batch_size: packed sequences of a step on each rank, B.
        position: from :meth:`state`, to continue there.
    """

    def __init__(
        self, plan: PackPlan, ranks: int, micro_batch_size: int, position: Mapping[str, Any] | None = None
    ) -> None:
        self._plan, self._ranks, self._micro_batch_size = plan, ranks, micro_batch_size
        self._dealt = np.zeros((ranks, len(plan.weights) + 1))
        self._steps: list[Step] = []
        self._block = self._next = -1
        self._start: dict[str, Any] = {}
        self._parts: list[list[int]] = []
        if position is None:
            self._begin_block()
        else:
            self._reopen(position)

    def next_step(self) -> Step | None:
        """The sequences of each rank; ``None`` at the end of validation.

        The last step of validation may hold fewer sequences, even none for a rank of a tiny set.
        """
        if self._next == len(self._steps):
            self._begin_block()
            if not self._steps:
                return None
        self._next += 1
        self._parts[-1][3] = self._next
        return self._steps[self._next - 1]

    def state(self) -> dict[str, Any]:
        """The position behind the last step, in plain values; the same on every rank.

        ``start`` is the position of the plan at which the block begins. ``parts`` describes how its sequences were
        dealt: to how many ranks, in micro-batches of which size, how many of the block were planned, and how many steps
        were taken. There is more than one part if the run was resumed within the block with other numbers.
        """
        return {**self._start, "parts": [list(part) for part in self._parts]}

    def _begin_block(self) -> None:
        self._block += 1
        dealt = self._dealt.tolist() if self._ranks > 1 else []
        self._start = {"block": self._block, "start": self._plan.state(), "dealt": dealt}
        planned = self._sequences_of_plan(self._sequences_of_block())
        self._steps, self._next = list(self._deal(planned)), 0
        self._parts = [[self._ranks, self._micro_batch_size, len(planned), 0]]

    def _reopen(self, position: Mapping[str, Any]) -> None:
        """Plans the block again and leaves out what was taken."""
        self._block = position["block"]
        self._start = {"block": self._block, "start": position["start"], "dealt": position["dealt"]}
        self._plan.load_state(position["start"])
        parts, left, planned = [list(part) for part in position["parts"]], [], 0
        now = (self._ranks, self._micro_batch_size)
        for number, (ranks, size, total, taken) in enumerate(parts):
            left += self._sequences_of_plan(total - planned)
            planned = total
            self._ranks, self._micro_batch_size = ranks, size
            keeps = number == 0 and ranks > 1
            self._dealt = np.array(position["dealt"]) if keeps else np.zeros((ranks, len(self._plan.weights) + 1))
            self._steps, self._next, self._parts = list(self._deal(left)), taken, parts[: number + 1]
            # In the order of the plan within each step: it determines where epochs end.
            left = [one for step in self._steps[taken:] for one in sorted(chain(*step), key=attrgetter("number"))]
        if now != (self._ranks, self._micro_batch_size):
            self._ranks, self._micro_batch_size = now
            self._dealt = np.zeros((self._ranks, len(self._plan.weights) + 1))
            more = -len(left) % (self._ranks * self._micro_batch_size)
            left += self._sequences_of_plan(more)
            self._steps, self._next = list(self._deal(left)), 0
            self._parts.append([self._ranks, self._micro_batch_size, planned + more, 0])

    def _sequences_of_block(self) -> int:
        size = self._ranks * self._micro_batch_size
        wanted = min(SEQUENCES_PER_BLOCK, self._plan.epoch) if self._ranks > 1 else 0
        return max(STEPS_PER_BLOCK, -(-wanted // size)) * size

    def _sequences_of_plan(self, count: int) -> list[PlannedSequence]:
        sequences: list[PlannedSequence] = []
        while len(sequences) < count and (sequence := self._plan.next_sequence()) is not None:
            sequences.append(sequence)
        return sequences

    def _deal(self, sequences: Sequence[PlannedSequence]) -> Iterator[Step]:
        """Divides sequences among steps and ranks."""
        size = self._ranks * self._micro_batch_size
        if self._ranks == 1 or not sequences:
            yield from ([list(sequences[first : first + size])] for first in range(0, len(sequences), size))
            return
        whole = len(sequences) // size * size
        if whole:
            segments = list(self._segments(sequences[:whole]))
            slots = self._balanced(sequences[:whole], np.concatenate(segments))
            first = 0
            for segment in segments:
                yield from self._in_order(slots[first : first + len(segment) * self._ranks])
                first += len(segment) * self._ranks
        if whole < len(sequences):
            yield self._last(list(sequences[whole:]))

    def _segments(self, sequences: Sequence[PlannedSequence]) -> Iterator[np.ndarray]:
        """[steps, ranks * B] numbers of sequences, of about the same visual tokens in each step.

        A segment ends where an epoch does: no sequence moves beyond. The step with the end is one segment.
        """
        size, first = self._ranks * self._micro_batch_size, 0
        while first < len(sequences):
            crossing = next((n for n in range(first, len(sequences)) if sequences[n].crosses), len(sequences))
            stop = first + (crossing - first) // size * size
            if stop > first:
                order = first + np.argsort([sequence.visual for sequence in sequences[first:stop]], kind="stable")
                steps = len(order) // size
                few = self._ranks // SPREAD * steps
                yield np.hstack([order[:few].reshape(-1, steps).T, order[few:].reshape(steps, -1)])
            if stop < len(sequences):
                yield np.arange(stop, stop + size)[None]
            first = stop + size

    def _balanced(self, sequences: Sequence[PlannedSequence], steps: np.ndarray) -> list[list[PlannedSequence]]:
        """[steps * ranks] the sequences of each rank at each step, after they have traded.

        Nothing is traded between what lies before and what lies behind the end of an epoch, nor with the sequence that
        holds it.
        """
        visual = np.array([sequence.visual for sequence in sequences])
        slot_of = np.empty(len(sequences), np.int64)
        # The heaviest sequence to the first rank, ..., and back: every rank has B of them.
        there = np.arange(self._ranks)
        snake = np.concatenate([there if n % 2 == 0 else there[::-1] for n in range(self._micro_batch_size)])
        for step, group in enumerate(steps):
            slot_of[group[np.argsort(-visual[group], kind="stable")]] = step * self._ranks + snake
        crosses = np.array([sequence.crosses for sequence in sequences])
        members = [member for sequence in sequences for member in sequence.members]
        balance = Balance(
            lengths=np.array([length for _, _, length in members], np.int64),
            visual=np.array([self._plan.visual(source, number) for source, number, _ in members], np.int64),
            sequence_of=np.repeat(np.arange(len(sequences)), [len(sequence.members) for sequence in sequences]),
            slot_of=slot_of,
            part_of=2 * np.cumsum(crosses) - crosses,
            ranks=self._ranks,
            seq_len=self._plan.seq_len,
        )
        balance.improve()
        changed: list[list[tuple[int, int, int]]] = [[] for _ in sequences]
        for member, sequence in zip(members, balance.sequence_of.tolist(), strict=True):
            changed[sequence].append(member)
        slots: list[list[PlannedSequence]] = [[] for _ in range(steps.shape[0] * self._ranks)]
        for sequence, mine, slot in zip(sequences, changed, balance.slot_of.tolist(), strict=True):
            slots[slot].append(sequence if mine == sequence.members else self._plan.with_members(sequence, mine))
        return slots

    def _in_order(self, slots: list[list[PlannedSequence]]) -> Iterator[Step]:
        """The steps of a segment, in such an order that at any time the mixture so far is about the average."""
        deviations = self._deviations(slots)
        numbers = np.arange(len(slots)).reshape(-1, self._ranks)
        for group in _evenly(numbers, deviations):
            yield self._to_ranks(group, slots, deviations)

    def _to_ranks(self, group: np.ndarray, slots: list[list[PlannedSequence]], deviations: np.ndarray) -> Step:
        """Gives each rank what makes up for what it had too much or too little of; the most unusual first."""
        step: Step = [[] for _ in range(self._ranks)]
        unusual = (deviations * deviations).sum(axis=1)
        for number in sorted(group, key=lambda n: -float(unusual[n])):
            after = self._dealt + deviations[number]
            cost = (after * after).sum(axis=1) - (self._dealt * self._dealt).sum(axis=1)
            cost[[bool(mine) for mine in step]] = np.inf
            rank = int(cost.argmin())
            self._dealt[rank] = after[rank]
            step[rank] = slots[number]
        return step

    def _deviations(self, slots: list[list[PlannedSequence]]) -> np.ndarray:
        """[slots, sources + 1]: how far each is from its sources' weights and from the mean of visual tokens.

        In units of an average slot, the visual tokens ten times as heavy.
        """
        amounts = np.array([[one.amounts for one in slot] for slot in slots], np.float64).sum(axis=1)
        visual = np.array([sum(one.visual for one in slot) for slot in slots], np.float64)
        average = max(amounts.sum() / len(slots), 1)
        mixture = (amounts - amounts.sum(axis=1, keepdims=True) * self._plan.weights) / average
        return np.column_stack([mixture, 10 * (visual - visual.mean()) / max(visual.mean(), 1)])

    def _last(self, sequences: list[PlannedSequence]) -> Step:
        """The last step of validation: samples are spread until every rank has a sequence, as far as they reach."""
        while len(sequences) < self._ranks:
            longest = max(sequences, key=lambda sequence: len(sequence.members))
            if len(longest.members) < 2:
                break
            sequences.remove(longest)
            half = len(longest.members) // 2
            # The counts of the halves are not needed anymore: nothing is dealt after them.
            sequences += [longest._replace(members=part) for part in (longest.members[:half], longest.members[half:])]
        return [sequences[rank :: self._ranks] for rank in range(self._ranks)]


def _evenly(groups: np.ndarray, deviations: np.ndarray) -> Iterator[np.ndarray]:
    """Orders groups of slots so that at any time the mixture and the visual tokens so far are about the average."""
    sums = deviations[groups].sum(axis=1)
    left, total = np.ones(len(groups), bool), np.zeros(deviations.shape[1])
    for _ in groups:
        after = total + sums
        best = int(np.where(left, (after * after).sum(axis=1), np.inf).argmin())
        left[best], total = False, after[best]
        yield groups[best]

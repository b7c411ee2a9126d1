"""The packing plan: which samples go into a packed sequence, from lengths alone; none is split, dropped or repeated.

A sequence takes the next samples of each source in turn, so that every one is mixed by the sampling weights. Its end is
filled with the waiting samples that leave the smallest gap, but no source gets ahead of its weight by more than half of
what a sequence holds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from neo_components.data.plan.order import EpochOrder

LOOK_AHEAD = 1024
"""Samples of each source that wait at a time; a sequence is filled from these."""

PAIRS_TRIED = 32
"""Samples for which the best partner is sought when no single one fills a sequence."""

FULL = 1024
"""A gap of less than one in so many tokens of a sequence is not worth seeking a better fit."""

_Waiting = tuple[int, int]
"""length and number of a sample: in order of length"""

_Chosen = tuple[int, _Waiting]
"""source and sample"""

_LAST = 1 << 60
"""Behind every number in the order of a :data:`_Waiting`."""


@dataclass(frozen=True)
class Supply:
    """What is known of a folder's samples before they are read.

    Args:
        name: for messages.
        tokens: [samples] length of each in tokens; 0 if it cannot be used.
        visual: [samples] how many of them are visual tokens.
        shard_sizes: [shards] samples in each shard.
    """

    name: str
    tokens: np.ndarray
    visual: np.ndarray
    shard_sizes: np.ndarray


class PlannedSequence(NamedTuple):
    """A packed sequence before its samples are read.

    Attributes:
        members: source, number and length in tokens of each sample, in order.
        visual: visual tokens in it.
        amounts: samples (or tokens, if weights are of those) of each source.
        number: of the sequence in its run.
        crosses: whether an epoch ends in this sequence: that of the source which takes longest for one.
    """

    members: list[tuple[int, int, int]]
    visual: int
    amounts: list[int]
    number: int = 0
    crosses: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return sum(length for _, _, length in self.members)


class _Queue:
    """The samples of one source that wait for a sequence, those of a single epoch at a time."""

    def __init__(self, supply: Supply, order: EpochOrder, seq_len: int) -> None:
        self._supply, self._order, self._seq_len = supply, order, seq_len
        self.epoch = self.position = 0
        self.waiting: OrderedDict[int, int] = OrderedDict()

    @property
    def count(self) -> int:
        """Samples of an epoch, those that cannot be used among them."""
        return self._order.count

    def refill(self, endless: bool) -> list[tuple[int, int]]:
        """(length, number) of samples that join, as soon as half of the queue is free.

        A new epoch begins when the last sample of the one before is taken, so no sample comes a second time before
        every other one came.
        """
        if len(self.waiting) > LOOK_AHEAD // 2:
            return []
        while True:
            if self.position == self._order.count:
                if self.waiting or not endless:
                    return []
                self.epoch, self.position = self.epoch + 1, 0
            numbers = self._order.take(self.epoch, self.position, LOOK_AHEAD - len(self.waiting))
            self.position += len(numbers)
            lengths = self._supply.tokens[numbers]
            usable = (lengths > 0) & (lengths <= self._seq_len)
            joined = list(zip(lengths[usable].tolist(), numbers[usable].tolist(), strict=True))
            if joined:
                self.waiting.update((number, length) for length, number in joined)
                return joined


class PackPlan:
    """The endless stream of planned sequences; for validation those of one pass.

    In training each next sample is of the source that is furthest behind its weight. In validation the sources come one
    after the other, in order.

    Args:
        supplies: the sources.
        weights: sampling weight of each source, any positive numbers; not used in validation.
        seq_len: tokens of a packed sequence, L; longer samples are left out.
        shuffle: see :class:`~neo_components.data.plan.order.EpochOrder`; not used in validation.
        seed: of the run.
        weight_unit: what weights are of: ``samples`` or ``tokens``.
        endless: training if True, else validation.

    Raises:
        ValueError: if a source of training has no usable sample.
    """

    def __init__(
        self,
        supplies: Sequence[Supply],
        weights: Sequence[float],
        *,
        seq_len: int,
        shuffle: int = 0,
        seed: int = 0,
        weight_unit: str = "samples",
        endless: bool = True,
    ) -> None:
        self.weights = [weight / sum(weights) for weight in weights]
        self.seq_len, self._by_tokens, self._endless = seq_len, weight_unit == "tokens", endless
        self._supplies = supplies
        self._queues = [
            _Queue(supply, EpochOrder(supply.shard_sizes, shuffle if endless else 0, (seed, source)), seq_len)
            for source, supply in enumerate(supplies)
        ]
        self._pools: list[list[_Waiting]] = [[] for _ in supplies]
        self._tokens_waiting = 0
        self._taken = [0] * len(supplies)
        self._count = 0
        cycles = [len(supply.tokens) / weight for supply, weight in zip(supplies, weights, strict=True)]
        self._slowest = self._queues[cycles.index(max(cycles))]
        if endless:
            check_usable(supplies, seq_len)

    def next_sequence(self) -> PlannedSequence | None:
        """The next sequence; ``None`` at the end of validation."""
        sequence = PlannedSequence([], 0, [0] * len(self._supplies))
        self._refill()
        space, epoch = self.seq_len, self._slowest.epoch
        while (chosen := self._next_in_turn(space, first=not sequence.members)) is not None:
            space -= self._take(chosen, sequence)
        while chosen_few := self._best_fit(space):
            for one in chosen_few:
                space -= self._take(one, sequence)
        if not sequence.members:
            return None
        self._count += 1
        visual = sum(self.visual(source, number) for source, number, _ in sequence.members)
        return sequence._replace(visual=visual, number=self._count, crosses=self._slowest.epoch != epoch)

    @property
    def epoch(self) -> int:
        """Samples of the source that takes longest for an epoch."""
        return self._slowest.count

    def visual(self, source: int, number: int) -> int:
        """Visual tokens of a sample."""
        return int(self._supplies[source].visual[number])

    def with_members(self, sequence: PlannedSequence, members: list[tuple[int, int, int]]) -> PlannedSequence:
        """The sequence with other samples in it."""
        amounts = [0] * len(self._supplies)
        for source, _, length in members:
            amounts[source] += self._amount(length)
        visual = sum(self.visual(source, number) for source, number, _ in members)
        return sequence._replace(members=members, visual=visual, amounts=amounts)

    def _amount(self, length: int) -> int:
        """What a sample counts by the unit of the weights."""
        return length if self._by_tokens else 1

    def state(self) -> dict[str, Any]:
        """The position between two sequences, in plain values."""
        return {
            "sources": [
                {"epoch": queue.epoch, "position": queue.position, "waiting": list(queue.waiting)}
                for queue in self._queues
            ],
            "taken": list(self._taken),
            "rows": self._count,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state` was called."""
        self._taken, self._count = list(state["taken"]), state["rows"]
        self._pools, self._tokens_waiting = [[] for _ in self._supplies], 0
        for source, (queue, kept) in enumerate(zip(self._queues, state["sources"], strict=True)):
            queue.epoch, queue.position = kept["epoch"], kept["position"]
            lengths = self._supplies[source].tokens[np.array(kept["waiting"], np.int64)].tolist()
            queue.waiting = OrderedDict(zip(kept["waiting"], lengths, strict=True))
            self._join(source, [(length, number) for number, length in queue.waiting.items()])

    def _join(self, source: int, joined: list[_Waiting]) -> None:
        if not joined:
            return
        self._pools[source] += joined
        self._pools[source].sort()
        self._tokens_waiting += sum(length for length, _ in joined)

    def _refill(self) -> None:
        for source, queue in enumerate(self._queues):
            self._join(source, queue.refill(self._endless))

    def _next_in_turn(self, space: int, first: bool) -> _Chosen | None:
        """The next sample of the source whose turn it is; ``None`` if the rest of the sequence is for the best fit.

        The space of an average sample is kept back, so that there is something to choose.
        """
        self._refill()
        source = self._whose_turn()
        if source is None:
            return None
        number, length = next(iter(self._queues[source].waiting.items()))
        kept_back = self._tokens_waiting // sum(map(len, self._pools))
        return (source, (length, number)) if first or length + kept_back <= space else None

    def _whose_turn(self) -> int | None:
        if not self._endless:
            return next((source for source, queue in enumerate(self._queues) if queue.waiting), None)
        total = sum(self._taken) + 1
        behind = [weight * total - taken for weight, taken in zip(self.weights, self._taken, strict=True)]
        return behind.index(max(behind))

    def _best_fit(self, space: int) -> list[_Chosen]:
        """The waiting sample, or the pair of them, that leaves the smallest gap; empty if none fits."""
        self._refill()
        pools = [(source, self._pools[source]) for source in self._not_ahead()]
        largest = [(found, source) for source, pool in pools if (found := _largest(pool, space))]
        if not largest:
            return []
        single, source = max(largest)
        best, gap = [(source, single)], space - single[0]
        for source, pool in pools:
            fitting = bisect_right(pool, (space, _LAST))
            for index in range(0, fitting, max(1, fitting * len(pools) // PAIRS_TRIED)):
                if gap * FULL <= self.seq_len:
                    return best
                one = pool[index]
                for other, partners in pools:
                    two = _largest(partners, space - one[0], one if other == source else None)
                    if two is not None and space - one[0] - two[0] < gap:
                        best, gap = [(source, one), (other, two)], space - one[0] - two[0]
        return best

    def _not_ahead(self) -> list[int]:
        """Sources that may fill a sequence: those that are not ahead of their weight by half of what one holds."""
        every = range(len(self._taken))
        if not self._endless or len(every) == 1:
            return list(every)
        total = sum(self._taken)
        allowed = 0.5 * total / max(self._count, 1)
        return [source for source in every if self._taken[source] - self.weights[source] * total < allowed]

    def _take(self, chosen: _Chosen, sequence: PlannedSequence) -> int:
        """Moves a waiting sample into the sequence; returns its length."""
        source, (length, number) = chosen
        pool = self._pools[source]
        del pool[bisect_right(pool, (length, number)) - 1]
        del self._queues[source].waiting[number]
        self._tokens_waiting -= length
        amount = self._amount(length)
        self._taken[source] += amount
        sequence.amounts[source] += amount
        sequence.members.append((source, number, length))
        return length


def _largest(pool: list[_Waiting], space: int, but: _Waiting | None = None) -> _Waiting | None:
    """The longest of a pool that fits."""
    index = bisect_right(pool, (space, _LAST)) - 1
    if index >= 0 and pool[index] == but:
        index -= 1
    return pool[index] if index >= 0 else None


def check_usable(supplies: Sequence[Supply], seq_len: int) -> None:
    """Checks that every source has something to train on.

    Raises:
        ValueError: if all samples of one are unusable or longer than a sequence.
    """
    for supply in supplies:
        step = 1 << 20
        pieces = (supply.tokens[start : start + step] for start in range(0, len(supply.tokens), step))
        if not any(((piece > 0) & (piece <= seq_len)).any() for piece in pieces):
            raise ValueError(
                f"no sample of {supply.name} is usable; `neo data inspect {supply.name}` and the log name the reasons"
            )

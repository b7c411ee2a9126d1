"""Equal visual tokens on all ranks at every step: sequences trade slots, and samples of nearly the same length.

A slot is what one rank has at one step. No trade changes which samples a block of steps holds, or how full its packed
sequences are on the whole. What changes is how many visual tokens each rank has at each step. The cost of a step is the
sum over its ranks of the fourth power of (visual tokens / mean of the step): lowest where all are equal, and what is
far above the mean counts most.

Every worker of every rank must come to the same trades, on whatever processor, so the arithmetic is that of integers
and of floats in a fixed order, which IEEE 754 makes exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

TOLERANCE = 1.04
"""A step whose slowest rank has at most so many times the mean is left as it is."""

CANDIDATES = 64
"""Partners looked at for each sample."""

TRADES = 8
"""At most so many for each rank of a step, and on average one."""

PAIRED = 8
"""Of how many samples of a sequence pairs are made."""

FLOOR = 0.05
"""Where a step has less than this fraction of the average, its cost counts in units of that instead of its own mean.

So a step of nearly nothing but text gives its few images away, rather than seek as many for every rank.
"""


class _Bundles(NamedTuple):
    """Samples that can go from one sequence to another together.

    Args:
        members: [bundles, 1 or 2] their samples; -1 is none.
        sequence: [bundles] the packed sequence that holds them.
        length: [bundles] tokens of them together.
        visual: [bundles] how many of them are visual.
        by_length: [bundles] the bundles in order of length.
        sorted: [bundles] the lengths in that order.
    """

    members: np.ndarray
    sequence: np.ndarray
    length: np.ndarray
    visual: np.ndarray
    by_length: np.ndarray
    sorted: np.ndarray


class Balance:
    """The packed sequences of some steps, and which samples and slots they have.

    The number of a slot is the step times the ranks, plus the rank.

    Args:
        lengths: [members] tokens of each sample.
        visual: [members] how many of them are visual.
        sequence_of: [members] the sequence of each, ascending.
        slot_of: [sequences] the slot of each.
        part_of: [sequences] sequences of different parts trade nothing.
        ranks: slots of a step.
        seq_len: tokens of a packed sequence, L.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        visual: np.ndarray,
        sequence_of: np.ndarray,
        slot_of: np.ndarray,
        part_of: np.ndarray,
        ranks: int,
        seq_len: int,
    ) -> None:
        self.sequence_of, self.slot_of, self._part_of = sequence_of.copy(), slot_of.copy(), part_of
        self._lengths, self._visual, self._ranks = lengths, visual, ranks
        self._gaps = seq_len - _sums(lengths, sequence_of, len(slot_of))
        self._sequence_visual = _sums(visual, sequence_of, len(slot_of))
        self._loads = _sums(self._sequence_visual, slot_of, int(slot_of.max()) + 1)
        steps = self._loads.reshape(-1, ranks).astype(np.float64)
        self._powers, self._totals = _in_order(_fourth(steps)), _in_order(steps)
        self._tops = steps.max(axis=1)
        self._floor = max(FLOOR * float(self._totals.sum()) / len(self._loads), 1.0)
        # Longer ones are not sought: nearly every sequence is full.
        self._usual_gap = int(np.sort(self._gaps)[len(self._gaps) * 9 // 10])
        by_length = np.argsort(lengths, kind="stable")
        members = np.arange(len(lengths))[:, None]
        self._samples = _Bundles(members, self.sequence_of, lengths, visual, by_length, lengths[by_length])
        self._pairs: _Bundles | None = None  # made when sought, until samples are traded

    def excess(self) -> np.ndarray:
        """[steps] visual tokens of the slowest rank over the mean; 1 where there are none."""
        return np.where(self._totals > 0, self._tops * self._ranks / np.maximum(self._totals, 1), 1.0)

    def improve(self) -> int:
        """Trades until each step is within the tolerance or nothing helps it; returns the number of trades.

        First what lowers the cost of all steps together; then, for steps that this leaves outside the tolerance, what
        lowers their own and takes no other one out of it.
        """
        return sum(self._improve(alone) for alone in (False, True))

    def _improve(self, alone: bool) -> int:
        left, made = np.full(len(self._totals), TRADES * self._ranks), 0
        while made < len(self._loads):
            excess = np.where(left > 0, self.excess(), 0)
            step = int(excess.argmax())
            if excess[step] <= TOLERANCE:
                break
            if self._trade(step, alone):
                left[step] -= 1
                made += 1
            else:
                left[step] = 0
        return made

    def _trade(self, step: int, alone: bool) -> bool:
        """Makes the best trade for the slowest rank of a step, or for the fastest one; False if none helps."""
        loads = self._loads[step * self._ranks : (step + 1) * self._ranks]
        slots = [step * self._ranks + int(loads.argmax()), step * self._ranks + int(loads.argmin())]
        for slot in slots:
            sequences, samples = self._best_sequences(slot, alone), self._best_samples(slot, self._samples, alone)
            if sequences[0] >= samples[0] > 0 or samples[0] <= 0 < sequences[0]:
                self._trade_sequences(*sequences[1:])
                return True
            if samples[0] > 0:
                self._trade_samples(self._samples, *samples[1:])
                return True
        pairs = self._pairs = self._pairs or self._make_pairs()
        for slot in slots:
            samples = self._best_samples(slot, pairs, alone)
            if samples[0] > 0:
                self._trade_samples(pairs, *samples[1:])
                return True
        return False

    def _best_sequences(self, slot: int, alone: bool) -> tuple[float, int, int]:
        """Gain, a sequence of this slot, and the one elsewhere for which it should be given; gain 0 if none helps."""
        ones, others = np.flatnonzero(self.slot_of == slot), np.flatnonzero(self.slot_of != slot)
        one, other = np.repeat(ones, len(others)), np.tile(others, len(ones))
        fits = self._part_of[one] == self._part_of[other]
        one, other = one[fits], other[fits]
        moved = self._sequence_visual[one] - self._sequence_visual[other]
        return _best(self._gain(slot, self.slot_of[other], moved, alone), one, other)

    def _best_samples(self, slot: int, bundles: _Bundles, alone: bool) -> tuple[float, int, int]:
        """The same for bundles of samples, given for one of about the same length that fits."""
        ones = np.flatnonzero(self.slot_of[bundles.sequence] == slot)
        first = np.searchsorted(bundles.sorted, bundles.length[ones] - self._usual_gap)
        last = np.searchsorted(bundles.sorted, bundles.length[ones] + self._gaps[bundles.sequence[ones]], side="right")
        count = np.minimum(last - first, CANDIDATES)
        which = np.repeat(np.arange(len(ones)), count)
        nth = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
        one, other = ones[which], bundles.by_length[first[which] + nth * (last - first)[which] // count[which]]
        slots = self.slot_of[bundles.sequence[other]]
        fits = bundles.length[one] - bundles.length[other] <= self._gaps[bundles.sequence[other]]
        fits &= (self._part_of[bundles.sequence[one]] == self._part_of[bundles.sequence[other]]) & (slots != slot)
        one, other = one[fits], other[fits]
        return _best(self._gain(slot, slots[fits], bundles.visual[one] - bundles.visual[other], alone), one, other)

    def _make_pairs(self) -> _Bundles:
        """One or two of the first samples of each sequence."""
        order = np.argsort(self.sequence_of, kind="stable")
        sequences = self.sequence_of[order]
        nth = np.arange(len(sequences)) - np.searchsorted(sequences, sequences)
        few = nth < PAIRED
        table = np.full((len(self.slot_of), PAIRED), -1)
        table[sequences[few], nth[few]] = order[few]
        a, b = np.triu_indices(PAIRED)  # a sample with itself stands for that sample alone
        whole = (table[:, a] >= 0) & (table[:, b] >= 0)
        members = np.stack([table[:, a], np.where(a == b, -1, table[:, b])], axis=-1)[whole]
        there = members >= 0
        length, visual = ((of[members] * there).sum(axis=1) for of in (self._lengths, self._visual))
        by_length = np.argsort(length, kind="stable")
        return _Bundles(members, np.nonzero(whole)[0], length, visual, by_length, length[by_length])

    def _gain(self, slot: int, slots: np.ndarray, moved: np.ndarray, alone: bool) -> np.ndarray:
        """How much the costs of the steps fall if so many visual tokens move from one slot to each of others.

        Alone, it is the cost of the first slot's step, and minus infinity where another step would leave the
        tolerance or get further away from it.
        """
        here, there = slot // self._ranks, slots // self._ranks
        within = there == here
        mine, theirs = self._loads[[slot]].astype(np.float64), self._loads[slots].astype(np.float64)
        out, into = _fourth(mine - moved) - _fourth(mine), _fourth(theirs + moved) - _fourth(theirs)
        power, total, powers, totals = self._powers[here], self._totals[here], self._powers[there], self._totals[there]
        after = self._cost(power + out + np.where(within, into, 0.0), total - np.where(within, 0, moved))
        gain = self._cost(power, total) - after
        if not alone:
            return gain + np.where(within, 0.0, self._cost(powers, totals) - self._cost(powers + into, totals + moved))
        tops = self._tops[there]
        limit = np.maximum(TOLERANCE, tops * self._ranks / np.maximum(totals, 1))
        stays = np.maximum(tops, theirs + moved) * self._ranks <= limit * (totals + moved)
        return np.where(within | stays, gain, -np.inf)

    def _cost(self, powers: np.ndarray, totals: np.ndarray) -> np.ndarray:
        return powers / _fourth(np.maximum(totals / self._ranks, self._floor))

    def _trade_sequences(self, one: int, other: int) -> None:
        a, b = int(self.slot_of[one]), int(self.slot_of[other])
        self._move(a, b, int(self._sequence_visual[one] - self._sequence_visual[other]))
        self.slot_of[one], self.slot_of[other] = b, a

    def _trade_samples(self, bundles: _Bundles, one: int, other: int) -> None:
        self._pairs = None
        a, b = int(bundles.sequence[one]), int(bundles.sequence[other])
        longer = int(bundles.length[other] - bundles.length[one])
        moved = int(bundles.visual[one] - bundles.visual[other])
        self._gaps[a] -= longer
        self._gaps[b] += longer
        self._sequence_visual[a] -= moved
        self._sequence_visual[b] += moved
        self._move(int(self.slot_of[a]), int(self.slot_of[b]), moved)
        for bundle, sequence in ((one, b), (other, a)):
            members = bundles.members[bundle]
            self.sequence_of[members[members >= 0]] = sequence

    def _move(self, giver: int, taker: int, moved: int) -> None:
        """Moves visual tokens from one slot to another."""
        self._loads[giver] -= moved
        self._loads[taker] += moved
        for step in {giver // self._ranks, taker // self._ranks}:
            loads = self._loads[None, step * self._ranks : (step + 1) * self._ranks].astype(np.float64)
            self._powers[step], self._totals[step] = _in_order(_fourth(loads))[0], _in_order(loads)[0]
            self._tops[step] = loads.max()


def _best(gain: np.ndarray, one: np.ndarray, other: np.ndarray) -> tuple[float, int, int]:
    """The largest gain and what gives it; 0 if that is hardly any."""
    best = int(gain.argmax()) if len(gain) else 0
    return (float(gain[best]), int(one[best]), int(other[best])) if len(gain) and gain[best] > 1e-4 else (0.0, 0, 0)


def _sums(values: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    found = np.zeros(count, np.int64)
    np.add.at(found, groups, values)
    return found


def _fourth(values: np.ndarray) -> np.ndarray:
    square = values * values
    return square * square


def _in_order(values: np.ndarray) -> np.ndarray:
    """[sequences] sums of [sequences, columns], added from left to right."""
    return np.cumsum(values, axis=1)[:, -1]

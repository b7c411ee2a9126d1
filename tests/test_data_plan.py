"""Rows planned from lengths alone: order, mixture, fill, and dealing to ranks; nothing is lost, doubled or split."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from neo_components.data.plan import step_plan
from neo_components.data.plan.order import EpochOrder
from neo_components.data.plan.pack_plan import PackPlan, PlannedSequence, Supply
from neo_components.data.plan.step_plan import StepPlan

L = 16384


def supply(count: int, seed: int, mean: float = 6.3, visual: bool = True, name: str = "x") -> Supply:
    """Lengths with a long tail, 30 tokens to a whole sequence; half or more of an image sample's are visual."""
    random = np.random.default_rng(seed)
    tokens = np.clip(np.exp(random.normal(mean, 1.2, count)), 30, L).astype(np.int32)
    share = random.uniform(0.5, 0.95, count) if visual else np.zeros(count)
    sizes = np.full(-(-count // 1000), 1000)
    sizes[-1] = count - sizes[:-1].sum()
    return Supply(name, tokens, (tokens * share).astype(np.int32), sizes)


def even(count: int, length: int, visual: int = 0) -> Supply:
    """Equal lengths."""
    return Supply("x", np.full(count, length, np.int32), np.full(count, visual, np.int32), np.array([count]))


def sequences_of(plan: PackPlan, count: int) -> list[PlannedSequence]:
    sequences = [plan.next_sequence() for _ in range(count)]
    return [sequence for sequence in sequences if sequence is not None]


def one_pass(plan: PackPlan) -> list[PlannedSequence]:
    return list(iter(plan.next_sequence, None))


# --- order


def test_epoch_order_is_a_local_shuffle() -> None:
    sizes = np.full(10, 100)
    assert EpochOrder(sizes, 0, [1]).take(0, 0, 1000).tolist() == list(range(1000))
    order = EpochOrder(sizes, 50, [1]).take(2, 0, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() == EpochOrder(sizes, 50, [1]).take(2, 0, 1000).tolist()
    assert order.tolist() != EpochOrder(sizes, 50, [1]).take(3, 0, 1000).tolist()
    assert order.tolist() != EpochOrder(sizes, 50, [2]).take(2, 0, 1000).tolist()
    # Shards come in another order, and no sample moves by 50 places or more from where its shard puts it.
    by_shard = np.array([number // 100 for number in order])
    first_seen = list(dict.fromkeys(by_shard[np.argsort([np.median(np.flatnonzero(by_shard == s)) for s in by_shard])]))
    assert first_seen != sorted(first_seen)
    expected = np.concatenate([np.arange(100 * shard, 100 * shard + 100) for shard in first_seen])
    places = np.empty(1000, int)
    places[order] = np.arange(1000)
    assert 10 < np.abs(places[expected] - np.arange(1000)).max() < 50


def test_pieces_of_an_order_are_those_of_the_whole() -> None:
    sizes = np.array([7, 1, 40, 13, 39])
    for shuffle in (0, 1, 9, 99, 100, 1000):
        order = EpochOrder(sizes, shuffle, [3])
        whole = order.take(1, 0, 200).tolist()
        assert sorted(whole) == list(range(100))
        pieces = [EpochOrder(sizes, shuffle, [3]).take(1, start, 11).tolist() for start in range(0, 100, 11)]
        assert [number for piece in pieces for number in piece] == whole


def test_small_folder_is_shuffled_as_a_whole() -> None:
    order = EpochOrder(np.full(4, 5), 20, [0])
    firsts = [int(order.take(epoch, 0, 1)[0]) for epoch in range(2000)]
    # Every sample is about equally often first: 100 +- 5 standard deviations.
    assert np.abs(np.bincount(firsts, minlength=20) - 100).max() < 50


# --- sequences


@pytest.mark.parametrize("kind", ["long tail", "easy-VQA", "no short ones"])
def test_sequences_are_full(kind: str) -> None:
    random = np.random.default_rng(0)
    short = Supply("x", random.integers(60, 150, 16000).astype(np.int32), np.zeros(16000, np.int32), np.array([16000]))
    long = Supply(
        "x", random.integers(1000, 4000, 16000).astype(np.int32), np.zeros(16000, np.int32), np.array([16000])
    )
    source, length = {"long tail": (supply(16000, 1), L), "easy-VQA": (short, 2048), "no short ones": (long, L)}[kind]
    sequences = one_pass(PackPlan([source], [1.0], seq_len=length, endless=False))
    taken = Counter(number for sequence in sequences for _, number, _ in sequence.members)
    assert len(taken) == 16000 and set(taken.values()) == {1}
    assert all(sequence.tokens <= length for sequence in sequences)
    assert all(source.tokens[number] == tokens for sequence in sequences for _, number, tokens in sequence.members)
    assert all(
        sequence.visual == sum(source.visual[number] for _, number, _ in sequence.members) for sequence in sequences
    )
    assert sum(sequence.tokens for sequence in sequences) / (len(sequences) * length) >= 0.985


def test_no_sample_comes_again_before_every_other_one() -> None:
    source = supply(3000, 2)
    source.tokens[::50] = 0
    source.tokens[7] = L + 1
    plan = PackPlan([source], [1.0], seq_len=L, shuffle=500, seed=1)
    counts = np.zeros(3000, int)
    usable = (source.tokens > 0) & (source.tokens <= L)
    crossings = 0
    while counts.max() < 4:
        sequence = plan.next_sequence()
        assert sequence is not None
        for _, number, _ in sequence.members:
            assert counts[number] == counts[usable].min()
            counts[number] += 1
        crossings += sequence.crosses
    assert not counts[~usable].any()
    assert crossings == 3


@pytest.mark.parametrize("weights", [(0.3, 0.7), (3.0, 7.0), (1.0, 1.0), (1.0, 50.0)])
@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_mixture_is_right_at_any_time(weights: tuple[float, float], unit: str) -> None:
    sources = [supply(3000, 1, 4.8, visual=False), supply(9000, 2)]
    plan = PackPlan(sources, weights, seq_len=L, shuffle=500, weight_unit=unit)
    taken = np.zeros(2)
    for number, sequence in enumerate(sequences_of(plan, 1500), 1):
        taken += [
            sum(length if unit == "tokens" else 1 for source, _, length in sequence.members if source == wanted)
            for wanted in (0, 1)
        ]
        weight = weights[0] / sum(weights)
        # In units of what a sequence holds.
        assert abs(taken[0] - weight * taken.sum()) / (taken.sum() / number) < 1


@pytest.mark.parametrize("cut", [0, 1, 40, 333])
def test_sequences_continue_where_they_stopped(cut: int) -> None:
    def fresh() -> PackPlan:
        return PackPlan([supply(800, 1), supply(90, 2)], [1.0, 2.0], seq_len=L, shuffle=70, seed=2)

    whole = sequences_of(fresh(), 400)
    first = fresh()
    begun = sequences_of(first, cut)
    second = fresh()
    second.load_state(json.loads(json.dumps(first.state())))
    assert begun + sequences_of(second, 400 - cut) == whole


def test_a_source_without_a_usable_sample_is_reported() -> None:
    with pytest.raises(ValueError, match="no sample of x is usable"):
        PackPlan([even(9, 101)], [1.0], seq_len=100)
    assert one_pass(PackPlan([even(9, 101)], [1.0], seq_len=100, endless=False)) == []


# --- ranks


def steps_of(plan: StepPlan, count: int) -> list[list[list[PlannedSequence]]]:
    steps = [plan.next_step() for _ in range(count)]
    return [step for step in steps if step is not None]


def mixed_plan() -> PackPlan:
    return PackPlan([supply(60000, 1), supply(30000, 2, 5.3, visual=False)], [7, 3], seq_len=L, shuffle=10000)


@pytest.mark.parametrize(("ranks", "size"), [(8, 1), (4, 2), (64, 1)])
def test_ranks_get_equal_work_and_the_same_mixture(ranks: int, size: int) -> None:
    steps = steps_of(StepPlan(mixed_plan(), ranks, size), 1200 if ranks == 8 else 96)
    assert all(len(mine) == size for step in steps for mine in step)
    visual = np.array([[sum(sequence.visual for sequence in mine) for mine in step] for step in steps], float)
    # Some samples here are as long as a sequence, so single steps may be uneven (see test_data_balance.py).
    assert visual.max(axis=1).sum() <= 1.035 * visual.mean(axis=1).sum()
    assert (visual.max(axis=1) > 1.05 * visual.mean(axis=1)).mean() < (0.01 if ranks == 8 else 0.08)
    assert visual.sum(axis=0).max() <= 1.005 * visual.sum(axis=0).mean()
    for rank in range(ranks):
        amounts = np.cumsum([[0, 0], *(sequence.amounts for step in steps for sequence in step[rank])], axis=0)
        window = min(1000, len(amounts) - 1)
        inside = amounts[window:] - amounts[:-window]
        # Of any 1,000 sequences of a rank the mixture is right to within what one sequence holds.
        assert (np.abs(inside[:, 1] - 0.3 * inside.sum(axis=1)) <= inside.sum(axis=1) / window).all()


def numbers(steps: list[list[list[PlannedSequence]]]) -> list[tuple[int, int]]:
    return [
        (source, number)
        for step in steps
        for mine in step
        for sequence in mine
        for source, number, _ in sequence.members
    ]


@pytest.mark.parametrize("cut", [0, 1, 31, 32, 33, 50])
def test_steps_continue_where_they_stopped(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_plan, "SEQUENCES_PER_BLOCK", 1)  # so that 70 steps are three blocks

    def fresh(position: Any = None) -> StepPlan:
        return StepPlan(PackPlan([supply(3000, 1)], [1.0], seq_len=L, shuffle=100), 3, 2, position)

    whole = steps_of(fresh(), 70)
    first = fresh()
    begun = steps_of(first, cut)
    second = fresh(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    assert begun + steps_of(second, 70 - cut) == whole
    assert second.state()["block"] == 2


def test_other_numbers_of_ranks_continue_without_a_repeat() -> None:
    """Each sample once in the epoch, although ranks and sequences change again and again."""
    usable = 9000

    def plan() -> PackPlan:
        return PackPlan([supply(usable, 5, 5.8)], [1.0], seq_len=L, shuffle=1000, seed=3)

    position, seen = None, Counter[tuple[int, int]]()
    for ranks, size, count in ((2, 1, 5), (3, 2, 4), (3, 2, 2), (1, 1, 3), (5, 1, 1), (2, 2, 40), (4, 1, 7)):
        steps = StepPlan(plan(), ranks, size, position)
        seen.update(numbers(steps_of(steps, count)))
        position = json.loads(json.dumps(steps.state()))
    # To the end of the epoch.
    steps = StepPlan(plan(), 4, 1, position)
    while len(seen) < usable:
        seen.update(numbers(steps_of(steps, 1)))
    total = sum(seen.values())
    assert set(seen.values()) <= {1, 2}
    assert total - usable < 400  # what else lay in the last block


def test_validation_ends_for_all_ranks_at_once() -> None:
    plan = PackPlan([even(101, 40)], [1.0], seq_len=100, endless=False)
    steps = list(iter(StepPlan(plan, 4, 3).next_step, None))
    assert sorted(numbers(steps)) == [(0, number) for number in range(101)]
    assert all(len(step) == 4 for step in steps)
    assert [len(mine) for step in steps[:-1] for mine in step] == [3] * 4 * (len(steps) - 1)
    assert {len(mine) for mine in steps[-1]} <= {0, 1, 2, 3}
    # Two sequences of four samples are spread over four ranks.
    few = StepPlan(PackPlan([even(4, 40)], [1.0], seq_len=100, endless=False), 4, 1)
    assert [[len(sequence.members) for sequence in mine] for mine in few.next_step() or []] == [[1]] * 4
    assert few.next_step() is None

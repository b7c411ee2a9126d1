"""At every step all ranks have about the same number of visual tokens, and the sequences hold what was planned."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from shard_builders import SPEC, TOKENIZER

from neo_components.data import NEODataModule, Source, write_shards
from neo_components.data.pictures.easy_vqa import read_easy_vqa
from neo_components.data.plan.balance import Balance
from neo_components.data.plan.pack_plan import PackPlan, PlannedSequence, Supply
from neo_components.data.plan.step_plan import Step, StepPlan

LongTailed = Callable[[int], list[Supply]]


@pytest.fixture
def long_tailed(monkeypatch: pytest.MonkeyPatch) -> LongTailed:
    """The lengths of benchmarks/data_scale.py, in shards of 700 images or 300 texts."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    data_scale = importlib.import_module("data_scale")
    return lambda count: list(data_scale.long_tailed(count, count // 1000))


def plan(supplies: list[Supply], seq_len: int) -> PackPlan:
    return PackPlan(supplies, [7, 3][: len(supplies)], seq_len=seq_len, shuffle=10000)


def steps_of(plan: PackPlan, ranks: int, size: int, count: int) -> list[Step]:
    steps = StepPlan(plan, ranks, size)
    found = [steps.next_step() for _ in range(count)]
    return [step for step in found if step is not None]


def excess(steps: list[Step]) -> np.ndarray:
    """[steps] visual tokens of the slowest rank over the mean."""
    visual = np.array([[sum(sequence.visual for sequence in mine) for mine in step] for step in steps], float)
    return np.where(visual.any(axis=1), visual.max(axis=1) / np.maximum(visual.mean(axis=1), 1), 1.0)


def fill(sequences: list[PlannedSequence], seq_len: int) -> float:
    return sum(sequence.tokens for sequence in sequences) / (len(sequences) * seq_len)


@pytest.mark.parametrize(
    ("seq_len", "ranks", "size", "count"),
    [
        (4096, 2, 1, 1024), (4096, 8, 1, 500), (4096, 64, 1, 32), (4096, 2, 4, 256), (4096, 8, 4, 128),
        (16384, 2, 1, 512), (16384, 8, 1, 128), (16384, 64, 1, 32), (16384, 8, 4, 64),
    ],
)  # fmt: skip
def test_no_rank_waits_for_the_images_of_another(
    long_tailed: LongTailed, seq_len: int, ranks: int, size: int, count: int
) -> None:
    """At most 5 % over the mean at every single step; without trades it is up to four times the mean."""
    supplies = long_tailed(120000)
    steps = steps_of(plan(supplies, seq_len), ranks, size, count)
    assert excess(steps).max() <= 1.05
    assert all(len(mine) == size for step in steps for mine in step)
    everyone = [sequence for step in steps for mine in step for sequence in mine]
    assert max(sequence.tokens for sequence in everyone) <= seq_len
    assert fill(everyone, seq_len) >= 0.985
    for sequence in everyone:
        assert sequence.visual == sum(supplies[source].visual[number] for source, number, _ in sequence.members)
        assert sequence.amounts == [sum(source == wanted for source, _, _ in sequence.members) for wanted in (0, 1)]
        assert all(supplies[source].tokens[number] == length for source, number, length in sequence.members)
    assert len({sequence.number for sequence in everyone}) == len(everyone)
    taken = Counter((source, number) for sequence in everyone for source, number, _ in sequence.members)
    assert set(taken.values()) == {1}


def test_one_rank_gets_the_sequences_as_they_are_planned(long_tailed: LongTailed) -> None:
    planned = plan(long_tailed(20000), 4096)
    expected = [planned.next_sequence() for _ in range(300)]
    steps = steps_of(plan(long_tailed(20000), 4096), 1, 3, 100)
    assert [sequence for step in steps for mine in step for sequence in mine] == expected


@pytest.mark.parametrize(("ranks", "size"), [(2, 1), (4, 2)])
def test_no_step_holds_a_sample_twice_before_every_other_one_came(
    long_tailed: LongTailed, ranks: int, size: int
) -> None:
    """A small source of which a block holds several epochs."""
    (images, _) = long_tailed(3000)
    counts = np.zeros(len(images.tokens), int)
    usable = images.tokens <= 4096
    fewest = 0
    for step in steps_of(PackPlan([images], [1.0], seq_len=4096, shuffle=500), ranks, size, 2400 // ranks // size):
        for mine in step:
            for sequence in mine:
                for _, number, _ in sequence.members:
                    counts[number] += 1
        # Only in the step in which an epoch ends may there be three different counts.
        fewest, most = counts[usable].min(), counts.max()
        assert most - fewest <= 1 + any(sequence.crosses for mine in step for sequence in mine)
    assert fewest >= 3


def test_trades_keep_to_their_part_and_to_the_length() -> None:
    """Four steps of two ranks, two parts: what lies in one part stays there."""
    random = np.random.default_rng(1)
    lengths, visual, sequence_of = [], [], []
    for sequence in range(8):
        for length in (10, 20, 30, 40):
            lengths.append(length)
            visual.append(int(random.integers(0, length)) * (sequence % 2))
            sequence_of.append(sequence)
    parts = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    of = np.array(sequence_of)
    balance = Balance(np.array(lengths), np.array(visual), of, np.arange(8), parts, 2, 100)
    before = balance.excess()
    assert (before == 2).all()  # one rank of each step has everything
    assert balance.improve() > 4
    assert balance.excess().max() < 1.3 and balance.excess().mean() < 1.15
    assert (parts[balance.sequence_of] == parts[of]).all()
    assert sorted(balance.slot_of) == list(range(8)) and (balance.slot_of // 4 == parts).all()
    assert (np.bincount(balance.sequence_of, weights=lengths) <= 100).all()


def easy_vqa(folder: Path, images: int) -> Supply:
    """The package's own images with two questions a sample, written as shards and counted as a run does it."""
    samples = [
        {
            "key": f"{image.number}-{first}",
            "images": [image.path],
            "conversations": [
                turn
                for place, (question, answer) in enumerate(image.questions[first : first + 2])
                for turn in (
                    {"from": "human", "value": "<image>\n" * (place == 0) + question},
                    {"from": "gpt", "value": answer},
                )
            ],
        }
        for image in read_easy_vqa("train")[:images]
        for first in range(0, len(image.questions), 2)
    ]
    write_shards(samples, folder)
    data = NEODataModule(TOKENIZER, [Source(str(folder))], min_pixels=16384, max_pixels=16384, workers=0)
    data.input_spec = SPEC
    return data._length_of(data.train_sources[0]).supply


@pytest.mark.parametrize("images", [300, pytest.param(4000, marks=pytest.mark.slow)])
def test_sequences_of_easy_vqa_are_full_and_balanced(images: int, tmp_path: Path) -> None:
    supply = easy_vqa(tmp_path / "shards", images)
    assert len(supply.tokens) > 4 * images and supply.tokens.min() > 0 and set(supply.visual) == {16}
    for seq_len in (4096, 16384):
        one_pass = PackPlan([supply], [1.0], seq_len=seq_len, endless=False)
        sequences = list(iter(one_pass.next_sequence, None))
        assert sum(len(sequence.members) for sequence in sequences) == len(supply.tokens)
        # The last sequence of a pass holds what is left; it is no sequence of training.
        assert fill(sequences[:-1], seq_len) >= 0.985
        for ranks in (1, 2, 8):
            steps = steps_of(plan([supply], seq_len), ranks, 1, 400 // ranks)
            assert fill([sequence for step in steps for mine in step for sequence in mine], seq_len) >= 0.985
            assert excess(steps).max() <= 1.05

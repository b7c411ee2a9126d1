"""The order of samples: shuffling, mixing, dividing among workers and ranks, and going on where it stopped."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
from shard_builders import mixed_samples, write

from neo_components.data.shard_folder import ShardFolder
from neo_components.data.stream import SampleStream, epoch_order


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[ShardFolder]:
    base = tmp_path_factory.mktemp("stream")
    return [ShardFolder(write(base / str(n), mixed_samples(n, images=False), max_per_shard=4)) for n in (12, 20)]


def draw(stream: SampleStream, count: int) -> list[tuple[int, int]]:
    return [place for place in islice(iter(stream.next, None), count) if place]


def test_epoch_order_is_a_local_shuffle() -> None:
    shards = np.repeat(np.arange(10), 100)
    assert epoch_order(shards, 0, (1,)).tolist() == list(range(1000))
    order = epoch_order(shards, 50, (1, 2))
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() == epoch_order(shards, 50, (1, 2)).tolist()
    assert order.tolist() != epoch_order(shards, 50, (1, 3)).tolist()
    # Shards come in another order, and no sample moves by 50 places or more from where its shard puts it.
    first_seen = list(dict.fromkeys(shards[order].tolist()))
    assert first_seen != list(range(10))
    by_shard = np.concatenate([np.flatnonzero(shards == shard) for shard in first_seen])
    places = np.empty(1000, int)
    places[order] = np.arange(1000)
    assert 10 < np.abs(places[by_shard] - np.arange(1000)).max() < 50


def test_small_folder_is_shuffled_as_a_whole() -> None:
    shards = np.repeat(np.arange(4), 5)
    orders = np.array([epoch_order(shards, 20, (0, epoch)) for epoch in range(2000)])
    # Every sample is about equally often first: 100 +- 5 standard deviations.
    assert np.abs(np.bincount(orders[:, 0], minlength=20) - 100).max() < 50


def test_each_epoch_holds_each_sample_once(folders: list[ShardFolder]) -> None:
    stream = SampleStream(folders[:1], [1.0], shuffle=6, seed=3)
    epochs = [[number for _, number in draw(stream, 12)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream.epochs == 2  # the third ends with the next sample


@pytest.mark.parametrize("shares", [(0.3, 0.7), (3.0, 7.0), (1.0, 1.0), (1.0, 50.0)])
def test_mixture_is_right_at_any_time(folders: list[ShardFolder], shares: tuple[float, float]) -> None:
    stream = SampleStream(folders, shares, seed=1)
    taken = Counter[int]()
    for total in range(1, 300):
        taken[draw(stream, 1)[0][0]] += 1
        for source, share in enumerate(shares):
            assert abs(taken[source] - total * share / sum(shares)) <= 1


def test_rejected_samples_do_not_count(folders: list[ShardFolder]) -> None:
    stream = SampleStream(folders, [1.0, 1.0])
    kept = Counter[int]()
    for _ in range(90):
        source, number = draw(stream, 1)[0]
        if source == 0 and number % 3:
            stream.reject(source)
        else:
            kept[source] += 1
    assert abs(kept[0] - kept[1]) <= 1


def test_an_epoch_without_a_usable_sample_ends_the_run(folders: list[ShardFolder]) -> None:
    stream = SampleStream(folders[:1], [1.0])
    for _ in range(12):
        stream.reject(draw(stream, 1)[0][0])
    with pytest.raises(ValueError, match=r"no sample of .* is usable"):
        stream.next()


@pytest.mark.parametrize("endless", [True, False])
def test_consumers_share_an_epoch(folders: list[ShardFolder], endless: bool) -> None:
    streams = [
        SampleStream(folders[:1], [1.0], shuffle=5, consumer=consumer, consumers=5, endless=endless)
        for consumer in range(5)
    ]
    lengths = [3, 3, 2, 2, 2]
    numbers = [number for stream, length in zip(streams, lengths, strict=True) for _, number in draw(stream, length)]
    assert sorted(numbers) == list(range(12))


def test_validation_is_one_pass_in_order(folders: list[ShardFolder]) -> None:
    stream = SampleStream(folders, [1.0, 9.0], shuffle=100, endless=False)
    assert draw(stream, 99) == [(0, number) for number in range(12)] + [(1, number) for number in range(20)]
    assert stream.next() is None


@pytest.mark.parametrize("cut", [0, 5, 13, 40])
def test_goes_on_where_it_stopped(folders: list[ShardFolder], cut: int) -> None:
    arguments: dict[str, Any] = {"shuffle": 7, "seed": 2, "consumer": 1, "consumers": 2}
    whole = draw(SampleStream(folders, [1.0, 2.0], **arguments), 80)
    first = SampleStream(folders, [1.0, 2.0], **arguments)
    begun = draw(first, cut)
    second = SampleStream(folders, [1.0, 2.0], **arguments)
    second.load_state(json.loads(json.dumps(first.state())))
    assert begun + draw(second, 80 - cut) == whole


def test_more_consumers_than_samples(folders: list[ShardFolder]) -> None:
    assert SampleStream(folders[:1], [1.0], consumer=12, consumers=13, endless=False).next() is None
    with pytest.raises(ValueError, match="12 samples for 13 workers of all ranks"):
        SampleStream(folders[:1], [1.0], consumers=13)

"""Which sample comes next: shuffling, mixing and dividing the samples of several folders, by their numbers alone.

Nothing is read here, so a run of any length resumes at once: its place is an epoch and a position for each source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neo_components.data.shard_folder import ShardFolder


def epoch_order(shards: np.ndarray, shuffle: int, seed: Sequence[int]) -> np.ndarray:
    """Order of the samples of a folder in one epoch.

    Shards come in random order and each sample moves by less than ``shuffle`` places, so reading stays local, as with a
    shuffle buffer of that many samples. A folder of at most ``shuffle`` samples is shuffled as a whole.

    Args:
        shards: number of the shard of each sample, ascending.
        shuffle: samples; 0 keeps the order of the folder.
        seed: of this epoch.

    Returns:
        numbers of the samples, int64.
    """
    count = len(shards)
    if shuffle <= 0:
        return np.arange(count)
    random = np.random.default_rng(list(seed))
    if shuffle >= count:
        return random.permutation(count)
    order = np.argsort(random.permutation(int(shards[-1]) + 1)[shards], kind="stable")
    return order[np.argsort(np.arange(count) + random.uniform(0, shuffle, count), kind="stable")]


def check_divisible(folders: Sequence[ShardFolder], consumers: int) -> None:
    """Checks that training gives every consumer something to read.

    Raises:
        ValueError: if a folder holds fewer samples than there are consumers.
    """
    for folder in folders:
        if len(folder) < consumers:
            raise ValueError(
                f"{folder.folder} holds {len(folder)} samples for {consumers} workers of all ranks; use fewer workers"
            )


class SampleStream:
    """The samples that one consumer (a worker of a rank) reads, one after the other.

    In training the stream is endless. Each next sample is of the source that is furthest behind its share, so the
    mixture is right at any time and the same in every run. A source that ends begins anew in another order. In
    validation every sample comes once, in the order of the folders.

    Args:
        folders: the sources.
        shares: share of the samples of each source, any positive numbers; not used in validation.
        shuffle: see :func:`epoch_order`; not used in validation.
        seed: of the run.
        consumer: number of this consumer.
        consumers: number of all consumers; each reads every ``consumers``-th sample of an epoch.
        endless: training if True, else validation.

    Raises:
        ValueError: if training has a source with fewer samples than there are consumers.
    """

    def __init__(
        self,
        folders: Sequence[ShardFolder],
        shares: Sequence[float],
        *,
        shuffle: int = 0,
        seed: int = 0,
        consumer: int = 0,
        consumers: int = 1,
        endless: bool = True,
    ) -> None:
        self._folders = folders
        self._shares = [share / sum(shares) for share in shares]
        self._shuffle, self._seed = shuffle, seed
        self._consumer, self._consumers = consumer, consumers
        self._endless = endless
        if endless:
            check_divisible(folders, consumers)
        self._epochs = [0] * len(folders)
        self._positions = [0] * len(folders)
        self._taken = [0] * len(folders)
        self._taken_before = [0] * len(folders)  # at the beginning of the epoch
        self._orders = [self._order(source) for source in range(len(folders))]

    @property
    def epochs(self) -> int:
        """Epochs that ended, of all sources together."""
        return sum(self._epochs)

    def next(self) -> tuple[int, int] | None:
        """Source and number of the next sample; ``None`` at the end of validation.

        Raises:
            ValueError: if a whole epoch of a source held no usable sample.
        """
        source = self._most_behind() if self._endless else self._first_unread()
        if source is None:
            return None
        if self._positions[source] == len(self._orders[source]):
            self._begin_epoch(source)
        number = int(self._orders[source][self._positions[source]])
        self._positions[source] += 1
        self._taken[source] += 1
        return source, number

    def reject(self, source: int) -> None:
        """Takes back a sample of this source that turned out to be unusable: it does not count towards its share."""
        self._taken[source] -= 1

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "epochs": list(self._epochs),
            "positions": list(self._positions),
            "taken": list(self._taken),
            "taken_before": list(self._taken_before),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state` was asked for."""
        self._epochs, self._positions = list(state["epochs"]), list(state["positions"])
        self._taken, self._taken_before = list(state["taken"]), list(state["taken_before"])
        self._orders = [self._order(source) for source in range(len(self._folders))]

    def _most_behind(self) -> int:
        total = sum(self._taken) + 1
        behind = [share * total - taken for share, taken in zip(self._shares, self._taken, strict=True)]
        return behind.index(max(behind))

    def _first_unread(self) -> int | None:
        places = zip(self._positions, self._orders, strict=True)
        return next((source for source, (position, order) in enumerate(places) if position < len(order)), None)

    def _begin_epoch(self, source: int) -> None:
        if self._taken[source] <= self._taken_before[source]:
            raise ValueError(f"no sample of {self._folders[source].folder} is usable; the log names the reasons")
        self._taken_before[source] = self._taken[source]
        self._epochs[source] += 1
        self._positions[source] = 0
        self._orders[source] = self._order(source)

    def _order(self, source: int) -> np.ndarray:
        seed = (self._seed, source, self._epochs[source])
        order = epoch_order(self._folders[source].shards, self._shuffle if self._endless else 0, seed)
        return order[self._consumer :: self._consumers].copy()

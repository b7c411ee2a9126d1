"""The order of a folder's samples in each epoch, computed piece by piece, so that its size does not matter.

Shards come in random order, one after the other, and samples are mixed within blocks of ``shuffle`` samples of that
sequence. The blocks begin elsewhere in every epoch. A piece is computed from a few numbers, without the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class EpochOrder:
    """One folder's order of samples.

    Args:
        shard_sizes: samples in each shard, [shards].
        shuffle: samples in a block; 0 keeps the order of the folder, and a folder of at most so many samples is
            shuffled as a whole.
        seed: of the run and the source.
    """

    def __init__(self, shard_sizes: np.ndarray, shuffle: int, seed: Sequence[int]) -> None:
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.count = int(self._sizes.sum())
        self._shuffle, self._seed = max(shuffle, 0), list(seed)
        self._epoch = -1
        self._block = -1
        self._numbers = np.zeros(0, np.int64)

    def take(self, epoch: int, position: int, count: int) -> np.ndarray:
        """Numbers of the samples at some positions of an epoch.

        Args:
            epoch: from 0.
            position: of the first one.
            count: how many; fewer are returned at the end of the epoch.

        Returns:
            int64 numbers of samples.
        """
        stop = min(position + count, self.count)
        if not self._shuffle:
            return np.arange(position, stop)
        self._begin(epoch)
        found = []
        while position < stop:
            block = (position + self._offset) // self._shuffle
            first = max(block * self._shuffle - self._offset, 0)
            piece = self._of_block(block, first)[position - first : stop - first]
            found.append(piece)
            position += len(piece)
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _begin(self, epoch: int) -> None:
        """Draws the order of the shards and where the blocks begin."""
        if epoch == self._epoch:
            return
        random = np.random.default_rng([*self._seed, epoch])
        self._shards = random.permutation(len(self._sizes))
        self._ends = np.cumsum(self._sizes[self._shards])
        whole = self._shuffle >= self.count
        self._offset = 0 if whole else int(random.integers(self._shuffle))
        self._epoch, self._block = epoch, -1

    def _of_block(self, block: int, first: int) -> np.ndarray:
        if block != self._block:
            stop = min((block + 1) * self._shuffle - self._offset, self.count)
            random = np.random.default_rng([*self._seed, self._epoch, 1 + block])
            positions = first + random.permutation(stop - first)
            shard = np.searchsorted(self._ends, positions, side="right")
            inside = positions - self._ends[shard] + self._sizes[self._shards[shard]]
            self._numbers = self._starts[self._shards[shard]] + inside
            self._block = block
        return self._numbers

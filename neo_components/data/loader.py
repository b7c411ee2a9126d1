"""Batches of packed rows from worker processes, and the exact place of the run among them.

Each worker sends, with each batch, the place of its own row stream behind that batch (some numbers). The loader keeps
the place of the last batch that the trainer took from each worker, so a resumed run goes on with the very next batch,
at no cost, whatever workers had read ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from neo_components.data.rows import RowStream
from neo_components.data.tally import Tally
from neo_components.types import Batch

Delivery = tuple[Batch | None, int, dict[str, Any]]
"""A batch (``None`` behind the last one), the number of its stream, and that stream's place behind it."""


@dataclass
class Progress:
    """Which batches of a loader were taken.

    Args:
        batches: number of batches taken.
        places: place of each stream behind its last batch taken.
        handed: (stream, place) of batches that left the loader and were not taken yet, in order.
        latest: place of each stream behind the last batch that left the loader.
    """

    batches: int = 0
    places: dict[int, dict[str, Any]] = field(default_factory=dict)
    handed: deque[tuple[int, dict[str, Any]]] = field(default_factory=deque)
    latest: dict[int, dict[str, Any]] = field(default_factory=dict)

    def take(self) -> None:
        """Notes that the trainer took the oldest batch handed out."""
        stream, self.places[stream] = self.handed.popleft()
        self.batches += 1

    def tally(self) -> Tally:
        """Samples read and skipped up to the last batch that left the loader."""
        return sum((Tally.from_state(place["tally"]) for place in self.latest.values()), Tally())


class RowDataset(IterableDataset[Delivery]):
    """Batches of the row streams of one rank.

    Args:
        make_stream: ``make_stream(number, place)`` gives the row stream of this number, at its place (``None`` is the
            beginning). A rank has as many streams as workers, at least one.
        rows: rows in one batch, B.
    """

    def __init__(self, make_stream: Callable[[int, Mapping[str, Any] | None], RowStream], rows: int) -> None:
        super().__init__()
        self._make_stream, self._rows = make_stream, rows
        self._batches = 0
        self._places: dict[int, dict[str, Any]] = {}

    def resume(self, progress: Progress) -> None:
        """Lets the next iteration begin behind the batches that were taken."""
        self._batches, self._places = progress.batches, dict(progress.places)

    def __iter__(self) -> Iterator[Delivery]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # The loader asks worker 0 first, so worker 0 serves the stream whose turn it is.
        number = (number + self._batches) % workers
        stream = self._make_stream(number, self._places.get(number))
        while True:
            rows: list[Batch] = []
            while len(rows) < self._rows and (row := stream.next_row()) is not None:
                rows.append(row)
            yield (Batch.stack(rows) if rows else None), number, stream.state()
            if len(rows) < self._rows:
                return


def _as_it_is(delivery: Any) -> Any:
    return delivery


class RowLoader(DataLoader[Delivery]):
    """Yields :class:`~neo_components.types.Batch` and keeps account in ``progress``.

    Args:
        dataset: of this rank.
        workers: worker processes; 0 reads in the process itself.
        progress: where the run is; each iteration begins behind the batches taken.
        keep: if True, a batch counts as taken when it leaves the loader; otherwise when ``progress.take`` is called.
    """

    def __init__(self, dataset: RowDataset, workers: int, progress: Progress, keep: bool) -> None:
        super().__init__(
            dataset,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
        )
        self._rows, self._progress, self._keep = dataset, progress, keep

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        progress = self._progress
        progress.handed.clear()
        self._rows.resume(progress)
        for batch, stream, place in super().__iter__():
            progress.latest[stream] = place
            if batch is None:
                continue
            progress.handed.append((stream, place))
            if self._keep:
                progress.take()
            yield batch

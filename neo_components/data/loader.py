"""Batches of packed rows from worker processes, and the exact place of the run among them.

The plan of a run is the same in every worker (see ``data/step_plan.py``); worker ``n`` of ``W`` makes every ``W``-th
batch of its rank. With each batch comes the place of the plan behind it. The loader keeps the place of the last batch
that the trainer took, so a resumed run goes on with the very next batch, whatever workers had read ahead.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from neo_components.data.plan.step_plan import StepPlan
from neo_components.data.rows import RowMaker
from neo_components.data.skip_counts import SkipCounts
from neo_components.types import Batch

Place = dict[str, Any]
"""See ``StepPlan.state``."""

Delivery = tuple[Batch, dict[str, Any], Place]
"""A batch, the tally of its samples, and the place of the plan behind it."""


@dataclass
class Progress:
    """Which batches of a loader were taken.

    Args:
        batches: number of batches taken.
        place: of the plan behind the last batch taken; ``None`` is the beginning.
        tally: samples read and skipped up to the last batch taken.
        known: samples that are left out because they were known to be unusable; set when the loader is made.
        handed: (place, tally) behind batches that left the loader and were not taken yet, in order.
    """

    batches: int = 0
    place: Place | None = None
    tally: SkipCounts = field(default_factory=SkipCounts)
    known: SkipCounts = field(default_factory=SkipCounts)
    handed: deque[tuple[Place, SkipCounts]] = field(default_factory=deque)

    def take(self) -> None:
        """Notes that the trainer took the oldest batch handed out."""
        self.place, self.tally = self.handed.popleft()
        self.batches += 1

    @property
    def latest(self) -> SkipCounts:
        """Samples read and skipped up to the last batch that left the loader."""
        return self.handed[-1][1] if self.handed else self.tally


class RowDataset(IterableDataset[Delivery]):
    """Batches of one rank.

    Args:
        make_plan: ``make_plan(place)`` gives the plan of the run at its place (``None`` is the beginning).
        make_rows: makes batches.
        rank: number of this process among those that train together.
    """

    def __init__(
        self, make_plan: Callable[[Mapping[str, Any] | None], StepPlan], make_rows: RowMaker, rank: int
    ) -> None:
        super().__init__()
        self._make_plan, self._make_rows, self._rank = make_plan, make_rows, rank
        self._place: Place | None = None

    def resume(self, place: Place | None) -> None:
        """Lets the next iteration begin behind this place."""
        self._place = place

    def __iter__(self) -> Iterator[Delivery]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        plan = self._make_plan(self._place)
        number = 0
        while (step := plan.next_step()) is not None:
            # The loader asks worker 0 for the first batch, worker 1 for the second, ...
            if number % workers == mine:
                batch, tally = self._make_rows.batch(step[self._rank])
                yield batch, tally.state(), plan.state()
            number += 1


def _as_it_is(delivery: Any) -> Any:
    return delivery


def _outlive_sigterm(worker: int) -> None:
    """Schedulers send SIGTERM to every process of a job: a worker goes on, for its trainer still ends the step.

    Only what its own process sends ends it, as it does with workers that are left when it exits. Where the system does
    not tell who sent a signal (macOS), any ends it.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_wait_for_own, args=(os.getppid(),), daemon=True).start()


def _wait_for_own(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid not in (parent, os.getpid()):
        pass
    os._exit(128 + signal.SIGTERM)


class RowLoader(DataLoader[Delivery]):
    """Yields :class:`~neo_components.types.Batch` and keeps account in ``progress``.

    Args:
        dataset: of this rank.
        workers: worker processes; 0 reads in the process itself.
        progress: where the run is; each iteration begins behind the batches taken.
        keep: if True, a batch counts as taken when it leaves the loader; otherwise when ``progress.take`` is called.
        max_skipped: largest share of samples that may be skipped, see :meth:`SkipCounts.check`.
    """

    def __init__(
        self, dataset: RowDataset, workers: int, progress: Progress, keep: bool, max_skipped: float = 1.0
    ) -> None:
        super().__init__(
            dataset,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_outlive_sigterm,
            generator=torch.Generator(),  # else each pass would draw from the random numbers of the training
            pin_memory=torch.cuda.is_available(),
        )
        self._rows, self._progress, self._keep, self._max_skipped = dataset, progress, keep, max_skipped

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        progress = self._progress
        progress.handed.clear()
        self._rows.resume(progress.place)
        tally = progress.tally
        for batch, counts, place in super().__iter__():
            tally = tally + SkipCounts.from_state(counts)
            tally.check(self._max_skipped)
            progress.handed.append((place, tally))
            if self._keep:
                progress.take()
            yield batch
        tally.check(self._max_skipped, complete=True)

"""The loader: batches of packed sequences from worker processes, and the exact position of the run among them.

The plan of a run is the same in every worker (see ``data/plan/step_plan.py``); worker ``n`` of ``W`` makes every
``W``-th batch of its rank. With each batch comes the position of the plan behind it. The loader keeps the position of
the last batch that the trainer took, so a resumed run continues with the very next batch, whatever workers had read
ahead.
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

from neo_components.data.packed import BatchMaker
from neo_components.data.plan.step_plan import StepPlan
from neo_components.data.skip_counts import SkipCounts
from neo_components.types import Batch

Position = dict[str, Any]
"""See ``StepPlan.state``."""

Delivery = tuple[Batch, dict[str, Any], Position]
"""A batch, the counts of its samples, and the position of the plan behind it."""


@dataclass
class Progress:
    """Which batches of a loader were taken.

    Args:
        batches: number of batches taken.
        position: of the plan behind the last batch taken; ``None`` is the beginning.
        counts: samples read and skipped up to the last batch taken.
        known: samples that are left out because they were known to be unusable; set when the loader is made.
        handed: (position, counts) behind batches that left the loader and were not taken yet, in order.
    """

    batches: int = 0
    position: Position | None = None
    counts: SkipCounts = field(default_factory=SkipCounts)
    known: SkipCounts = field(default_factory=SkipCounts)
    handed: deque[tuple[Position, SkipCounts]] = field(default_factory=deque)

    def take(self) -> None:
        """Notes that the trainer took the oldest batch handed out."""
        self.position, self.counts = self.handed.popleft()
        self.batches += 1

    @property
    def latest(self) -> SkipCounts:
        """Samples read and skipped up to the last batch that left the loader."""
        return self.handed[-1][1] if self.handed else self.counts


class PackedDataset(IterableDataset[Delivery]):
    """Batches of one rank.

    Args:
        make_plan: ``make_plan(position)`` gives the plan of the run at its position (``None`` is the beginning).
        make_batches: makes the batches.
        rank: number of this process among those that train together.
    """

    def __init__(
        self, make_plan: Callable[[Mapping[str, Any] | None], StepPlan], make_batches: BatchMaker, rank: int
    ) -> None:
        super().__init__()
        self._make_plan, self._make_batches, self._rank = make_plan, make_batches, rank
        self._position: Position | None = None

    def resume(self, position: Position | None) -> None:
        """Lets the next iteration begin behind this position."""
        self._position = position

    def __iter__(self) -> Iterator[Delivery]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        plan = self._make_plan(self._position)
        number = 0
        while (step := plan.next_step()) is not None:
            # The loader asks worker 0 for the first batch, worker 1 for the second, ...
            if number % workers == mine:
                batch, counts = self._make_batches.batch(step[self._rank])
                yield batch, counts.state(), plan.state()
            number += 1


def _as_it_is(delivery: Any) -> Any:
    return delivery


def _outlive_sigterm(worker: int) -> None:
    """Schedulers send SIGTERM to every process of a job: a worker continues, for its trainer still ends the step.

    Only what its own process sends ends it, as it does with workers that are left when it exits. Where the system does
    not report who sent a signal (macOS), any ends it.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_wait_for_own, args=(os.getppid(),), daemon=True).start()


def _wait_for_own(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid not in (parent, os.getpid()):
        pass
    os._exit(128 + signal.SIGTERM)


class PackedLoader(DataLoader[Delivery]):
    """Yields :class:`~neo_components.types.Batch` and keeps ``progress`` up to date.

    Args:
        dataset: of this rank.
        workers: worker processes; 0 reads in the process itself.
        progress: where the run is; each iteration begins behind the batches taken.
        keep: if True, a batch counts as taken when it leaves the loader; otherwise when ``progress.take`` is called.
        max_skipped: largest fraction of samples that may be skipped, see :meth:`SkipCounts.check`.
    """

    def __init__(
        self, dataset: PackedDataset, workers: int, progress: Progress, keep: bool, max_skipped: float = 1.0
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
        self._dataset, self._progress, self._keep, self._max_skipped = dataset, progress, keep, max_skipped

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        progress = self._progress
        progress.handed.clear()
        self._dataset.resume(progress.position)
        total = progress.counts
        for batch, counts, position in super().__iter__():
            total = total + SkipCounts.from_state(counts)
            total.check(self._max_skipped)
            progress.handed.append((position, total))
            if self._keep:
                progress.take()
            yield batch
        total.check(self._max_skipped, complete=True)

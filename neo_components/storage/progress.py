"""Shows how far long work has come: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10.0
"""Without a terminal, at most one line in this many seconds."""


class Progress:
    """Counts the steps of one piece of work; made by :func:`progress`, which chooses how they are shown."""

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self.done = 0
        self.note = ""
        self.started = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Counts ``steps`` more as done; ``note`` (a loss, a score) replaces the one shown."""
        self.done += steps
        self.note = note or self.note
        self.show()

    def show(self) -> None:
        """Shows the present state; the silent base class shows nothing."""

    def close(self) -> None:
        """Shows the last state and frees the terminal."""


class _Lines(Progress):
    """One line to stderr at most every :data:`SECONDS_BETWEEN_LINES`, and one at the end."""

    def __init__(self, title: str, total: int) -> None:
        super().__init__(title, total)
        self.shown_at = self.started

    def show(self) -> None:
        if time.monotonic() - self.shown_at >= SECONDS_BETWEEN_LINES and self.done < self.total:
            self._print()

    def close(self) -> None:
        self._print()

    def _print(self) -> None:
        self.shown_at = time.monotonic()
        share = 100 * self.done / self.total if self.total else 100.0
        note = f", {self.note}" if self.note else ""
        seconds = self.shown_at - self.started
        print(
            f"{self.title}: {self.done}/{self.total} ({share:.0f} %), {seconds:.0f} s{note}",
            file=sys.stderr,
            flush=True,
        )


class _Bar(Progress):
    """A bar of rich, with the time gone and the time left."""

    def __init__(self, title: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        super().__init__(title, total)
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task(title, total=total, note="")
        self.bar.start()

    def show(self) -> None:
        self.bar.update(self.task, completed=self.done, note=self.note)

    def close(self) -> None:
        self.bar.stop()


@contextmanager
def progress(title: str | None, total: int) -> Iterator[Progress]:
    """Shows the progress of the ``with`` block on stderr.

    Args:
        title: what is being done, or ``None`` to show nothing.
        total: number of steps.

    Example:
        >>> with progress("training", total=300) as bar:
        ...     for step in range(300):
        ...         bar.advance(note=f"loss {1 / (step + 1):.2f}")
    """
    kind = Progress if title is None else _Bar if sys.stderr.isatty() else _Lines
    bar = kind(title or "", total)
    try:
        yield bar
    finally:
        bar.close()

"""What happens to a sample that cannot be used: it is named in the log and counted, and too many stop the run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

JUDGED_AFTER = 100
"""Samples that are read before the fraction of skipped ones may stop a run."""


REASONS = {
    *("template",),
    *("unreadable", "truncated", "empty", "too_large", "aspect_ratio", "missing_image"),
    *("image_tags", "no_answer", "too_long", "role", "reserved", "turns", "json", "images", "changed"),
    *("caption", "video"),
}
"""The words by which skipped samples are counted; ``docs/data.md`` explains them."""


class SampleError(ValueError):
    """A sample that cannot be used.

    Args:
        message: what is wrong and what to do.
        reason: one of :data:`REASONS`.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        assert reason in REASONS, reason
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.reason)


class TooManySkippedError(ValueError):
    """More samples had to be skipped than the run allows."""


@dataclass
class SkipCounts:
    """How many samples were read, and how many skipped for which reason.

    Args:
        read: samples read, the skipped ones included.
        skipped: number of skipped samples by reason.
    """

    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        """Samples that could be used."""
        return self.read - self.skipped.total()

    def skip(self, name: str, error: SampleError) -> None:
        """Counts a skipped sample and names it in the log."""
        self.skipped[error.reason] += 1
        logger.warning("skipped sample %s (%s): %s", name, error.reason, error)

    def check(self, max_skipped: float, complete: bool = False) -> None:
        """Stops the run if too large a fraction was skipped.

        Args:
            max_skipped: fraction of the samples read that may be skipped. One single bad sample never stops a run,
                unless this is 0.
            complete: True at the end of an epoch; otherwise nothing is judged before 100 samples were read.

        Raises:
            TooManySkippedError: (a ``ValueError``) if more were skipped.
        """
        total = self.skipped.total()
        if not total or not (complete or self.read >= JUDGED_AFTER or max_skipped == 0):
            return
        if total > max(max_skipped * self.read, 1 if max_skipped > 0 else 0):
            raise TooManySkippedError(
                f"{total} of {self.read} samples had to be skipped ({self.summary()}), over the fraction of "
                f"{max_skipped:g} that max_skipped allows; the log names each. Fix them or raise max_skipped"
            )

    def summary(self) -> str:
        """The reasons in one line, the most frequent first."""
        return ", ".join(f"{reason}: {count}" for reason, count in self.skipped.most_common())

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"read": self.read, "skipped": dict(self.skipped)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SkipCounts:
        """The counts that :meth:`state` described."""
        return cls(state["read"], Counter(state["skipped"]))

    def __add__(self, other: SkipCounts) -> SkipCounts:
        return SkipCounts(self.read + other.read, self.skipped + other.skipped)

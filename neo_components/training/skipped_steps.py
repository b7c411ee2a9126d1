"""Steps whose gradient is not finite: they change nothing, and are counted without asking the device in every step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

NAMED = 8
"""Samples of a skipped step that a message names."""


class Step(NamedTuple):
    """A step that has not been looked at yet.

    Attributes:
        number: counted from 0.
        values: [3] float64 on the device: loss, gradient norm, and whether the step is skipped.
        keys: names of its samples.
    """

    number: int
    values: Tensor
    keys: Sequence[str]


class SkippedSteps:
    """Counts skipped steps.

    Args:
        most: this many consecutive ones are an error.

    Attributes:
        total: how many were skipped, as far as they have been read.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.total = 0
        self._in_a_row = 0
        self._unread: list[Step] = []

    def add(self, number: int, loss: Tensor, norm: Tensor, keys: Sequence[str]) -> Tensor:
        """Adds a step; returns a scalar, 1 if it must be skipped and 0 otherwise, on the device of ``loss``."""
        skips = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self._unread.append(Step(number, torch.stack([loss, norm, skips]).double(), list(keys)))
        return skips.float()

    def read(self) -> None:
        """Counts the steps since the last call, for which the CPU waits, and logs a warning for each skipped one.

        Raises:
            ValueError: after too many consecutive skipped steps.
        """
        if not self._unread:
            return
        steps, self._unread = self._unread, []
        for step, (loss, norm, skips) in zip(steps, torch.stack([s.values for s in steps]).tolist(), strict=True):
            if not skips:
                self._in_a_row = 0
                continue
            self.total += 1
            self._in_a_row += 1
            more = f" and {len(step.keys) - NAMED} more" if len(step.keys) > NAMED else ""
            names = ", ".join(step.keys[:NAMED]) + more
            seen = f"loss {loss}, gradient norm {norm} at step {step.number}"
            log.warning("step skipped: %s; its samples: %s", seen, names)
            if self._in_a_row >= self.most:
                raise ValueError(
                    f"{self._in_a_row} steps in a row were not finite (stage.max_skipped_steps), the last with {seen}; "
                    f"lower stage.lr or check its samples: {names}; these steps changed no weight"
                )

    def state_dict(self) -> dict[str, Any]:
        """The counts, for a checkpoint."""
        self.read()
        return {"skipped_steps": self.total, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the counts."""
        self.total, self._in_a_row = state.get("skipped_steps", 0), state.get("in_a_row", 0)

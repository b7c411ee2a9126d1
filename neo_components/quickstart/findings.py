"""Results of the quickstart's steps, for the report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import typer

from neo_components.evaluation import Question, Report
from neo_components.training.run import RunResult


@dataclass
class Findings:
    """The contents of the report.

    Args:
        seed: random seed.
        scale: fraction of the training steps and test questions.
        device: of all steps.
        precision: Lightning's, of the training.
        minutes: duration of each step.
        stages: the runs of the three stages, in order.
        reports: evaluations on the test split: ``neo``, ``blind``, ``shuffled``, ``reused`` and ``random``.
        baselines: scores of answers that ignore the image, from :func:`baselines`.
        questions: the test questions.
    """

    seed: int
    scale: float
    device: torch.device
    precision: str
    minutes: dict[str, float] = field(default_factory=dict)
    stages: dict[str, RunResult] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[None]:
        """Announces and times one step."""
        typer.secho(f"[{len(self.minutes) + 1}/6] {what}", bold=True)
        began = time.monotonic()
        yield
        self.minutes[name] = (time.monotonic() - began) / 60

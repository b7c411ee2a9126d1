"""Loggers of a run: TensorBoard and a CSV file, both in ``logs/``."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping
from pathlib import Path

import lightning
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

LOGS = "logs"
CSV = "metrics.csv"


def run_loggers(output: Path, done: int) -> list[Logger]:
    """Both loggers of a run.

    Args:
        output: the run's folder.
        done: steps of the checkpoint that the run resumes from; entries up to there are kept, later ones replaced.
    """
    board = TensorBoardLogger(str(output), name=LOGS, version="", purge_step=done or None)
    table = CSVLogger(str(output), name=LOGS, version="", flush_logs_every_n_steps=1)
    _begin(table, output / LOGS / CSV, done)
    return [board, table]


def log_once(trainer: lightning.Trainer, values: Mapping[str, float], step: int) -> None:
    """Logs values for one step only; ``LightningModule.log`` would repeat them with every later entry.

    Args:
        trainer: of the run.
        values: by name.
        step: counted from 0, like Lightning's entries.
    """
    if values:
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=step)


@rank_zero_only
def _begin(table: CSVLogger, path: Path, done: int) -> None:
    """Restores the entries before step ``done``; Lightning's logger removes the file of the earlier run."""
    kept = []
    if done and path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        kept = [{name: value for name, value in row.items() if value} for row in rows if int(row["step"]) < done]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Experiment logs directory")
        writer = table.experiment
    writer.metrics.extend(kept)

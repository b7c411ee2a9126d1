"""Where a run writes its curves: TensorBoard and a CSV file, both in ``logs/``."""

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
        done: steps that a resumed run has behind it: its entries up to there stay, later ones are written anew.
    """
    board = TensorBoardLogger(str(output), name=LOGS, version="", purge_step=done or None)
    table = CSVLogger(str(output), name=LOGS, version="", flush_logs_every_n_steps=1)
    _begin(table, output / LOGS / CSV, done)
    return [board, table]


def log_once(trainer: lightning.Trainer, values: Mapping[str, float], step: int) -> None:
    """Writes values that are new now. What goes through ``LightningModule.log`` is written again with every later
    entry, as if it were measured again.

    Args:
        trainer: of the run.
        values: by name.
        step: counted from 0, as Lightning counts entries.
    """
    if values:
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=step)


@rank_zero_only
def _begin(table: CSVLogger, path: Path, done: int) -> None:
    """Lightning's logger removes the file of a run before; what is still true of it is written again."""
    kept = []
    if done and path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        kept = [{name: value for name, value in row.items() if value} for row in rows if int(row["step"]) < done]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Experiment logs directory")
        writer = table.experiment
    writer.metrics.extend(kept)

"""Checkpoints that survive faults: written whole or not at all, checked before they are read, saved on SIGTERM."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

log = logging.getLogger(__name__)

LAST = "last.ckpt"


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it when all of it is on the disk.

    Whatever ends the process in between, and if the disk is full, the file that was there before is still there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes one file; arguments as in Lightning's ``CheckpointIO``.

        Raises:
            OSError: if it cannot be written; nothing is left of it then.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)  # another file system has rules of its own
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        try:
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except (OSError, RuntimeError) as error:  # torch's writer turns an error of the disk into a RuntimeError
            unfinished.unlink(missing_ok=True)
            raise OSError(
                f"the checkpoint {path} could not be written ({error}); the ones before are untouched: make room, then "
                "go on with --resume last"
            ) from error


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """A checkpoint of a training run, its tensors mapped from the file.

    Raises:
        ValueError: if the file is damaged or something else.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        int(saved["global_step"]), saved["state_dict"].items()
    except Exception as error:  # anything from KeyError to UnpicklingError is raised on what torch did not write
        raise ValueError(f"{path} is no checkpoint of a training run; it is damaged or something else") from error
    return saved


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run that can be read; damaged ones are named in the log and passed over.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if all are damaged.
    """
    files = sorted(folder.glob("*.ckpt"), key=lambda file: (file.stat().st_mtime_ns, file.name == LAST), reverse=True)
    if not files:
        raise FileNotFoundError(f"no checkpoint {folder / LAST} to resume from; start without --resume")
    for file in files:
        try:
            read_checkpoint(file)
        except ValueError as error:
            log.warning("%s; looking for an older one", error)
        else:
            return file
    raise ValueError(f"all {len(files)} checkpoints in {folder} are damaged; start without --resume")


class SaveOnSigterm(Callback):
    """Saves ``last.ckpt`` when SIGTERM has come, as schedulers send it before they take a machine away.

    Lightning ends the run after the batch with exit code 143. In the middle of an accumulated step, and with several
    processes, nothing is saved: the run goes on from the last regular checkpoint.

    Args:
        folder: of the run's checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks whether the signal has come."""
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if trainer.received_sigterm and whole_step and trainer.world_size == 1:
            trainer.save_checkpoint(self.folder / LAST)
            log.warning(
                "SIGTERM: saved %s at step %d; go on with --resume last", self.folder / LAST, trainer.global_step
            )

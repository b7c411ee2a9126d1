"""Checkpoints that survive faults: written whole or not at all, checked before they are read, saved on SIGTERM."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

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
    """Saves ``last.ckpt`` and ends the run when SIGTERM has come; schedulers send it before they take a machine away.

    After each step all processes tell each other whether one of them got the signal, so all save and end together,
    whichever it was sent to. In the middle of an accumulated step, or of a validation, the run first goes on to the end
    of a step. Lightning's own handler talks to the other processes wherever the signal comes, also in the middle of a
    reduction of gradients, where they can wait for each other for ever: this one takes its place during training.

    Args:
        folder: of the run's checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._came = False
        self._before: Any = None

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Notes from now on that the signal came; a signal can be taken in the main thread alone."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._came = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves and ends if the signal has come to any process.

        Raises:
            SIGTERMException: on all processes, when all is saved.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        came = torch.tensor(float(self._came), device=trainer.strategy.root_device)
        if not float(trainer.strategy.reduce(came, reduce_op="sum")):
            return
        trainer.save_checkpoint(self.folder / LAST)
        if trainer.is_global_zero:
            log.warning(
                "SIGTERM: saved %s at step %d; go on with --resume last", self.folder / LAST, trainer.global_step
            )
        raise SIGTERMException

    def teardown(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        """Gives the signal back."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None


class RandomStates(Callback):
    """Keeps the state of every process's random numbers in the checkpoints: Python's, numpy's and torch's.

    Lightning keeps none. A run that goes on with another number of processes keeps those that its seed gave it.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Of all processes, in plain values; every process has to ask for it."""
        states = [random_states()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = states * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, random_states())
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """They are set when the first batch begins, as making a loader draws from them."""
        self._restored = state_dict["processes"]

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Goes on where the checkpoint was saved."""
        if len(self._restored) == trainer.world_size:
            set_random_states(self._restored[trainer.global_rank])
        self._restored = []


def random_states() -> dict[str, Any]:
    """Where the generators of Python, numpy, torch, and this process's GPU are, in plain values."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, following = random.getstate()
    return {
        "python": [version, list(numbers), following],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(place), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Sets what :func:`random_states` told."""
    version, numbers, following = states["python"]
    random.setstate((version, tuple(numbers), following))
    kind, keys, place, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, gauss))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())

"""Checkpoints that survive faults: written whole or not at all, checked before they are read."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from neo_components.training.fsdp2.checkpoints import is_sharded, read_meta

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


def read_checkpoint(path: Path, thorough: bool = True) -> Mapping[str, Any]:
    """A checkpoint of a training run, its tensors mapped from the file; of a sharded one they have shapes only.

    Args:
        path: the file, or the folder of a run whose weights are divided.
        thorough: compare the checksums of a folder's files; a single file is always checked.

    Raises:
        ValueError: if it is damaged or something else.
    """
    if is_sharded(path):
        return read_meta(path, thorough)
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


def newest_checkpoint(folder: Path, thorough: bool = True) -> Path:
    """The newest checkpoint of a run that can be read; damaged ones are named in the log and passed over.

    Args:
        folder: of the run's checkpoints.
        thorough: as in :func:`read_checkpoint`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if all are damaged.
    """
    files = sorted(folder.glob("*.ckpt"), key=lambda file: (file.stat().st_mtime_ns, file.name == LAST), reverse=True)
    if not files:
        raise FileNotFoundError(f"no checkpoint {folder / LAST} to resume from; start without --resume")
    for file in files:
        try:
            read_checkpoint(file, thorough)
        except ValueError as error:
            log.warning("%s; looking for an older one", error)
        else:
            return file
    raise ValueError(f"all {len(files)} checkpoints in {folder} are damaged; start without --resume")

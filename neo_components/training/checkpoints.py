"""Checkpoints that survive faults: written atomically, checked before they are read."""

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


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file and renames it once it is on the disk.

    If the process is killed or the disk is full, the previous file is still there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes one file; arguments as in Lightning's ``CheckpointIO``.

        Raises:
            OSError: if it cannot be written; the temporary file is removed then.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)  # a remote file system has no rename to rely on
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
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError if the disk fails
            unfinished.unlink(missing_ok=True)
            raise OSError(
                f"the checkpoint {path} could not be written ({error}); earlier checkpoints are unchanged: free space, "
                "then resume with --resume last"
            ) from error


def read_checkpoint(path: Path, thorough: bool = True) -> Mapping[str, Any]:
    """A checkpoint of a training run, with memory-mapped tensors; those of a sharded one are on the meta device.

    Args:
        path: the file, or the folder of a sharded checkpoint.
        thorough: compare the checksums of a folder's files; the checksums of a single file are always compared.

    Raises:
        ValueError: if it is damaged or no checkpoint.
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
    except Exception as error:  # a foreign file may raise anything from KeyError to UnpicklingError
        raise ValueError(f"{path} is no checkpoint of a training run, or it is damaged") from error
    return saved


def newest_checkpoint(folder: Path, thorough: bool = True) -> Path:
    """The newest readable checkpoint of a run; damaged ones are logged and skipped.

    Args:
        folder: of the run's checkpoints.
        thorough: as in :func:`read_checkpoint`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if all checkpoints are damaged.
    """
    files = sorted(folder.glob("*.ckpt"), key=lambda file: (file.stat().st_mtime_ns, file.name == LAST), reverse=True)
    if not files:
        raise FileNotFoundError(f"no checkpoint {folder / LAST} to resume from; start without --resume")
    for file in files:
        try:
            read_checkpoint(file, thorough)
        except ValueError as error:
            log.warning("%s; trying an older one", error)
        else:
            return file
    raise ValueError(f"all {len(files)} checkpoints in {folder} are damaged; start without --resume")

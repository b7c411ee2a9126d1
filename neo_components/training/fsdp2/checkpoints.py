"""Checkpoints of runs whose weights are divided: one folder, into which every process writes its own rows.

The rows are written and read by ``torch.distributed.checkpoint``, so a run can go on with another number of processes.
``meta.pt`` holds what all processes have in common (loops, schedules, the place in the data) and the checksum of every
other file. The folder appears under its name when all of it is on the disk.

Nothing in it can run code when it is read: ``meta.pt`` is read with ``weights_only``, tensors are the only values among
the rows, and the list of contents, a pickle by torch's design, is read first by an unpickler that knows nothing but the
few classes that such a list consists of.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

META = "meta.pt"
CONTENTS = ".metadata"
MODEL, OPTIMIZER, AVERAGE = "model.", "optimizer.", "average."
"""What the names of tensors begin with. An optimizer's are ``optimizer.KEY.NAME OF THE PARAMETER``."""

CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),  # where it was written
    ("pathlib._local", "PosixPath"),
    *(("torch", name) for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool")),
}  # fmt: skip
"""All that a list of contents may name."""


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is a folder of this kind."""
    return path.is_dir()


def write_sharded(checkpoint: dict[str, Any], path: Path, strategy: Any) -> None:
    """Writes one checkpoint; every process calls it.

    Args:
        checkpoint: as Lightning made it; the tensors are taken out of it.
        path: the folder.
        strategy: knows the processes.

    Raises:
        OSError: if it cannot be written; the folder that was there before stays.
    """
    tensors = {MODEL + name: tensor for name, tensor in checkpoint.pop("state_dict").items()}
    tensors |= {AVERAGE + name: tensor for name, tensor in checkpoint.pop("average", {}).items()}
    groups = []
    for state in checkpoint.pop("optimizer_states", []):
        groups.append(state["param_groups"])
        for name, values in state["state"].items():
            tensors |= {f"{OPTIMIZER}{key}.{name}": value for key, value in values.items()}
    rest = checkpoint | {"optimizer_groups": groups}
    unfinished = path.with_name(f".{path.name}.unfinished")
    if strategy.is_global_zero:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    strategy.barrier()
    try:
        dcp.save(tensors, checkpoint_id=unfinished)
        sums = _all_checksums(unfinished, strategy)
        if strategy.is_global_zero:
            _write_meta(unfinished / META, rest | {"checksums": sums})
            _take_place(unfinished, path)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        if strategy.is_global_zero:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(
            f"the checkpoint {path} could not be written ({error}); the ones before are untouched: make room, then go "
            "on with --resume last"
        ) from error
    strategy.barrier()


def _all_checksums(folder: Path, strategy: Any) -> dict[str, list[int]]:
    """Size and checksum of every file; each process reads those that it wrote itself."""
    mine = {file.name: checksum(file) for file in folder.glob(f"__{strategy.global_rank}_*")}
    gathered: list[dict[str, list[int]]] = [{}] * strategy.world_size
    dist.all_gather_object(gathered, mine)
    found = {name: entry for part in gathered for name, entry in part.items()}
    return found | ({CONTENTS: checksum(folder / CONTENTS)} if strategy.is_global_zero else {})


def checksum(file: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    crc = size = 0
    with file.open("rb") as stream:
        while block := stream.read(2**24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def _write_meta(path: Path, values: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(values, file)
        file.flush()
        os.fsync(file.fileno())


def _take_place(unfinished: Path, path: Path) -> None:
    """Renames a folder; one that had the name before is moved aside first, and then removed."""
    before = path.with_name(f".{path.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if path.is_dir():
        os.replace(path, before)
    path.unlink(missing_ok=True)
    os.replace(unfinished, path)
    shutil.rmtree(before, ignore_errors=True)


def read_meta(path: Path, thorough: bool = True) -> dict[str, Any]:
    """What a checkpoint holds beside the rows; under ``state_dict`` the model's tensors, on the meta device.

    Args:
        path: the folder.
        thorough: compare the checksum of every file; otherwise its size.

    Raises:
        ValueError: if the folder is damaged or something else.
    """
    try:
        saved: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=True)
        for name, (size, crc) in saved["checksums"].items():
            file = path / name
            seen = checksum(file) if thorough else [file.stat().st_size, crc]
            if seen != [size, crc]:
                raise ValueError(f"the checksum of {name} is wrong")
        contents = read_contents(path)
    except Exception as error:  # whatever torch raises on what it did not write
        raise ValueError(f"{path} is no checkpoint of a training run; it is damaged or something else") from error
    sizes = {name: entry.size for name, entry in contents.items() if name.startswith(MODEL)}
    state = {name.removeprefix(MODEL): torch.empty(size, device="meta") for name, size in sizes.items()}
    return saved | {"state_dict": state}


def read_contents(path: Path) -> dict[str, TensorStorageMetadata]:
    """The list of a checkpoint's tensors, by name.

    Raises:
        ValueError: if it names anything but tensors.
    """
    with (path / CONTENTS).open("rb") as file:
        contents = _Contents(file).load()
    if not isinstance(contents, Metadata) or not all(
        isinstance(entry, TensorStorageMetadata) for entry in contents.state_dict_metadata.values()
    ):
        raise ValueError(f"{path / CONTENTS} lists something else than tensors")
    return dict(contents.state_dict_metadata)  # type: ignore[arg-type]


class _Contents(pickle.Unpickler):
    """Reads a list of contents and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name, if such a list may hold it."""
        if (module, name) not in CLASSES:
            raise ValueError(f"a checkpoint's list of contents must not name {module}.{name}")
        return super().find_class(module, name)


def read_sharded(
    path: Path, module: nn.Module, names: Mapping[int, str], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Reads this process's rows into a divided model and its optimizer.

    Args:
        path: the folder.
        module: the LightningModule.
        names: name of each parameter, by its ``id``.
        optimizers: those of the run.

    Returns:
        What the checkpoint holds beside the rows, which Lightning restores, and its ``folder``.
    """
    contents = read_contents(path)
    rest = torch.load(path / META, map_location="cpu", weights_only=True)
    state: dict[str, Tensor] = {MODEL + name: tensor for name, tensor in module.state_dict().items()}
    dcp.load(state, checkpoint_id=path)  # in place
    for optimizer, groups in zip(optimizers, rest.pop("optimizer_groups"), strict=True):
        _read_optimizer(path, contents, names, optimizer, groups)
    return rest | {"state_dict": {}, "optimizer_states": [], "folder": str(path)}


def read_average(path: Path, average: Mapping[str, Tensor]) -> bool:
    """Reads this process's rows of averaged weights, in place; tells whether the checkpoint has any."""
    if not any(name.startswith(AVERAGE) for name in read_contents(path)):
        return False
    dcp.load({AVERAGE + name: tensor for name, tensor in average.items()}, checkpoint_id=path)
    return True


def _read_optimizer(
    path: Path,
    contents: Mapping[str, TensorStorageMetadata],
    names: Mapping[int, str],
    optimizer: torch.optim.Optimizer,
    groups: list[dict[str, Any]],
) -> None:
    keys = sorted({name.removeprefix(OPTIMIZER).split(".")[0] for name in contents if name.startswith(OPTIMIZER)})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stored: dict[str, Tensor] = {}
    for parameter in parameters:
        for key in keys:
            if (entry := contents.get(name := f"{OPTIMIZER}{key}.{names[id(parameter)]}")) is not None:
                divided = entry.size == parameter.shape
                kind = entry.properties.dtype
                stored[name] = (
                    torch.zeros_like(parameter, dtype=kind) if divided else torch.zeros(entry.size, dtype=kind)
                )
    if stored:
        dcp.load(stored, checkpoint_id=path)
    state = {}
    for number, parameter in enumerate(parameters):
        own = {key: stored.get(f"{OPTIMIZER}{key}.{names[id(parameter)]}") for key in keys}
        if found := {key: value for key, value in own.items() if value is not None}:
            state[number] = found
    optimizer.load_state_dict({"state": state, "param_groups": groups})

"""Sharded checkpoints: a folder to which every process writes its shards.

``torch.distributed.checkpoint`` writes and reads the shards, so a run can resume on another number of processes.
``meta.pt`` has the common state (loops, schedules, position in the data) and the checksums of all other files. The
folder gets its name once it is complete on the disk.

Reading runs no code from the folder: ``meta.pt`` is read with ``weights_only``, shards contain tensors only, and the
list of contents, which torch stores as a pickle, is read by an unpickler that allows only the classes of such a list.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy

META = "meta.pt"
CONTENTS = ".metadata"
MODEL, OPTIMIZER, AVERAGE = "model.", "optimizer.", "average."
"""Prefixes of tensor names. An optimizer's tensors are called ``optimizer.KEY.PARAMETER_NAME``."""

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
"""The classes that a list of contents may use."""


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is a sharded one, a folder."""
    return path.is_dir()


def write_sharded(checkpoint: dict[str, Any], path: Path, strategy: ParallelStrategy) -> None:
    """Writes one checkpoint. Every process must call it.

    Args:
        checkpoint: from Lightning; its tensors are removed.
        path: the folder.
        strategy: of the run.

    Raises:
        OSError: if it cannot be written; the previous folder is unchanged.
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
            _replace_folder(unfinished, path)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        if strategy.is_global_zero:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(
            f"the checkpoint {path} could not be written ({error}); earlier checkpoints are unchanged: free space, "
            "then resume with --resume last"
        ) from error
    strategy.barrier()


def _all_checksums(folder: Path, strategy: ParallelStrategy) -> dict[str, list[int]]:
    """Size and checksum of every file; each process reads the files that it wrote."""
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


def _replace_folder(unfinished: Path, path: Path) -> None:
    """Renames a folder; an existing folder of that name is moved aside first and then removed."""
    before = path.with_name(f".{path.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if path.is_dir():
        os.replace(path, before)
    path.unlink(missing_ok=True)
    os.replace(unfinished, path)
    shutil.rmtree(before, ignore_errors=True)


def read_meta(path: Path, thorough: bool = True) -> dict[str, Any]:
    """The common state of a checkpoint, with the model's tensors on the meta device under ``state_dict``.

    Args:
        path: the folder.
        thorough: compare the checksum of every file, not only its size.

    Raises:
        ValueError: if the folder is damaged or no checkpoint.
    """
    try:
        saved: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=True)
        for name, (size, crc) in saved["checksums"].items():
            file = path / name
            seen = checksum(file) if thorough else [file.stat().st_size, crc]
            if seen != [size, crc]:
                raise ValueError(f"the checksum of {name} is wrong")
        contents = read_contents(path)
    except Exception as error:  # a foreign file may raise anything
        raise ValueError(f"{path} is no checkpoint of a training run, or it is damaged") from error
    sizes = {name: entry.size for name, entry in contents.items() if name.startswith(MODEL)}
    state = {name.removeprefix(MODEL): torch.empty(size, device="meta") for name, size in sizes.items()}
    return saved | {"state_dict": state}


def read_contents(path: Path) -> dict[str, TensorStorageMetadata]:
    """The tensors of a checkpoint, by name.

    Raises:
        ValueError: if there is anything but tensors.
    """
    with (path / CONTENTS).open("rb") as file:
        contents = _Contents(file).load()
    if not isinstance(contents, Metadata) or not all(
        isinstance(entry, TensorStorageMetadata) for entry in contents.state_dict_metadata.values()
    ):
        raise ValueError(f"{path / CONTENTS} lists values that are no tensors")
    return dict(contents.state_dict_metadata)  # type: ignore[arg-type]


class _Contents(pickle.Unpickler):
    """An unpickler that allows only :data:`CLASSES`."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name, if it is allowed."""
        if (module, name) not in CLASSES:
            raise ValueError(f"a checkpoint's list of contents must not name {module}.{name}")
        return super().find_class(module, name)


def read_sharded(
    path: Path, module: nn.Module, names: Mapping[int, str], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Reads this process's shards into a sharded model and its optimizers.

    Args:
        path: the folder.
        module: the LightningModule.
        names: name of each parameter, by its ``id``.
        optimizers: of the run.

    Returns:
        The common state, which Lightning restores, and the checkpoint's ``folder``.
    """
    contents = read_contents(path)
    rest = torch.load(path / META, map_location="cpu", weights_only=True)
    state: dict[str, Tensor] = {MODEL + name: tensor for name, tensor in module.state_dict().items()}
    dcp.load(state, checkpoint_id=path)  # in place
    for optimizer, groups in zip(optimizers, rest.pop("optimizer_groups"), strict=True):
        _read_optimizer(path, contents, names, optimizer, groups)
    return rest | {"state_dict": {}, "optimizer_states": [], "folder": str(path)}


def read_average(path: Path, average: Mapping[str, Tensor]) -> bool:
    """Reads this process's shards of averaged weights in place; returns whether the checkpoint has them."""
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
                sharded = entry.size == parameter.shape
                kind = entry.properties.dtype
                stored[name] = (
                    torch.zeros_like(parameter, dtype=kind) if sharded else torch.zeros(entry.size, dtype=kind)
                )
    if stored:
        dcp.load(stored, checkpoint_id=path)
    state = {}
    for number, parameter in enumerate(parameters):
        own = {key: stored.get(f"{OPTIMIZER}{key}.{names[id(parameter)]}") for key in keys}
        if found := {key: value for key, value in own.items() if value is not None}:
            state[number] = found
    optimizer.load_state_dict({"state": state, "param_groups": groups})

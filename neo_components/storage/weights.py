"""Weights on disk: safetensors and config.json, read strictly. No pickle is ever opened.

``llms`` and ``model/layouts.py`` map names of models to names in files.

A model to be loaded is built on the meta device (``deferred.unfilled``), where nothing takes room, gets its weights
tensor by tensor (:func:`load_strict`), and the rest is allocated (:func:`materialize`). So it is never in memory twice:
beside the model there are only the pages of one file that were read last, at most ``BLOCK`` bytes of a large tensor.
Where weights are deferred (``deferred.Deferred``) they stay on the meta device, and their files are read later.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from neo_components.storage.deferred import deferred, later
from neo_components.storage.shards import local_of, rows_of, set_rows

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
BLOCK = 2**26
"""Bytes of a large tensor that are read from its file at a time."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that a model can be loaded in, by the names that recipes use."""
KINDS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types of safetensors that weights are kept in."""

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        FileNotFoundError: if the folder has none, so is no checkpoint.
        ValueError: if the file is no JSON object.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no {CONFIG}")
    return read_json(folder / CONFIG)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: if the file is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


class TensorFiles:
    """The tensors of a folder's safetensors, one file or several with an index; read one by one.

    Args:
        folder: where they lie.
        stem: name of the single file without ``.safetensors``.

    Raises:
        FileNotFoundError: if there are no safetensors, or a shard that the index names is missing.
        ValueError: if a file is damaged.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder = folder
        index = folder / f"{stem}.safetensors.index.json"
        if (folder / f"{stem}.safetensors").is_file():
            files = [folder / f"{stem}.safetensors"]
        elif index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index} has no weight_map, which says in which file each tensor lies")
            names = set(weight_map.values())
            if strange := [name for name in names if not isinstance(name, str) or not name or Path(name).name != name]:
                raise ValueError(f"{index} names {strange[0]!r}, which is no file of its own folder")
            files = [folder / name for name in sorted(names)]
        else:
            self._refuse(stem)
        self.files: dict[str, Path] = {}
        for path in files:
            if not path.is_file():
                raise FileNotFoundError(f"{index.name} names {path.name}, which is missing in {folder}")
            with _open(path) as tensors:
                self.files.update(dict.fromkeys(tensors.keys(), path))

    def _refuse(self, stem: str) -> None:
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLES)
        advice = (
            f"; it has {', '.join(pickles)}, but pickles can run code and are not opened: convert them to safetensors"
            if pickles
            else ""
        )
        raise FileNotFoundError(f"{self.folder} has no {stem}.safetensors{advice}")

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor of that name; its values are not read."""
        with _open(self.files[name]) as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def dtype(self) -> str:
        """The type that most of the tensors have, of those that weights are kept in; their values are not read."""
        found: Counter[str] = Counter()
        for path in sorted(set(self.files.values())):
            with _open(path) as tensors:
                found.update(KINDS.get(tensors.get_slice(name).get_dtype(), "") for name in tensors.keys())  # noqa: SIM118
        del found[""]
        return max(found, key=found.__getitem__, default="float32")

    def get(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU. It is a view of the file, whose pages count as memory while it lives."""
        with _open(self.files[name]) as tensors:
            return tensors.get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor of that name; no others are read."""
        with _open(self.files[name]) as tensors:
            return tensors.get_slice(name)[start:stop]

    def read_into(self, name: str, target: Tensor) -> None:
        """Copies the tensor of that name into one of the same shape, in blocks of rows if it is large.

        The file is opened again for each block, as its pages leave memory only when it is closed.
        """
        rows = max(BLOCK * len(target) // max(target.nbytes, 1), 1) if target.dim() else 0
        if not rows or rows >= len(target):
            target.copy_(self.get(name))
            return
        for start in range(0, len(target), rows):
            target[start : start + rows].copy_(self.rows(name, start, start + rows))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no readable safetensors file ({error}); it is damaged, cut short, or a pickle by another name"
        ) from error


class Tensors(Protocol):
    """Stored tensors, read one by one; ``TensorFiles``, or a view of them under other names."""

    folder: Path

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def get(self, name: str) -> Tensor: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor: ...

    def read_into(self, name: str, target: Tensor) -> None: ...


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The type of that name.

    Raises:
        ValueError: if models cannot be loaded in it.
    """
    found = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return found  # type: ignore[return-value]


def load_strict(
    module: nn.Module,
    tensors: Tensors,
    rename: Callable[[str], str] = lambda name: name,
    change: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ignore: Iterable[str] = (),
    only: Callable[[str], bool] = lambda name: True,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Copies tensors into a module; every tensor on both sides must find its partner.

    Args:
        module: receives them; its weights on the meta device become real, on the CPU, unless they are deferred.
        tensors: the files.
        rename: name in the module -> name in the files.
        change: by name in the module, maps the stored tensor to the module's form.
        ignore: names in the files that are known to be superfluous.
        only: which of the module's names are looked for.
        dtype: of the weights that become real; others keep theirs.

    Raises:
        ValueError: naming every missing, unexpected and misshapen tensor; no weight was read then.
    """
    state = {name: tensor for name, tensor in module.state_dict().items() if only(name)}
    change = change or {}
    wanted = {rename(name): name for name in state}
    have = set(tensors.names())
    faults = [f"missing: {name}" for name in sorted(set(wanted) - have)]
    faults += [f"unexpected: {name}" for name in sorted(have - set(wanted) - set(ignore))]
    for source, name in wanted.items():
        if source in have:
            stored = tensors.shape(source)
            formed = change[name](torch.empty(stored, device="meta")).shape if name in change else stored
            if formed != state[name].shape:
                faults.append(f"misshapen: {source} is {stored}, needs to fill {name} {tuple(state[name].shape)}")
    if faults:
        more = f"\n  ... and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError(f"{tensors.folder} does not fit the model:\n  " + "\n  ".join(faults[:20]) + more)
    for source, name in wanted.items():
        if state[name].is_meta:
            _real(module, name, dtype)
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        later(owner, partial(_read, owner, leaf, tensors, source, change.get(name)))


@torch.no_grad()
def _read(
    owner: nn.Module, leaf: str, tensors: Tensors, source: str, change: Callable[[Tensor], Tensor] | None
) -> None:
    """Reads a weight; of one that is sharded only the rows that this process holds."""
    target = getattr(owner, leaf)
    if change is not None:
        set_rows(target, change(tensors.get(source)))
    elif target.dim() == 0 or rows_of(target) == (0, len(target)):
        tensors.read_into(source, local_of(target))
    else:
        local_of(target).copy_(tensors.rows(source, *rows_of(target)))


def _real(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """Puts an unset tensor on the CPU in place of a weight on the meta device; on the meta device if deferred."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    device = "cpu" if deferred() is None else "meta"
    new = torch.empty(old.shape, dtype=dtype if old.is_floating_point() else old.dtype, device=device)
    setattr(owner, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    return new


def materialize(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Allocates the rest of a module on the meta device, after :func:`load_strict`.

    Weights that no file gave are unset: the caller fills them. Deferred weights stay on the meta device.
    """
    now = deferred() is None
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta and now:
                _real(part, name, dtype)
    # Lightning's modules keep note of their device and type.
    module.to(device="cpu" if now else None, dtype=dtype)


def save_folder(folder: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any], card: str = "") -> Path:
    """Writes weights, config.json and a model card; each file appears complete or not at all.

    Args:
        folder: made if absent.
        state: tensors by name.
        config: plain values.
        card: text of README.md, left out if empty.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, state)
    save_description(folder, config, card)
    return folder


def save_description(folder: Path, config: Mapping[str, Any], card: str = "") -> None:
    """Writes what lies beside the weights; arguments as in :func:`save_folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if card:
        write_text(folder / "README.md", card)


def save_tensors(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file under a temporary name and renames it; the same content gives the same bytes."""
    temporary = path.with_name(path.name + ".tmp")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    save_file(contiguous, temporary, metadata={"format": "pt"} | (metadata or {}))
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

"""Weights on disk: safetensors and config.json, read strictly. No pickle is ever opened.

The lowest layer of loading: it knows files and tensors; ``llms`` and ``checkpoint`` say which name is whose.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def resolve(source: str | Path) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded.

    Args:
        source: a folder, or a hub id ``owner/name``.

    Raises:
        FileNotFoundError: if it is neither a folder nor something the hub knows or can reach.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name = str(source)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name!r} is no folder; give a folder with config.json or a hub id 'owner/name'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf"]))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{name!r} is no folder here, and the hub did not give it ({type(error).__name__}: {error}); "
            "check the name and the connection, or download the repository and give its folder"
        ) from error


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
    except ValueError as error:
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
            files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
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

    def get(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU."""
        with _open(self.files[name]) as tensors:
            return tensors.get_tensor(name)


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

    def get(self, name: str) -> Tensor: ...


def load_strict(
    module: nn.Module,
    tensors: Tensors,
    rename: Callable[[str], str] = lambda name: name,
    change: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ignore: Iterable[str] = (),
    only: Callable[[str], bool] = lambda name: True,
) -> None:
    """Copies tensors into a module; every tensor on both sides must find its partner.

    Args:
        module: receives them.
        tensors: the files.
        rename: name in the module -> name in the files.
        change: by name in the module, turns the stored tensor into the module's form.
        ignore: names in the files that are known to be superfluous.
        only: which of the module's names are looked for.

    Raises:
        ValueError: naming every missing, unexpected and misshapen tensor.
    """
    state = {name: tensor for name, tensor in module.state_dict().items() if only(name)}
    wanted = {rename(name): name for name in state}
    have = set(tensors.names())
    faults = [f"missing: {name}" for name in sorted(set(wanted) - have)]
    faults += [f"unexpected: {name}" for name in sorted(have - set(wanted) - set(ignore))]
    with torch.no_grad():
        for source, name in wanted.items():
            if source not in have:
                continue
            tensor = tensors.get(source)
            stored = tuple(tensor.shape)
            if change and name in change:
                tensor = change[name](tensor)
            if tensor.shape != state[name].shape:
                faults.append(f"misshapen: {source} is {stored}, needs to fill {name} {tuple(state[name].shape)}")
            elif not faults:
                state[name].copy_(tensor)
    if faults:
        more = f"\n  ... and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError(f"{tensors.folder} does not fit the model:\n  " + "\n  ".join(faults[:20]) + more)


def save_folder(folder: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any], card: str = "") -> Path:
    """Writes weights, config.json and a model card; each file appears whole or not at all.

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
    write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if card:
        write_text(folder / "README.md", card)
    return folder


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

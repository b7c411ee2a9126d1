"""Pre-Buffer assets that ship with the library, found by name: ``pretrained:NAME`` (``docs/asset.md``).

They lie in ``assets/NAME`` of a clone, and in ``neo_components/assets/NAME`` of an installed package. The index beside
them lists size and SHA-256 of each file, which are compared before a file is read. An asset that is too large to ship
lies in a repository of the Hugging Face hub, and its checksums are in the same index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neo_components.errors import nearest
from neo_components.storage.hub import PREFIX, resolve
from neo_components.storage.weights import read_json, write_text

INDEX = "index.json"
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class StoredFile:
    """A file of an asset as the index states it.

    Args:
        bytes: its size.
        sha256: its SHA-256, 64 hexadecimal digits.
    """

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> StoredFile:
        """Size and checksum of a file."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Pretrained:
    """An asset that ships.

    Args:
        description: what it is for, in a sentence.
        trained_on: data and number of steps.
        license: of the weights.
        parameters: number of its weights.
        files: by name.
        hub: hub id of its repository if it is too large to ship; else empty.
    """

    description: str
    trained_on: str
    license: str
    parameters: int
    files: Mapping[str, StoredFile]
    hub: str = ""

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files.values())


def assets_folder() -> Path:
    """Folder of the assets that ship: inside an installed package, or beside the package in a clone."""
    inside = PACKAGE / "assets"
    return inside if inside.is_dir() else PACKAGE.parent / "assets"


def list_pretrained(assets: Path | None = None) -> dict[str, Pretrained]:
    """All assets that ship, by name.

    Args:
        assets: folder with ``index.json``; ``None``: :func:`assets_folder`.

    Raises:
        FileNotFoundError: if the index is missing.
        ValueError: if the index is damaged.
    """
    path = (assets or assets_folder()) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, which lists the assets that ship; {_restore(path)}")
    try:
        return {name: _entry(values) for name, values in read_json(path).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {_restore(path)}") from error


def _entry(values: Mapping[str, Any]) -> Pretrained:
    files = {name: StoredFile(**file) for name, file in values["files"].items()}
    if strange := [name for name in files if Path(name).name != name]:
        raise ValueError(f"{strange[0]!r} is no file of its own folder")
    return Pretrained(**{**values, "files": files})


def write_index(entries: Mapping[str, Pretrained], assets: Path) -> None:
    """Writes ``index.json``; arguments as :func:`list_pretrained` returns and takes them."""
    plain = {
        name: vars(entry) | {"files": {file: vars(stored) for file, stored in sorted(entry.files.items())}}
        for name, entry in sorted(entries.items())
    }
    write_text(assets / INDEX, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")


def resolve_asset(source: str | Path, weights: bool = True, assets: Path | None = None) -> Path:
    """The local folder of a pre-Buffer asset, its files compared with their checksums if it ships.

    Args:
        source: ``pretrained:NAME``, or a folder or hub id, as in :func:`neo_components.storage.hub.resolve`.
        weights: whether the weights are needed; if not, they are neither fetched nor compared.
        assets: folder with ``index.json``; ``None``: :func:`assets_folder`.

    Raises:
        FileNotFoundError: if there is no asset of that name, or a file of it is missing.
        ValueError: if a file is damaged.
    """
    name = str(source)
    if not name.startswith(PREFIX):
        return resolve(source, weights)
    assets = assets or assets_folder()
    listed = list_pretrained(assets)
    asset = listed.get(name.removeprefix(PREFIX))
    if asset is None:
        names = [f"{PREFIX}{known}" for known in listed]
        there = f"these do: {', '.join(names)}{nearest(name, names)}" if names else "none does"
        raise FileNotFoundError(
            f"no pre-Buffer asset of the name {name!r} ships with this version of neo-components; {there}"
        )
    folder = resolve(asset.hub, weights) if asset.hub else assets / name.removeprefix(PREFIX)
    for file, stored in asset.files.items():
        if weights or not file.endswith(".safetensors"):
            _check(name, folder / file, stored, bool(asset.hub))
    return folder


def _check(name: str, path: Path, stored: StoredFile, on_hub: bool) -> None:
    """Refuses a file that is not what the index states."""
    way_out = f"remove {path.parent}, and it is downloaded again" if on_hub else _restore(path.parent)
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not complete: {path} is missing; {way_out}")
    if (size := path.stat().st_size) != stored.bytes:
        raise ValueError(f"{name} is damaged: {path} has {size:,} bytes and must have {stored.bytes:,}; {way_out}")
    if (found := StoredFile.of(path).sha256) != stored.sha256:
        raise ValueError(
            f"{name} is damaged: {path} has a SHA-256 of {found[:12]}..., the index states {stored.sha256[:12]}...; "
            f"{way_out}"
        )


def _restore(path: Path) -> str:
    """How to get back what lies in the folder of assets."""
    if PACKAGE in path.parents:
        return "install it again: pip install --force-reinstall --no-deps neo-components"
    return f"restore it in the clone: git checkout -- {path}"

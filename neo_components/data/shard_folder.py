"""Random access to the samples of a folder of shards, so that a run can shuffle and resume by sample numbers alone."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np

from neo_components.data.shards import (
    FORMAT_VERSION,
    INDEX_NAME,
    RawSample,
    image_order,
    parse_sample,
    shard_files,
    split_member,
)
from neo_components.data.tally import SampleError

_OPEN_FILES = 16

_Row = tuple[str, int, Sequence[Sequence[int]]]
"""key, number of the shard, [offset, size] of the JSON and of each image"""


class ShardFolder:
    """Reads any sample of a folder by its number; no image is decoded.

    A folder without ``index.json``, for example one written by another program, is indexed in memory by reading the
    headers of its shards.

    Args:
        folder: a local folder of shards.

    Raises:
        FileNotFoundError: if there are no shards.
        ValueError: if the index is of another version or does not fit the shards, or a shard must not be read.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        self._paths = shard_files(folder)
        if (self.folder / INDEX_NAME).is_file():
            self._paths, rows = _read_index(self.folder)
            self._pack(rows)
        else:
            self._pack(row for number, path in enumerate(self._paths) for row in _scan(path, number))
        self._files: dict[int, IO[bytes]] = {}
        self._process = -1

    def _pack(self, rows: Iterable[_Row]) -> None:
        """Keeps the rows in arrays: forked workers share those, while they would copy lists of objects."""
        self._keys: list[str] = []
        shards: list[int] = []
        ends: list[int] = []
        spans: list[Sequence[int]] = []
        for key, shard, members in rows:
            self._keys.append(key)
            shards.append(shard)
            spans.extend(members)
            ends.append(len(spans))
        self._shards = np.array(shards, np.int32)
        self._ends = np.array(ends, np.int64)
        self._spans = np.array(spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, number: int) -> str:
        """Folder and key of a sample, for messages."""
        return f"{self.folder}/{self._keys[number]}"

    @property
    def shards(self) -> np.ndarray:
        """Number of the shard of each sample, ascending."""
        return self._shards

    def read(self, number: int) -> RawSample:
        """The sample of this number.

        Raises:
            SampleError: (a ``ValueError``) if it cannot be read.
        """
        first = int(self._ends[number - 1]) if number else 0
        members = self._spans[first : self._ends[number]].tolist()
        start = min(offset for offset, _ in members)
        stop = max(offset + size for offset, size in members)
        file = self._open(int(self._shards[number]))
        file.seek(start)
        block = file.read(stop - start)  # a sample's files are neighbours
        if len(block) < stop - start:
            raise SampleError(f"{file.name} ends before this sample does", "truncated")
        content, *images = (block[offset - start : offset - start + size] for offset, size in members)
        return parse_sample(self._keys[number], content, images)

    def _open(self, shard: int) -> IO[bytes]:
        if self._process != os.getpid():  # a forked worker must not share its parent's file positions
            self._files, self._process = {}, os.getpid()
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = self._paths[shard].open("rb")
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_process": -1}


def _read_index(folder: Path) -> tuple[list[Path], list[_Row]]:
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_bytes())
        version, shards = index["format_version"], index["shards"]
        rows: list[_Row] = [(row["key"], row["shard"], row["members"]) for row in index["samples"]]
        sizes = {str(shard["name"]): shard["bytes"] for shard in shards}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no index of shards ({error!r}); delete it to index the shards anew") from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, this library reads {FORMAT_VERSION}; update one of them"
        )
    found = {file.name: file.stat().st_size for file in shard_files(folder)}
    wrong = {name for name in found.keys() | sizes.keys() if found.get(name) != sizes.get(name)}
    paths = [folder / name for name in sizes]
    last = {shard: (key, members) for key, shard, members in rows}
    wrong |= {paths[shard].name for shard, row in last.items() if not wrong and not _lies_there(paths[shard], *row)}
    if wrong:
        raise ValueError(f"{path} does not fit {', '.join(sorted(wrong))}; delete it to index the shards anew")
    return paths, rows


def _lies_there(path: Path, key: str, members: Sequence[Sequence[int]]) -> bool:
    """Whether the JSON of a sample is where the index says: sizes alone may be equal, as a shard is padded."""
    with path.open("rb") as file:
        file.seek(members[0][0] - tarfile.BLOCKSIZE)
        return file.read(100).rstrip(b"\0") == f"{key}.json".encode()


def _scan(path: Path, shard: int) -> Iterator[_Row]:
    """The rows of one shard, from its headers."""
    found: dict[str, dict[str, list[int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg() and (parts := split_member(member.name)):
                    found.setdefault(parts[0], {})[parts[1]] = [member.offset_data, member.size]
    except tarfile.TarError as error:
        raise ValueError(f"{path}: the shard is damaged ({error}); write it again") from None
    for key, members in found.items():
        if "json" not in members:
            raise ValueError(f"{path} holds {key} without {key}.json")
        order = image_order(key, [suffix for suffix in members if suffix != "json"])
        yield key, shard, [members["json"], *(members[suffix] for suffix in order)]

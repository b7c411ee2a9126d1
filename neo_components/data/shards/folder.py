"""Random access to the samples of a folder of shards, so that a run can shuffle and resume by sample numbers alone."""

from __future__ import annotations

import json
import os
import tarfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np

from neo_components.data.shards.format import (
    INDEX_NAME,
    RawSample,
    check_end,
    image_order,
    member_end,
    parse_sample,
    shard_files,
    split_member,
)
from neo_components.data.shards.index import IndexEntry, ShardIndex, read_index
from neo_components.data.shards.remote import PIPE, RemoteFolder, is_address, run_pipe
from neo_components.data.skip_counts import SampleError

_OPEN_FILES = 16


class ShardGoneError(FileNotFoundError):
    """A shard that was there when the run began cannot be opened any more: the run stops."""


class ShardFolder:
    """Reads any sample of a folder by its number; no image is decoded.

    A folder without ``index.json``, for example one written by another program, is indexed in memory by reading the
    headers of its shards.

    Args:
        folder: a local folder of shards.
        remote: where the folder is a copy of, see :func:`open_folder`.

    Raises:
        FileNotFoundError: if there are no shards.
        ValueError: if the index is of another version or does not fit the shards, or a shard must not be read.
    """

    def __init__(self, folder: str | PathLike[str], remote: RemoteFolder | None = None) -> None:
        self.folder, self._remote = Path(folder), remote
        if remote is None:
            shard_files(folder)
        self.indexed = (self.folder / INDEX_NAME).is_file()
        if self.indexed:
            self._index = read_index(self.folder)
            if remote is None:
                _check_shards(self.folder, self._index)
        else:
            sizes: dict[str, int] = {}
            self._index = ShardIndex.of_entries(sizes, self._scan_all(sizes))
        self._paths = [self.folder / name for name in self._index.sizes]
        self._files: dict[int, IO[bytes]] = {}
        self._process = -1

    def _scan_all(self, sizes: dict[str, int]) -> Iterator[IndexEntry]:
        """The index entries of all shards, from their headers; remote ones are fetched one after the other for that."""
        remote = self._remote
        names = [path.name for path in shard_files(self.folder)] if remote is None else remote.shards()
        for number, name in enumerate(names):
            path = self.folder / name if remote is None else remote.fetch(name)
            sizes[name] = path.stat().st_size
            yield from _scan(path, number)

    def __len__(self) -> int:
        return len(self._index.keys)

    def name(self, number: int) -> str:
        """Folder and key of a sample, for messages."""
        return f"{self.address}/{self._index.key(number)}"

    @property
    def address(self) -> str:
        """The folder, or where it is a copy of."""
        return self._remote.address if self._remote is not None else str(self.folder)

    @property
    def shards(self) -> np.ndarray:
        """Number of the shard of each sample, ascending."""
        return self._index.shards

    @property
    def shard_sizes(self) -> np.ndarray:
        """Samples in each shard that has any, int64."""
        counts = np.bincount(self._index.shards, minlength=1)
        return counts[counts > 0].astype(np.int64)

    @property
    def has_images(self) -> bool:
        """Whether any sample has an image."""
        return len(self._index.spans) > len(self)

    def signature(self) -> str:
        """Changes when samples are added, removed or moved."""
        return self._index.signature

    def kept(self, name: str) -> Path | None:
        """A further file of the folder, for example lengths; ``None`` if there is none."""
        if self._remote is not None and self._remote.has(name):
            return self._remote.fetch(name)
        return self.folder / name if (self.folder / name).is_file() else None

    def read(self, number: int) -> RawSample:
        """The sample of this number.

        Raises:
            SampleError: (a ``ValueError``) if it cannot be read.
            ShardGoneError: (a ``FileNotFoundError``) if its shard is not there any more.
        """
        content, *images = self._members(number, self._index.span(number))
        return parse_sample(self._index.key(number), content, images)

    def outline(self, number: int) -> tuple[RawSample, list[list[int]]]:
        """A sample without its images, and the [height, width] of each that the writer of the shard noted.

        For folders with an index only (``indexed``): what other programs note is not relied upon.

        Raises:
            SampleError: (a ``ValueError``) if it cannot be read.
        """
        members = self._index.span(number)
        (content,) = self._members(number, members[:1])
        raw = parse_sample(self._index.key(number), content, [])
        sizes = json.loads(content).get("image_sizes")
        good = isinstance(sizes, list) and all(
            isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size) for size in sizes
        )
        if not good or len(sizes) != len(members) - 1:
            raise SampleError(f"{self._index.key(number)}.json has image_sizes {sizes!r:.60}", "images")
        return raw, sizes

    def _members(self, number: int, members: list[list[int]]) -> list[bytes]:
        start = min(offset for offset, _ in members)
        stop = max(offset + size for offset, size in members)
        block = self._block(int(self._index.shards[number]), start, stop)  # a sample's files are neighbors
        return [block[offset - start : offset - start + size] for offset, size in members]

    def _block(self, shard: int, start: int, stop: int) -> bytes:
        if self._remote is not None and self._remote.by_sample:
            name = self._paths[shard].name
            try:
                return self._remote.read(name, start, stop, self._index.sizes[name])
            except OSError as error:
                raise _gone(f"{self.address}/{name}", error) from None
        file = self._open(shard)
        file.seek(start)
        block = file.read(stop - start)
        if len(block) < stop - start:
            raise SampleError(f"{file.name} ends before this sample does", "truncated")
        return block

    def _open(self, shard: int) -> IO[bytes]:
        if self._process != os.getpid():  # a forked worker must not share its parent's file positions
            self._files, self._process = {}, os.getpid()
            weakref.finalize(self, _close, self._files)
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            path = self._paths[shard]
            try:
                if self._remote is not None:
                    path = self._remote.fetch(path.name, self._index.sizes[path.name])
                self._files[shard] = path.open("rb")
            except OSError as error:
                raise _gone(path, error) from None
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_process": -1}


def _close(files: Mapping[int, IO[bytes]]) -> None:
    for file in files.values():
        file.close()


def _gone(path: Path | str, error: OSError) -> ShardGoneError:
    return ShardGoneError(f"{path} cannot be read any more ({error.strerror or error}); put it back and resume the run")


def open_folder(
    address: str | PathLike[str],
    cache: str | PathLike[str] | None = None,
    cache_limit: int | None = None,
    allow_pipe: bool = False,
) -> ShardFolder:
    """A folder of shards wherever it lies.

    Args:
        address: a local folder, an address that fsspec knows, or ``pipe:COMMAND`` for the tar that a command writes.
        cache: folder of local copies; ``None`` is ``NEO_COMPONENTS_CACHE`` or ``~/.cache/neo_components``.
        cache_limit: bytes of copies of this folder to keep at most; 0 keeps none and fetches each sample alone.
        allow_pipe: run the command of a ``pipe:`` address.

    Raises:
        FileNotFoundError: if there are no shards.
        RemoteError: (an ``OSError``) if the address cannot be reached.
        ValueError: see :class:`ShardFolder`; also for ``pipe:`` that is not allowed.
    """
    if not is_address(address):
        return ShardFolder(address)
    if str(address).startswith(PIPE):
        if not allow_pipe:
            raise ValueError(
                f"{address} would run a command, pipe: is refused; set data.allow_pipe if you trust whoever wrote it"
            )
        return ShardFolder(run_pipe(str(address), cache))
    remote = RemoteFolder(str(address), cache, cache_limit)
    remote.refresh(INDEX_NAME)
    return ShardFolder(remote.local, remote)


def _check_shards(folder: Path, index: ShardIndex) -> None:
    """Checks that an index is that of the shards beside it."""
    sizes = index.sizes
    found = {file.name: file.stat().st_size for file in shard_files(folder)}
    wrong = {name for name in found.keys() | sizes.keys() if found.get(name) != sizes.get(name)}
    if not wrong:
        names = list(sizes)
        numbers, first_from_behind = np.unique(index.shards[::-1], return_index=True)
        last = len(index.shards) - 1 - first_from_behind
        wrong = {
            names[shard]
            for shard, sample in zip(numbers.tolist(), last.tolist(), strict=True)
            if not _lies_there(folder / names[shard], index.key(sample), index.span(sample))
        }
    if wrong:
        raise ValueError(
            f"{folder / INDEX_NAME} does not fit {', '.join(sorted(wrong))}; delete it to index the shards again"
        )


def _lies_there(path: Path, key: str, members: Sequence[Sequence[int]]) -> bool:
    """Whether the JSON of a sample is where the index says: sizes alone may be equal, as a shard is padded."""
    with path.open("rb") as file:
        file.seek(members[0][0] - tarfile.BLOCKSIZE)
        return file.read(100).rstrip(b"\0") == f"{key}.json".encode()


def _scan(path: Path, shard: int) -> Iterator[IndexEntry]:
    """The index entries of one shard, from its headers."""
    found: dict[str, dict[str, list[int]]] = {}
    try:
        end = 0
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member_end(member)
                if member.isreg() and (parts := split_member(member.name)):
                    found.setdefault(parts[0], {})[parts[1]] = [member.offset_data, member.size]
        check_end(path, end)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: the shard is damaged ({error}); write it again") from None
    for key, members in found.items():
        if "json" not in members:
            raise ValueError(f"{path} holds {key} without {key}.json")
        order = image_order(key, [suffix for suffix in members if suffix != "json"])
        yield key, shard, [members["json"], *(members[suffix] for suffix in order)]


def read_shards(folder: str | PathLike[str]) -> Iterator[RawSample]:
    """The samples of a folder of shards, local or remote, in order, images as the bytes of their files.

    Raises:
        FileNotFoundError: if there are no shards.
        ValueError: if a shard is damaged, a member lies outside of it (an absolute or parent path) or is a pickle.
        SampleError: (a ``ValueError``) if a sample cannot be read.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    if "://" in str(folder):
        remote = open_folder(folder)
        yield from (remote.read(number) for number in range(len(remote)))
        return
    for path in shard_files(folder):
        with path.open("rb") as stream:
            files = tar_file_expander([{"url": str(path), "stream": stream}], select_files=split_member)
            try:
                _check_headers(path)  # reported before any of its samples; webdataset takes a cut header for the end
                yield from (_from_webdataset(sample) for sample in group_by_keys(files))
            except tarfile.TarError as error:
                raise ValueError(f"{path}: the shard is damaged ({error}); write it again") from None


def _check_headers(path: Path) -> None:
    """Checks that the headers of a tar are whole, up to its end.

    Raises:
        TarError: if they are not.
    """
    end = 0
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            end = member_end(member)
    check_end(path, end)


def _from_webdataset(sample: Mapping[str, Any]) -> RawSample:
    suffixes = [name for name in sample if not name.startswith("__") and name != "json"]
    order = image_order(sample["__key__"], suffixes)
    return parse_sample(sample["__key__"], sample.get("json"), [sample[suffix] for suffix in order])

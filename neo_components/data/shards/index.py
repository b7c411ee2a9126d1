"""Where each sample of a folder of shards lies, in arrays: read from ``index.json`` piece by piece.

The JSON of a large folder would take a kilobyte of memory for each sample, the arrays take some 60 bytes. Those of a
folder of many samples are kept beside the index and mapped from there the next time, so processes of one machine share
them and a folder opens at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np

from neo_components.data.shards.format import FORMAT_VERSION, INDEX_NAME
from neo_components.data.shards.remote import cache_folder

logger = logging.getLogger(__name__)

KEPT_FROM = 100_000
"""Samples of a folder from which on its arrays are kept."""

ARRAYS_VERSION = 1
PIECE = 1 << 20
"""Characters that are read at a time."""

IndexEntry = tuple[str, int, Sequence[Sequence[int]]]
"""key, number of the shard, [offset, size] of the JSON and of each image"""

_SAMPLES = re.compile(r'"samples"\s*:\s*\[')
_BETWEEN = re.compile(r"[\s,]*")
_ARRAYS = ("keys", "shards", "ends", "spans")


@dataclass(frozen=True)
class ShardIndex:
    """What is known of a folder's samples without looking into its shards.

    Args:
        sizes: bytes of each shard, by name.
        keys: [samples] bytes, UTF-8.
        shards: [samples] int32, number of each one's shard, ascending.
        ends: [samples] int64, how many files there are up to and with those of a sample.
        spans: [files, 2] int64, offset and size of each file in its shard; of a sample the JSON comes first.
        signature: changes when samples are added, removed or moved.
    """

    sizes: Mapping[str, int]
    keys: np.ndarray
    shards: np.ndarray
    ends: np.ndarray
    spans: np.ndarray
    signature: str

    @classmethod
    def of_entries(cls, sizes: Mapping[str, int], entries: Iterable[IndexEntry]) -> ShardIndex:
        """The index of these samples. ``sizes`` may still be filled while the entries are read."""
        keys, some, shards, ends, spans = [np.zeros(0, "S1")], list[bytes](), array("i"), array("q"), array("q")
        for key, shard, members in entries:
            some.append(key.encode())
            shards.append(shard)
            for offset, size in members:
                spans.append(offset)
                spans.append(size)
            ends.append(len(spans) // 2)
            if len(some) == 1 << 16:
                keys.append(np.array(some))
                some = []
        arrays = {
            "keys": np.concatenate([*keys, np.array(some)] if some else keys),
            "shards": np.array(shards, np.int32),
            "ends": np.array(ends, np.int64),
            "spans": np.array(spans, np.int64).reshape(-1, 2),
        }
        found = hashlib.sha256(repr(list(sizes.items())).encode())
        for name in _ARRAYS[1:]:
            found.update(arrays[name].data)
        return cls(sizes, **arrays, signature=found.hexdigest())

    def key(self, number: int) -> str:
        """Key of a sample."""
        return str(self.keys[number].decode())

    def span(self, number: int) -> list[list[int]]:
        """[offset, size] of each file of a sample."""
        first = int(self.ends[number - 1]) if number else 0
        spans: list[list[int]] = self.spans[first : self.ends[number]].tolist()
        return spans


def read_index(folder: Path) -> ShardIndex:
    """The index of a folder, from its arrays if they are kept.

    Raises:
        ValueError: if ``index.json`` is none, is of another version, or names shards outside of the folder.
    """
    path = folder / INDEX_NAME
    facts = path.stat()
    name = hashlib.sha256(repr((facts.st_size, facts.st_mtime_ns, FORMAT_VERSION, ARRAYS_VERSION)).encode()).hexdigest()
    elsewhere = cache_folder() / "indexes" / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    folders = [candidate / f"index-{name[:20]}" for candidate in (folder, elsewhere)]
    for candidate in folders:
        if (known := _load(candidate)) is not None:
            return known
    sizes: dict[str, int] = {}
    index = ShardIndex.of_entries(sizes, _entries(path, sizes))
    if len(index.keys) < KEPT_FROM or (kept := _keep(index, folders)) is None:
        return index
    return _load(kept) or index


def _entries(path: Path, sizes: dict[str, int]) -> Iterator[IndexEntry]:
    """The entries of the samples, which come last in the file; fills in the bytes of the shards first."""
    try:
        with path.open(encoding="utf-8") as file:
            text = _read_shards(path, file, sizes)
            for entry in _objects(file, text):
                yield entry["key"], entry["shard"], entry["members"]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no index of shards ({error!r}); delete it to index the shards again") from None


def _read_shards(path: Path, file: IO[str], sizes: dict[str, int]) -> str:
    """Reads what stands before the samples; returns the text that was read beyond."""
    text = ""
    while (begin := _SAMPLES.search(text)) is None and (more := file.read(PIECE)):
        text += more
    head = json.loads(text if begin is None else text[: begin.end()] + "]}")
    version, shards = head["format_version"], head["shards"]
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, this library reads {FORMAT_VERSION}; update one of them"
        )
    if begin is None:
        raise KeyError("samples")
    sizes |= {str(shard["name"]): int(shard["bytes"]) for shard in shards}
    if evil := [name for name in sizes if PurePath(name).name != name or not name.endswith(".tar")]:
        raise ValueError(f"{path} names shards outside of its folder, {evil[:3]}; it is refused")
    return text[begin.end() :]


def _objects(file: IO[str], text: str) -> Iterator[Any]:
    """The objects of a list whose beginning was read, up to the end of the file."""
    decoder, position = json.JSONDecoder(), 0
    while True:
        between = _BETWEEN.match(text, position)
        position = between.end() if between else position
        if text.startswith("]", position):
            break
        try:
            found, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            if not (more := file.read(PIECE)):
                raise
            text, position = text[position:] + more, 0
            continue
        yield found
    if (text[position + 1 :] + file.read()).strip() != "}":
        raise KeyError("samples, which must come last")


def _load(candidate: Path) -> ShardIndex | None:
    """The arrays of an index, mapped; ``None`` if they are not kept there or damaged."""
    if not os.path.isdir(candidate):  # False also where it may not be read
        return None
    try:
        facts = json.loads((candidate / "index.json").read_bytes())
        arrays = {name: np.load(candidate / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        return ShardIndex(facts["sizes"], **arrays, signature=facts["signature"])
    except (ValueError, KeyError, OSError, EOFError) as error:
        logger.warning("%s is damaged (%s); the index is read again", candidate, error)
        shutil.rmtree(candidate, ignore_errors=True)
        return None


def _keep(index: ShardIndex, folders: Sequence[Path]) -> Path | None:
    """Writes the arrays in the first of these folders that can be written; all or nothing, as others may do it too."""
    for candidate in folders:
        part = candidate.with_name(f"{candidate.name}.{os.getpid()}.part")
        try:
            part.mkdir(parents=True, exist_ok=True)
            for name in _ARRAYS:
                np.save(part / f"{name}.npy", getattr(index, name), allow_pickle=False)
            facts = {"sizes": dict(index.sizes), "signature": index.signature}
            (part / "index.json").write_text(json.dumps(facts), encoding="utf-8")
            part.rename(candidate)
            return candidate
        except OSError as error:
            if os.path.isdir(candidate):  # another process was faster
                return candidate
            logger.warning("the arrays of the index cannot be kept in %s (%s)", candidate, error)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return None

"""Training data on disk: folders of webdataset tar shards with an index.

A folder holds ``shard-000000.tar``, ``shard-000001.tar``, ... and ``index.json``. For each sample a shard holds
``KEY.json`` and then its images, ``KEY.png`` (or ``jpg``, ``webp``) if it has one, ``KEY.0.png``, ``KEY.1.png``, ... if
it has several. The index tells where in the shards each sample lies, how many turns and characters it has and how large
its images are. Other programs may read the shards with webdataset alone.

Nothing here unpickles: only JSON is decoded, and a shard that holds a pickle is refused.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from neo_components.data.image.files import ImageError, open_image
from neo_components.data.skip_counts import SampleError

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
PICKLE_SUFFIXES = ("pkl", "pickle", "pyd", "pt", "pth", "ckpt", "npy", "npz", "joblib", "dill")

RawSample = dict[str, Any]
"""``key``, ``conversations``, ``images`` (the bytes of each file), and any further plain values."""

_STORED = ("conversations", "image_sizes")
_SUFFIX_OF_FORMAT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_KEY = 80  # a tar member's name has 100 bytes without extensions


def write_shards(
    samples: Iterable[Mapping[str, Any]], folder: str | PathLike[str], max_per_shard: int = 10_000
) -> dict[str, Any]:
    """Writes samples into a new folder of shards; equal samples give equal bytes.

    Everything is written to ``FOLDER.part`` and renamed at the end, so an interrupted run leaves no half folder.

    Args:
        samples: mappings with ``key`` (unique, without dots and slashes), ``conversations`` (see
            ``data/text/conversation.py``), ``images`` (a list of paths or file contents; may be empty or missing) and
            any further values that JSON can hold.
        folder: must not exist, or be empty.
        max_per_shard: samples in one shard.

    Returns:
        The content of ``index.json``.

    Raises:
        FileExistsError: if the folder holds something.
        OSError: if the disk is full.
        ValueError: if a key or value is not allowed.
        ImageError: (a ``ValueError``) if an image cannot be opened; pixels are not decoded.
    """
    folder = Path(folder)
    if max_per_shard < 1:
        raise ValueError(f"max_per_shard must be at least 1, got {max_per_shard}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; remove it or write to another folder")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        index = _write_all(samples, part, max_per_shard)
        (part / INDEX_NAME).write_text(json.dumps(index, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise OSError(
                error.errno, f"{folder} could not be written, nothing is left of it ({error.strerror}); make room"
            ) from error
        raise
    return index


def _write_all(samples: Iterable[Mapping[str, Any]], folder: Path, max_per_shard: int) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    shards: list[dict[str, Any]] = []
    keys: set[str] = set()
    left = iter(samples)
    while some := list(islice(left, 1)):
        path = folder / f"shard-{len(shards):06d}.tar"
        written = write_shard(path, chain(some, islice(left, max_per_shard - 1)), keys)
        entries += [{"key": entry.pop("key"), "shard": len(shards), **entry} for entry in written]
        shards.append({"name": path.name, "bytes": path.stat().st_size})
    return {"format_version": FORMAT_VERSION, "shards": shards, "samples": entries}


def write_shard(path: Path, samples: Iterable[Mapping[str, Any]], known: set[str]) -> list[dict[str, Any]]:
    """Writes one shard.

    Args:
        path: the new file.
        samples: see :func:`write_shards`.
        known: keys that are taken; those of the samples are added.

    Returns:
        The samples' parts of the index, without the number of the shard.

    Raises:
        OSError: if it cannot be written, for example because the disk is full.
        ValueError: see :func:`write_shards`.
    """
    entries = []
    with tarfile.TarFile(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            key = _checked_key(sample.get("key"), known)
            entries.append({"key": key, **_add_sample(tar, key, sample)})
    return entries


def _checked_key(key: Any, known: set[str]) -> str:
    """A key that webdataset reads back as it is: it takes all behind the first dot for the suffix."""
    if not isinstance(key, str) or not key or len(key.encode()) > _MAX_KEY or key.startswith("__"):
        raise ValueError(
            f"a sample's key must be a text of 1 to {_MAX_KEY} bytes that does not start with __, got {key!r}"
        )
    if set(key) & set("./\\\0"):
        raise ValueError(f"a sample's key must hold no dot and no slash, got {key!r}")
    if key in known:
        raise ValueError(f"the key {key!r} is used twice; keys must be unique")
    known.add(key)
    return key


def _add_sample(tar: tarfile.TarFile, key: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Appends a sample's files to the shard; returns its part of the index."""
    if clash := {"image_sizes", "__key__"} & sample.keys():
        raise ValueError(f"sample {key}: the names {sorted(clash)} are taken")
    images = [_image_file(source, f"{key}, image {n}") for n, source in enumerate(sample.get("images") or ())]
    sizes = [size for _, _, size in images]
    extra = {name: value for name, value in sample.items() if name not in ("key", "images", "conversations")}
    record = {"conversations": sample.get("conversations"), "image_sizes": sizes, **extra}
    try:
        content = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"sample {key} holds a value that JSON cannot: {error}") from None
    files = [("json", content)]
    for number, (suffix, data, _) in enumerate(images):
        files.append((suffix if len(images) == 1 else f"{number}.{suffix}", data))
    members = []
    for suffix, data in files:
        header = tarfile.TarInfo(f"{key}.{suffix}")
        header.size = len(data)  # owner, mode and time stay at TarInfo's constants, so bytes depend on content alone
        tar.addfile(header, io.BytesIO(data))
        members.append([tar.offset - _padded(len(data)), len(data)])
    texts = [turn.get("value", "") for turn in record["conversations"] or () if isinstance(turn, Mapping)]
    lengths = {"turns": len(texts), "characters": sum(len(str(text)) for text in texts), "images": sizes}
    return {**lengths, "members": members}


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _image_file(source: Any, name: str) -> tuple[str, bytes, list[int]]:
    """Suffix, bytes and [height, width] of an image; formats other than JPEG, PNG and WebP become PNG."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    image = open_image(data, name)
    size = [image.height, image.width]
    suffix = _SUFFIX_OF_FORMAT.get(image.format or "")
    if suffix is None:
        buffer = io.BytesIO()
        try:
            image.convert("RGBA" if image.has_transparency_data else "RGB").save(buffer, "PNG")
        except Exception as error:  # Pillow's readers raise anything on broken files
            raise ImageError(f"{name}: the image cannot be decoded ({error})") from None
        suffix, data = "png", buffer.getvalue()
    return suffix, data, size


def shard_files(folder: str | PathLike[str]) -> list[Path]:
    """The shards of a local folder, in order.

    Raises:
        FileNotFoundError: if there is no such folder or no shard in it.
        PermissionError: if the folder cannot be read.
        ValueError: if it is an address instead of a folder: ``pipe:`` would run a command.
    """
    if str(folder).startswith("pipe:") or "://" in str(folder):
        raise ValueError(
            f"shards are read from a local folder here, got {str(folder)!r}; addresses and pipe: are refused, "
            "open_folder reads them"
        )
    try:
        files = [Path(folder) / name for name in sorted(os.listdir(folder)) if name.endswith(".tar")]
        lost = [file.name for file in files if not file.is_file()]
    except PermissionError:
        raise PermissionError(f"{folder} cannot be read; change its permissions") from None
    except OSError as error:
        raise FileNotFoundError(
            f"no shards (*.tar) in {folder} ({error.strerror}); write them with `neo data` or write_shards"
        ) from None
    if not files:
        raise FileNotFoundError(f"no shards (*.tar) in {folder}; write them with `neo data` or write_shards")
    if lost:
        raise FileNotFoundError(
            f"{folder}: {', '.join(lost[:3])} is no file (a link to nothing?); put it back or remove it"
        )
    return files


def check_end(path: Path, end: int) -> None:
    """Checks that a tar ends where its last member does: to ``tarfile`` a cut looks like the end.

    Args:
        path: of the tar.
        end: offset behind the last member that was found.

    Raises:
        TarError: if something else follows than the zeros that end a tar, or not even those.
    """
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.ReadError("unexpected end of data")
    if not block:
        raise tarfile.ReadError("it ends early: the zeros that close a tar are missing")


def member_end(member: tarfile.TarInfo) -> int:
    """Offset behind a member and what fills its last block."""
    return member.offset_data + _padded(member.size)


def split_member(name: str, also: Sequence[str] = ()) -> tuple[str, str] | None:
    """(key, suffix) of a member of a shard; ``None`` for one that is neither JSON nor an image nor of ``also``.

    Raises:
        ValueError: if its path leaves the shard, or it is a pickle.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"the shard holds {name!r}, whose path is absolute or leads out of the shard; it is refused")
    suffix = path.name.lower().partition(".")[2]
    last = suffix.rpartition(".")[2]
    if last in PICKLE_SUFFIXES:
        raise ValueError(f"the shard holds {name!r}; pickles can run code and are refused, remove it from the shard")
    if suffix not in ("json", *also) and last not in IMAGE_SUFFIXES:
        return None
    return name[: len(name) - len(suffix) - 1], suffix


def image_order(key: str, suffixes: Sequence[str]) -> list[str]:
    """The suffixes of a sample's images in the order of the images.

    Raises:
        SampleError: (a ``ValueError``) if the numbers are not 0, 1, 2, ...
    """
    numbered = {suffix.partition(".")[0]: suffix for suffix in suffixes if "." in suffix}
    if len(suffixes) == 1 and not numbered:
        return list(suffixes)
    order = [numbered.get(str(number), "") for number in range(len(suffixes))]
    if "" in order:
        raise SampleError(f"sample {key}: images must be numbered 0, 1, ..., found {sorted(suffixes)}", "images")
    return order


def parse_sample(key: str, content: bytes | None, images: list[bytes]) -> RawSample:
    """A sample from the content of its files.

    Raises:
        SampleError: (a ``ValueError``) if the JSON is missing or is none.
    """
    try:
        record = json.loads(content) if content is not None else None
    except ValueError as error:  # a decoding error is one too
        raise SampleError(f"{key}.json is no JSON ({error})", "json") from None
    if not isinstance(record, dict):
        raise SampleError(f"{key}.json must hold an object with conversations, got {content!r:.60}", "json")
    extra = {name: value for name, value in record.items() if name not in _STORED}
    return {**extra, "key": key, "conversations": record.get("conversations"), "images": images}

"""From a LLaVA-style JSON or JSONL file and its image folder to shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from neo_components.data.conversation import check_conversation
from neo_components.data.images import open_image
from neo_components.data.shards import RawSample, write_shards
from neo_components.data.tally import SampleError, Tally


def llava_to_shards(
    source: str | PathLike[str],
    image_folder: str | PathLike[str] | None,
    folder: str | PathLike[str],
    max_per_shard: int = 10_000,
) -> Tally:
    """Writes a LLaVA-style data set as shards.

    Each record is ``{"id": ..., "image": "a.jpg" | ["a.jpg", ...], "conversations": [...]}``; ``image`` is missing for
    text alone. ``id`` and any further values are kept in the sample's JSON. Records that cannot be learnt from (no
    JSON, a missing or unreadable image, more or fewer ``<image>`` tags than images, no answer) are left out, counted
    and named in the log. Pixels are not decoded here, so a truncated image shows in training only.

    Args:
        source: ``.jsonl`` with one record per line, or ``.json`` with a list of records.
        image_folder: images are looked up here; ``None`` if there are none.
        folder: the new folder of shards.
        max_per_shard: samples in one shard.

    Returns:
        how many records were ``read``, ``kept`` (written), and ``skipped`` by reason.

    Raises:
        FileNotFoundError: if the file or the image folder does not exist.
        FileExistsError: if the new folder holds something.
        ValueError: if the file is neither a list of records nor lines of them, or no record can be used.
    """
    source, images = Path(source), Path(image_folder) if image_folder is not None else None
    if not source.is_file():
        raise FileNotFoundError(f"no such file: {source}")
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f"no such image folder: {images}")
    tally = Tally()
    write_shards(_usable(source, images, tally), folder, max_per_shard)
    return tally


def _usable(source: Path, images: Path | None, tally: Tally) -> Iterator[RawSample]:
    for number, text in enumerate(_records(source)):
        tally.read += 1
        try:
            yield _sample(f"{number:08d}", text, images)
        except SampleError as error:
            tally.skip(f"{source}, record {number}", error)
    if not tally.kept:
        raise ValueError(f"{source} holds no usable record ({tally.summary() or 'it is empty'}); the log names each")


def _records(source: Path) -> Iterator[Any]:
    """Records of a JSON list, or the lines of JSONL as text."""
    if source.suffix == ".jsonl":
        with source.open("rb") as lines:
            yield from (line for line in lines if line.strip())
        return
    try:
        records = json.loads(source.read_bytes())
    except ValueError as error:
        raise ValueError(f"{source} is no JSON ({error}); name it .jsonl if it has one record per line") from None
    if not isinstance(records, list):
        raise ValueError(f"{source} must hold a list of records, got {type(records).__name__}")
    yield from records


def _sample(key: str, record: Any, images: Path | None) -> RawSample:
    if isinstance(record, bytes):
        try:
            record = json.loads(record)
        except ValueError as error:
            raise SampleError(f"no JSON ({error})", "json") from None
    if not isinstance(record, dict):
        raise SampleError(f"a record must be an object, got {type(record).__name__}", "json")
    names = record.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SampleError(f"'image' must be a name or a list of names, got {names!r:.100}", "images")
    check_conversation(record.get("conversations", ()), len(names))
    files = [_image(name, images) for name in names]
    extra = {name: value for name, value in record.items() if name not in ("image", "image_sizes", "key", "__key__")}
    return {**extra, "key": key, "images": files}


def _image(name: str, folder: Path | None) -> bytes:
    if folder is None:
        raise SampleError(f"no image {name!r}: no image folder was given", "missing_image")
    path = folder / name
    if not path.is_file():
        raise SampleError(f"no image {name!r} in {folder}", "missing_image")
    data = path.read_bytes()
    open_image(data, name)
    return data

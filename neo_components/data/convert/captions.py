"""From a folder of images with captions to shards."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from neo_components.data.convert.engine import Records, Samples, convert, file_facts, in_parts, read_image
from neo_components.data.shards.format import RawSample
from neo_components.data.skip_counts import SampleError, SkipCounts
from neo_components.data.text.conversation import IMAGE_TAG, check_conversation

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
NAME_COLUMNS = ("file_name", "filename", "image", "file", "path")
CAPTION_COLUMNS = ("caption", "text", "title")


def captions_to_shards(
    image_folder: str | PathLike[str],
    captions: str | PathLike[str] | None,
    folder: str | PathLike[str],
    max_per_shard: int = 10_000,
    *,
    prompt: str = "",
    workers: int = 0,
    title: str | None = None,
) -> SkipCounts:
    """Writes images and their captions as shards.

    Each becomes a conversation of one turn: the image (and ``prompt``), and its caption as the answer.

    Args:
        image_folder: holds the images, in sub-folders too.
        captions: ``.csv`` or ``.jsonl`` with one of the names ``file_name``, ``filename``, ``image``, ``file``,
            ``path`` and one of ``caption``, ``text``, ``title``; ``.txt`` with lines ``NAME<tab>CAPTION``; ``None`` if
            each image has a file of its own, ``a.txt`` beside ``a.jpg``.
        folder: the new folder of shards.
        max_per_shard: records in one shard.
        prompt: text behind each image, for example a request to describe it.
        workers: processes that write; 0 writes in this one.
        title: of the progress; ``None`` shows none.

    Returns:
        how many records were ``read``, ``kept`` (written), and ``skipped`` by reason.

    Raises:
        FileNotFoundError: if the folder or the file does not exist.
        FileExistsError: if the new folder holds something.
        ValueError: if the file of captions is of another kind or lacks a column, or no record can be used.
    """
    images = Path(image_folder)
    if not images.is_dir():
        raise FileNotFoundError(f"no such image folder: {images}")
    file = Path(captions) if captions is not None else None
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    reader = _Reader(str(file or images), images, prompt)
    facts = file_facts(file or images)
    total = sum(1 for _ in _records(images, file)) if title else 0
    return convert(
        in_parts(_records(images, file), max_per_shard),
        reader,
        folder,
        {**facts, "kind": "captions", "size": max_per_shard, "prompt": prompt, "images": str(images.resolve())},
        workers=workers,
        title=title,
        total=total,
    )


@dataclass
class _Reader:
    source: str
    images: Path
    prompt: str

    def __call__(self, part: Records) -> Samples:
        first, records = part
        for number, (name, caption) in enumerate(records, first):
            yield f"{self.source}, {name or f'record {number}'}", partial(self._sample, f"{number:08d}", name, caption)

    def _sample(self, key: str, name: str | None, caption: str | None) -> RawSample:
        if name is None:
            raise SampleError("the record has no name of an image, or no caption", "caption")
        path = self.images / name
        if caption is None:
            beside = path.with_suffix(".txt")
            if not beside.is_file():
                raise SampleError(f"no caption {beside.name} beside the image", "caption")
            caption = beside.read_text(encoding="utf-8", errors="replace").strip()
        return caption_sample(key, caption, self.prompt, read_image(path, name), name=name)


def caption_sample(key: str, caption: str, prompt: str, image: bytes, **extra: Any) -> RawSample:
    """The conversation of an image and its caption.

    Raises:
        SampleError: (a ``ValueError``) if the caption is empty or cannot be learnt.
    """
    question = f"{IMAGE_TAG}\n{prompt}" if prompt else IMAGE_TAG
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
    check_conversation(turns, 1)
    return {**extra, "key": key, "conversations": turns, "images": [image]}


def _records(images: Path, captions: Path | None) -> Iterator[tuple[str | None, str | None]]:
    """Name and caption of each image; a caption of ``None`` lies beside the image, a name of ``None`` is a fault."""
    if captions is None:
        found = (path for path in sorted(images.rglob("*")) if path.suffix.lower() in SUFFIXES)
        yield from ((path.relative_to(images).as_posix(), None) for path in found)
    elif captions.suffix == ".csv":
        with captions.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = [_column(captions, rows.fieldnames or [], names) for names in (NAME_COLUMNS, CAPTION_COLUMNS)]
            yield from (_pair(row, *columns) for row in rows)
    elif captions.suffix == ".jsonl":
        with captions.open("rb") as lines:
            yield from (_from_json(line) for line in lines if line.strip())
    elif captions.suffix == ".txt":
        with captions.open(encoding="utf-8-sig", errors="replace") as texts:
            for text in texts:
                if text.strip():
                    name, tab, caption = text.rstrip("\n").partition("\t")
                    yield (name, caption.strip()) if tab else (None, None)
    else:
        raise ValueError(f"captions are a .csv, .jsonl or .txt file, got {captions.name!r}")


def _column(file: Path, there: Any, wanted: tuple[str, ...]) -> str:
    """The column of one of the wanted names."""
    found = next((name for name in wanted if name in there), None)
    if found is None:
        raise ValueError(f"{file} has no column {' or '.join(wanted)}; its first line names {list(there)}")
    return found


def _pair(row: dict[str, Any], name: str, caption: str) -> tuple[str | None, str | None]:
    if isinstance(row.get(name), str) and isinstance(row.get(caption), str):
        return row[name], row[caption].strip()
    return None, None


def _from_json(line: bytes) -> tuple[str | None, str | None]:
    try:
        record = json.loads(line)
    except ValueError:
        return None, None
    if not isinstance(record, dict):
        return None, None
    names = [next((name for name in wanted if name in record), "") for wanted in (NAME_COLUMNS, CAPTION_COLUMNS)]
    return _pair(record, *names)

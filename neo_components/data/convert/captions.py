"""A folder of images with captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neo_components.data.convert.base import Converter, check_folder, read_lines
from neo_components.data.shards.format import RawSample
from neo_components.data.skip_counts import SampleError
from neo_components.data.text.turns import IMAGE_TAG
from neo_components.registry import CONVERTERS

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
NAME_COLUMNS = ("file_name", "filename", "image", "file", "path")
CAPTION_COLUMNS = ("caption", "text", "title")

Record = tuple[str | None, str | None]
"""Name and caption of an image; a caption of ``None`` is in a file beside the image, a name of ``None`` is a fault."""


@CONVERTERS.register("captions")
@dataclass
class Captions(Converter):
    """Convert a folder of images with captions into shards.

    Each image becomes a conversation of one question, the image and the prompt, and one answer, its caption. A .csv or
    .jsonl file has a name (file_name, filename, image, file or path) and a caption (caption, text or title) in each
    record, a .txt file has lines NAME<tab>CAPTION.

    Args:
        images: Folder of images, in sub-folders too.
        captions: File of captions, .csv, .jsonl or .txt; by default a.txt beside a.jpg.
        prompt: Text behind each image, for example a request to describe it.

    Raises:
        FileNotFoundError: if the folder or the file does not exist.
        ValueError: if the captions are of another kind.
    """

    images: Path
    captions: Path | None = None
    prompt: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder(self.images, "images")
        if self.captions is not None and self.captions.suffix not in (".csv", ".jsonl", ".txt"):
            raise ValueError(f"captions are a .csv, .jsonl or .txt file, got {self.captions.name!r}")

    def records(self) -> Iterator[Record]:
        """See :meth:`Converter.records`.

        Raises:
            ValueError: if a column is missing.
        """
        if self.captions is None:
            found = (path for path in sorted(self.images.rglob("*")) if path.suffix.lower() in SUFFIXES)
            yield from ((path.relative_to(self.images).as_posix(), None) for path in found)
        else:
            read = {".csv": _from_csv, ".jsonl": _from_jsonl, ".txt": _from_text}[self.captions.suffix]
            yield from read(self.captions)

    def sample(self, record: Record) -> RawSample:
        """See :meth:`Converter.sample`."""
        name, caption = record
        if name is None:
            raise SampleError("the record has no name of an image, or no caption", "caption")
        path = self.images / name
        if caption is None:
            beside = path.with_suffix(".txt")
            if not beside.is_file():
                raise SampleError(f"no caption {beside.name} beside the image {name}", "caption")
            caption = beside.read_text(encoding="utf-8", errors="replace").strip()
        return {"name": name, "conversations": caption_turns(caption, self.prompt), "images": [path]}


def caption_turns(caption: str, prompt: str) -> list[dict[str, str]]:
    """The conversation of an image and its caption."""
    question = f"{IMAGE_TAG}\n{prompt}" if prompt else IMAGE_TAG
    return [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]


def _from_csv(captions: Path) -> Iterator[Record]:
    with captions.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        columns = [_column(captions, table.fieldnames or [], names) for names in (NAME_COLUMNS, CAPTION_COLUMNS)]
        yield from (_pair(line, *columns) for line in table)


def _from_jsonl(captions: Path) -> Iterator[Record]:
    for line in read_lines(captions):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            wanted = (NAME_COLUMNS, CAPTION_COLUMNS)
            yield _pair(record, *(next((name for name in names if name in record), "") for names in wanted))
        else:
            yield None, None


def _from_text(captions: Path) -> Iterator[Record]:
    with captions.open(encoding="utf-8-sig", errors="replace") as lines:
        for line in lines:
            if line.strip():
                name, tab, caption = line.rstrip("\n").partition("\t")
                yield (name, caption.strip()) if tab else (None, None)


def _column(file: Path, there: Any, wanted: tuple[str, ...]) -> str:
    """The first of the wanted columns that there is."""
    found = next((name for name in wanted if name in there), None)
    if found is None:
        raise ValueError(f"{file} has no column {' or '.join(wanted)}; its first line names {list(there)}")
    return found


def _pair(record: dict[str, Any], name: str, caption: str) -> Record:
    if isinstance(record.get(name), str) and isinstance(record.get(caption), str):
        return record[name], record[caption].strip()
    return None, None

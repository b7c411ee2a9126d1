"""From a benchmark in VLMEvalKit's TSV format to shards.

Columns: ``index``, ``image`` (base64, a JSON list of base64, or the index of the row that holds the same image),
``question``, ``answer``, and for multiple choice ``A``, ``B``, ... and ``hint``. Source: VLMEvalKit's documentation of
its custom benchmarks.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path

from neo_components.data.convert.engine import Records, Samples, convert, file_facts, in_parts
from neo_components.data.image.images import open_image
from neo_components.data.shards.format import RawSample
from neo_components.data.skip_counts import SampleError, SkipCounts
from neo_components.data.text.conversation import IMAGE_TAG, check_conversation

REFERENCE = 64
"""An image column of fewer characters is the index of another row."""

CHOICE = "Answer with the option's letter from the given choices directly."

Row = dict[str, str]


def vlmeval_to_shards(
    source: str | PathLike[str],
    folder: str | PathLike[str],
    max_per_shard: int = 2_000,
    *,
    workers: int = 0,
    title: str | None = None,
) -> SkipCounts:
    """Writes the questions of a TSV file as shards; ``category`` is kept as ``kind``.

    Args:
        source: the TSV file.
        folder: the new folder of shards.
        max_per_shard: rows in one shard.
        workers: processes that write; 0 writes in this one.
        title: of the progress; ``None`` shows none.

    Returns:
        how many rows were ``read``, ``kept`` (written), and ``skipped`` by reason.

    Raises:
        FileNotFoundError: if the file does not exist.
        FileExistsError: if the new folder holds something.
        ValueError: if a column is missing, or no row can be used.
    """
    source = Path(source)
    if not source.is_file():
        raise FileNotFoundError(f"no such file: {source}")
    shared = _shared_images(source)
    total = sum(1 for _ in _rows(source)) if title else 0
    job = {**file_facts(source), "kind": "vlmeval", "size": max_per_shard}
    rows = (_with_image(row, shared) for row in _rows(source))
    parts = in_parts(rows, max_per_shard)
    return convert(parts, _Reader(str(source)), folder, job, workers=workers, title=title, total=total)


def _rows(source: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # images are longer than what csv takes for a sane field
    with source.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter="\t")
        lacking = {"index", "image", "question", "answer"} - set(rows.fieldnames or [])
        if lacking:
            raise ValueError(
                f"{source} has no column {', '.join(sorted(lacking))}; its first line names {rows.fieldnames}"
            )
        for row in rows:
            yield {name: value for name, value in row.items() if isinstance(name, str) and isinstance(value, str)}


def _shared_images(source: Path) -> dict[str, str]:
    """The images that other rows refer to, by index."""
    wanted = {row["image"] for row in _rows(source) if 0 < len(row.get("image", "")) < REFERENCE}
    if not wanted:
        return {}
    return {row["index"]: row["image"] for row in _rows(source) if row.get("index") in wanted}


def _with_image(row: Row, shared: dict[str, str]) -> Row:
    image = row.get("image", "")
    return {**row, "image": shared.get(image, "")} if 0 < len(image) < REFERENCE else row


@dataclass
class _Reader:
    source: str

    def __call__(self, part: Records) -> Samples:
        first, rows = part
        for number, row in enumerate(rows, first):
            yield f"{self.source}, index {row.get('index', number)}", partial(_sample, f"{number:08d}", row)


def _sample(key: str, row: Row) -> RawSample:
    images = [_decoded(text, f"image {number}") for number, text in enumerate(_images(row.get("image", "")))]
    if not row.get("answer", "").strip():
        raise SampleError("the row has no answer", "no_answer")
    text = question_text(row)
    if not images and IMAGE_TAG not in text:
        raise SampleError("the row has no image", "missing_image")
    if IMAGE_TAG not in text:
        text = f"{IMAGE_TAG}\n" * len(images) + text
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": row["answer"]}]
    check_conversation(turns, len(images))
    kept = {"index": row["index"], "kind": row.get("category") or "other"}
    return {**kept, "key": key, "conversations": turns, "images": images}


def question_text(row: Row) -> str:
    """Hint, question and choices of a row as one text."""
    choices = [f"{letter}. {row[letter]}" for letter in string.ascii_uppercase if row.get(letter, "").strip()]
    hint = row.get("hint", "").strip()
    lines = [*([f"Hint: {hint}"] if hint else []), row["question"], *choices, *([CHOICE] if choices else [])]
    return "\n".join(lines)


def _images(text: str) -> list[str]:
    if not text.startswith("["):
        return [text] if text else []
    try:
        return [str(image) for image in json.loads(text)]
    except ValueError as error:
        raise SampleError(f"the list of images is no JSON ({error})", "json") from None


def _decoded(text: str, name: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise SampleError(f"{name} is not base64 ({error})", "unreadable") from None
    open_image(data, name)
    return data

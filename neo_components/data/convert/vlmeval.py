"""A benchmark in VLMEvalKit's TSV format.

Columns: ``index``, ``image`` (base64, a JSON list of base64, or the index of the line that holds the same image),
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
from pathlib import Path

from neo_components.data.convert.base import Converter, Samples
from neo_components.data.shards.format import RawSample
from neo_components.data.skip_counts import SampleError
from neo_components.data.text.turns import IMAGE_TAG
from neo_components.registry import CONVERTERS

REFERENCE = 64
"""An image column of fewer characters is the index of another line."""

CHOICE = "Answer with the option's letter from the given choices directly."

Line = dict[str, str]


@CONVERTERS.register("vlmeval")
@dataclass
class VLMEval(Converter):
    """Convert a benchmark of VLMEvalKit into shards.

    The column ``category`` is kept as ``kind``.

    Args:
        table: Benchmark in VLMEvalKit's TSV format.

    Raises:
        FileNotFoundError: if the file does not exist.
    """

    shard_size = 2_000
    table: Path

    def records(self) -> Iterator[Line]:
        """The lines, each with its image.

        Raises:
            ValueError: if a column is missing.
        """
        shared = _shared_images(self.table)
        yield from (_with_image(line, shared) for line in _lines(self.table))

    def total(self) -> int:
        """Number of the lines."""
        return sum(1 for _ in _lines(self.table))

    def samples(self, number: int, record: Line) -> Samples:
        """Names the sample by its ``index``."""
        ((_, make),) = super().samples(number, record)
        yield f"{self.table}, index {record.get('index', number)}", make

    def sample(self, record: Line) -> RawSample:
        """See :meth:`Converter.sample`."""
        images = [_decoded(text, f"image {number}") for number, text in enumerate(_images(record.get("image", "")))]
        if not record.get("answer", "").strip():
            raise SampleError("the line has no answer", "no_answer")
        text = question_text(record)
        if not images and IMAGE_TAG not in text:
            raise SampleError("the line has no image", "missing_image")
        if IMAGE_TAG not in text:
            text = f"{IMAGE_TAG}\n" * len(images) + text
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": record["answer"]}]
        kept = {"index": record["index"], "kind": record.get("category") or "other"}
        return {**kept, "conversations": turns, "images": images}


def _lines(source: Path) -> Iterator[Line]:
    csv.field_size_limit(sys.maxsize)  # images are longer than what csv takes for a sane field
    with source.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file, delimiter="\t")
        lacking = {"index", "image", "question", "answer"} - set(table.fieldnames or [])
        if lacking:
            raise ValueError(
                f"{source} has no column {', '.join(sorted(lacking))}; its first line names {table.fieldnames}"
            )
        for line in table:
            yield {name: value for name, value in line.items() if isinstance(name, str) and isinstance(value, str)}


def _shared_images(source: Path) -> dict[str, str]:
    """The images that other lines refer to, by index."""
    wanted = {line["image"] for line in _lines(source) if 0 < len(line.get("image", "")) < REFERENCE}
    if not wanted:
        return {}
    return {line["index"]: line["image"] for line in _lines(source) if line.get("index") in wanted}


def _with_image(line: Line, shared: dict[str, str]) -> Line:
    image = line.get("image", "")
    return {**line, "image": shared.get(image, "")} if 0 < len(image) < REFERENCE else line


def question_text(line: Line) -> str:
    """Hint, question and choices of a line as one text."""
    choices = [f"{letter}. {line[letter]}" for letter in string.ascii_uppercase if line.get(letter, "").strip()]
    hint = line.get("hint", "").strip()
    parts = [*([f"Hint: {hint}"] if hint else []), line["question"], *choices, *([CHOICE] if choices else [])]
    return "\n".join(parts)


def _images(text: str) -> list[str]:
    if not text.startswith("["):
        return [text] if text else []
    try:
        return [str(image) for image in json.loads(text)]
    except ValueError as error:
        raise SampleError(f"the list of images is no JSON ({error})", "json") from None


def _decoded(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise SampleError(f"{name} is not base64 ({error})", "unreadable") from None

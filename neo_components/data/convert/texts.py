"""Texts, question-answer pairs or chat messages in JSONL or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neo_components.data.convert.base import Converter, parse_record, read_lines
from neo_components.data.shards.format import RawSample
from neo_components.data.skip_counts import SampleError
from neo_components.registry import CONVERTERS

ROLES = {"system": "system", "user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt"}
"""Roles of chat messages, and of the turns that they become."""


@CONVERTERS.register("text")
@dataclass
class Texts(Converter):
    """Convert texts, question-answer pairs or chat messages into shards.

    A record with ``conversations`` (LLaVA's form) or ``messages`` (``role`` and ``content``) keeps its turns. Of any
    other record one column is the target as a whole: an answer to nothing, or to another column.

    Args:
        texts: JSONL file with one record per line, or Parquet file.
        column: Column of the target text.
        question: Column of the question, if any.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is of another kind.
    """

    texts: Path
    column: str = "text"
    question: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.texts.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"texts are read from .jsonl or .parquet, got {self.texts.name!r}")

    def records(self) -> Iterator[bytes]:
        """The records as lines of JSON.

        Raises:
            ModuleNotFoundError: if the file is Parquet and pyarrow is not installed.
            ValueError: if the file is no Parquet.
        """
        if self.texts.suffix == ".jsonl":
            yield from read_lines(self.texts)
            return
        for batch in _parquet(self.texts).iter_batches(batch_size=1000):
            # As text, so that what is no JSON (dates, bytes) shows here and not when the shard is written.
            yield from (json.dumps(record, default=str).encode() for record in batch.to_pylist())

    def total(self) -> int:
        """Number of the records."""
        return int(_parquet(self.texts).metadata.num_rows) if self.texts.suffix == ".parquet" else super().total()

    def sample(self, record: bytes) -> RawSample:
        """See :meth:`Converter.sample`."""
        fields = parse_record(record)
        turns = fields.get("conversations")
        if turns is None:
            turns = _from_messages(fields["messages"]) if "messages" in fields else self._turns(fields)
        return {"conversations": turns}

    def _turns(self, record: dict[str, Any]) -> list[dict[str, str]]:
        wanted = [name for name in (self.question, self.column) if name is not None]
        values = [record.get(name) for name in wanted]
        if not all(isinstance(value, str) for value in values):
            raise SampleError(f"the record has no text in {' and '.join(wanted)}; it has {sorted(record)}", "json")
        roles = ["human", "gpt"][-len(values) :]
        return [{"from": role, "value": str(value)} for role, value in zip(roles, values, strict=True)]


def _from_messages(messages: Any) -> list[dict[str, str]]:
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not good:
        raise SampleError(f"messages must be {{'role': str, 'content': str}} each, got {messages!r:.100}", "turns")
    return [{"from": ROLES.get(m["role"], m["role"]), "value": m["content"]} for m in messages]


def _parquet(source: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{source} is Parquet; reading it needs pyarrow: pip install 'neo-components[parquet]'"
        ) from None
    try:
        return ParquetFile(source)
    except ArrowInvalid as error:
        raise ValueError(f"{source} is no Parquet file ({error})") from None

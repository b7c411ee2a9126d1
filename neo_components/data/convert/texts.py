"""From text alone, in JSONL or Parquet, to shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from neo_components.data.convert.engine import Records, Samples, by_record, convert, file_facts, in_parts
from neo_components.data.convert.llava import parse_record
from neo_components.data.shards.format import RawSample
from neo_components.data.skip_counts import SampleError, SkipCounts
from neo_components.data.text.conversation import check_conversation

ROLES = {"system": "system", "user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt"}
"""Who speaks in chat messages, and in conversations here."""


def texts_to_shards(
    source: str | PathLike[str],
    folder: str | PathLike[str],
    max_per_shard: int = 10_000,
    *,
    text: str = "text",
    question: str | None = None,
    workers: int = 0,
    title: str | None = None,
) -> SkipCounts:
    """Writes texts as shards.

    A record with ``conversations`` (LLaVA's form) or ``messages`` (``role`` and ``content``) keeps its turns. Of any
    other, the column ``text`` is learnt whole, as an answer to nothing or to the column ``question``.

    Args:
        source: ``.jsonl`` with one record per line, or ``.parquet``.
        folder: the new folder of shards.
        max_per_shard: records in one shard.
        text: column of what is learnt.
        question: column of what is asked, if any.
        workers: processes that write; 0 writes in this one.
        title: of the progress; ``None`` shows none.

    Returns:
        how many records were ``read``, ``kept`` (written), and ``skipped`` by reason.

    Raises:
        FileNotFoundError: if the file does not exist.
        FileExistsError: if the new folder holds something.
        ModuleNotFoundError: if it is Parquet and pyarrow is not installed.
        ValueError: if the file is of another kind, or no record can be used.
    """
    source = Path(source)
    if not source.is_file():
        raise FileNotFoundError(f"no such file: {source}")
    if source.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"texts are read from .jsonl or .parquet, got {source.name!r}")
    reader = _Reader(str(source), text, question)
    job = {**file_facts(source), "kind": "text", "size": max_per_shard, "columns": [text, question]}
    total = _count(source) if title else 0
    parts = in_parts(_records(source), max_per_shard)
    return convert(parts, reader, folder, job, workers=workers, title=title, total=total)


@dataclass
class _Reader:
    source: str
    text: str
    question: str | None

    def __call__(self, part: Records) -> Samples:
        return by_record(self.source, part, self._sample)

    def _sample(self, key: str, line: Any) -> RawSample:
        record = parse_record(line)
        turns = record.get("conversations")
        if turns is None and "messages" in record:
            turns = _from_messages(record["messages"])
        if turns is None:
            turns = self._turns(record)
        check_conversation(turns, 0)
        return {"key": key, "conversations": turns, "images": []}

    def _turns(self, record: dict[str, Any]) -> list[dict[str, str]]:
        wanted = [name for name in (self.question, self.text) if name is not None]
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


def _records(source: Path) -> Iterator[Any]:
    if source.suffix == ".jsonl":
        with source.open("rb") as lines:
            yield from (line for line in lines if line.strip())
        return
    for batch in _parquet(source).iter_batches(batch_size=1000):
        # As text, so that what is no JSON (dates, bytes) shows here and not when the shard is written.
        yield from (json.dumps(record, default=str).encode() for record in batch.to_pylist())


def _count(source: Path) -> int:
    if source.suffix == ".parquet":
        return int(_parquet(source).metadata.num_rows)
    with source.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


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

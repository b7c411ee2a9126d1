"""Makes shards of other data sets: in several processes, with a progress bar, and going on after an interruption.

What is to be converted comes in parts, each of which becomes one shard. A finished part leaves ``shard-N.tar`` and
``shard-N.json`` in ``FOLDER.part``; when the same conversion is started again, those are kept. At the end the index is
put together and the folder gets its name.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from neo_components.data.image.images import open_image
from neo_components.data.shards.format import FORMAT_VERSION, INDEX_NAME, RawSample, write_shard
from neo_components.data.skip_counts import SampleError, SkipCounts
from neo_components.storage.progress import progress

logger = logging.getLogger(__name__)

JOB = "job.json"

Samples = Iterator[tuple[str, Callable[[], RawSample]]]
"""Name of each record for messages, and what makes a sample of it or raises a ``SampleError``."""

Records = tuple[int, list[Any]]
"""The usual part: number of its first record in the data set, and the records."""


def convert(
    parts: Iterable[Any],
    samples: Callable[[Any], Samples],
    folder: str | PathLike[str],
    job: Mapping[str, Any],
    *,
    workers: int = 0,
    title: str | None = None,
    total: int = 0,
    count_parts: bool = False,
) -> SkipCounts:
    """Writes a folder of shards.

    Args:
        parts: each becomes a shard, unless it has no usable record; they must be small or cheap to read again.
        samples: reads a part, in the process that writes its shard; keys must be unique over all parts.
        folder: the new folder.
        job: plain values that tell this conversion from any other: only the same one goes on after an interruption.
        workers: processes that write; 0 writes in this one.
        title: of the progress; ``None`` shows none.
        total: records in all parts, or parts.
        count_parts: the progress counts parts instead of records.

    Returns:
        how many records were ``read``, ``kept`` (written), and ``skipped`` by reason.

    Raises:
        FileExistsError: if the new folder holds something.
        OSError: if a shard cannot be written, for example because the disk is full; what is finished is kept.
        ValueError: if no record can be used.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; remove it or write to another folder")
    part_folder = folder.with_name(folder.name + ".part")
    _open(part_folder, json.loads(json.dumps(job)))
    tally, reports = SkipCounts(), []
    with progress(title, total) as bar:
        for report in _run(parts, samples, part_folder, workers):
            for name, reason, message in report["faults"]:
                tally.skipped[reason] += 1
                logger.warning("skipped sample %s (%s): %s", name, reason, message)
            tally.read += report["read"]
            reports.append(report)
            bar.advance(1 if count_parts else report["read"], f"{tally.kept} written")
    if not tally.kept:
        shutil.rmtree(part_folder)
        reasons = tally.summary() or "it is empty"
        raise ValueError(f"{job.get('source', folder)} holds no usable record ({reasons}); the log names each")
    _finish(part_folder, folder, reports)
    return tally


def in_parts(records: Iterable[Any], size: int) -> Iterator[Records]:
    """Divides records into parts of ``size``.

    Raises:
        ValueError: if the size is not positive.
    """
    if size < 1:
        raise ValueError(f"max_per_shard must be at least 1, got {size}")
    left, first = iter(records), 0
    while some := list(islice(left, size)):
        yield first, some
        first += len(some)


def by_record(source: str, part: Records, make: Callable[[str, Any], RawSample]) -> Samples:
    """The samples of a part, one of each record, whose number in the source is its key.

    Args:
        source: for messages.
        part: from :func:`in_parts`.
        make: key and record to sample.
    """
    first, records = part
    for number, record in enumerate(records, first):
        yield f"{source}, record {number}", partial(make, f"{number:08d}", record)


def file_facts(path: Path) -> dict[str, Any]:
    """What tells a source file from a later version of it."""
    state = path.stat()
    return {"source": str(path.resolve()), "bytes": state.st_size, "changed": state.st_mtime_ns}


def read_image(path: Path, name: str) -> bytes:
    """The bytes of an image file whose header is good.

    Raises:
        SampleError: (a ``ValueError``) if there is none, or it is no image.
    """
    if not path.is_file():
        raise SampleError(f"no image {name!r} in {path.parent}", "missing_image")
    data = path.read_bytes()
    open_image(data, name)
    return data


def _open(part_folder: Path, job: Any) -> None:
    """Keeps what an interrupted conversion of the same kind had finished, and nothing else."""
    known = part_folder / JOB
    if known.is_file():
        try:
            same = json.loads(known.read_text(encoding="utf-8")) == job
        except ValueError:
            same = False
        if same:
            logger.info("going on with the conversion in %s", part_folder)
            return
    shutil.rmtree(part_folder, ignore_errors=True)
    part_folder.mkdir(parents=True)
    known.write_text(json.dumps(job), encoding="utf-8")


def _run(
    parts: Iterable[Any], samples: Callable[[Any], Samples], folder: Path, workers: int
) -> Iterator[dict[str, Any]]:
    """The report of each part, in order."""
    numbered = enumerate(parts)
    if workers < 1:
        yield from (_convert_part(number, part, samples, folder) for number, part in numbered)
        return
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting: deque[Future[dict[str, Any]]] = deque()
        for number, part in numbered:
            waiting.append(pool.submit(_convert_part, number, part, samples, folder))
            if len(waiting) > 2 * workers:  # parts are read as they are needed, not all at once
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _convert_part(number: int, part: Any, samples: Callable[[Any], Samples], folder: Path) -> dict[str, Any]:
    """Writes the shard of one part, or finds it done."""
    path, done = folder / f"shard-{number:06d}.tar", folder / f"shard-{number:06d}.json"
    if done.is_file():
        report: dict[str, Any] = json.loads(done.read_bytes())
        return report
    report = {"name": path.name, "read": 0, "faults": []}

    def usable() -> Iterator[RawSample]:
        for name, make in samples(part):
            report["read"] += 1
            try:
                yield make()
            except SampleError as error:
                report["faults"].append((name, error.reason, str(error)))

    try:
        report["rows"] = write_shard(path, usable(), set())
        if not report["rows"]:
            path.unlink()
        writing = done.with_suffix(".writing")
        writing.write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
        writing.replace(done)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}); make room and start the same conversion again, it "
            "goes on where it stopped"
        ) from None
    return report


def _finish(part_folder: Path, folder: Path, reports: list[dict[str, Any]]) -> None:
    """Puts the index together and gives the folder its name."""
    full = [report for report in reports if report["rows"]]
    shards = [{"name": r["name"], "bytes": (part_folder / r["name"]).stat().st_size} for r in full]
    rows = [
        {"key": row["key"], "shard": shard, **{name: value for name, value in row.items() if name != "key"}}
        for shard, report in enumerate(full)
        for row in report["rows"]
    ]
    twice = [key for key, count in Counter(row["key"] for row in rows).items() if count > 1]
    assert not twice, twice
    index = {"format_version": FORMAT_VERSION, "shards": shards, "samples": rows}
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
    (part_folder / INDEX_NAME).write_text(text, encoding="utf-8")
    for report in reports:
        (part_folder / report["name"]).with_suffix(".json").unlink()
    (part_folder / JOB).unlink()
    if folder.exists():
        folder.rmdir()
    part_folder.rename(folder)

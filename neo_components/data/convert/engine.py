"""Writes the samples of a converter as shards: in several processes, with a progress bar, resuming an interrupted run.

The records are cut into parts; each part becomes one shard. A finished part leaves ``shard-N.tar`` and ``shard-N.json``
in ``FOLDER.part``; when the same conversion is started again, it keeps those. At the end the engine assembles the index
and renames the folder.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from neo_components.data.convert.base import Converter
from neo_components.data.image.files import open_image
from neo_components.data.shards.format import FORMAT_VERSION, INDEX_NAME, RawSample, write_shard
from neo_components.data.skip_counts import SampleError, SkipCounts
from neo_components.data.text.turns import check_conversation
from neo_components.registry import CONVERTERS, Choice
from neo_components.storage.progress import progress

logger = logging.getLogger(__name__)

JOB = "job.json"

Part = tuple[int, list[Any]]
"""Number of a part's first record in the data set, and its records."""


def convert_to_shards(
    converter: Converter | Choice,
    folder: str | PathLike[str],
    *,
    shard_size: int | None = None,
    workers: int = 0,
    title: str | None = None,
) -> SkipCounts:
    """Converts a data set into a folder of shards.

    An interrupted conversion continues when it is started again with the same arguments.

    Args:
        converter: a :class:`~neo_components.data.convert.base.Converter`, or its registered name with its options:
            ``{"kind": "llava", "conversations": "data.json", "images": "images"}``.
        folder: the new folder.
        shard_size: records in one shard; ``None`` is the converter's own choice.
        workers: processes that write; 0 writes in this one.
        title: of the progress bar; ``None`` shows none.

    Returns:
        how many samples were ``read``, ``kept`` (written), and ``skipped`` by reason.

    Raises:
        FileExistsError: if the new folder is not empty.
        FileNotFoundError: if a source does not exist.
        OSError: if a shard cannot be written, for example because the disk is full; finished shards are kept.
        ValueError: if the name or an option is unknown, the source is of another format, two samples have the same key,
            or no record can be used.
    """
    reader: Converter = converter if isinstance(converter, Converter) else CONVERTERS.make(converter)
    size = reader.shard_size if shard_size is None or reader.fixed_size else shard_size
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; remove it or write to another folder")
    part_folder = folder.with_name(folder.name + ".part")
    parts = in_parts(reader.records(), size)
    _open(part_folder, {**reader.identity(), "size": size})
    counts, reports = SkipCounts(), []
    with progress(title, reader.total() if title else 0) as bar:
        for report in _run(reader, parts, part_folder, workers):
            for name, reason, message in report["faults"]:
                counts.skipped[reason] += 1
                logger.warning("skipped sample %s (%s): %s", name, reason, message)
            counts.read += report["read"]
            reports.append(report)
            bar.advance(report["records"], f"{counts.kept} written")
    if not counts.kept:
        shutil.rmtree(part_folder)
        source = ", ".join(map(str, reader.sources)) or type(reader).__name__
        raise ValueError(f"{source} holds no usable record ({counts.summary() or 'it is empty'}); the log names each")
    _finish(part_folder, folder, reports)
    return counts


def in_parts(records: Iterable[Any], size: int) -> Iterator[Part]:
    """Divides records into parts of ``size``.

    Raises:
        ValueError: if the size is not positive.
    """
    if size < 1:
        raise ValueError(f"shard_size must be at least 1, got {size}")
    left, first = iter(records), 0
    while some := list(islice(left, size)):
        yield first, some
        first += len(some)


def _open(part_folder: Path, job: Any) -> None:
    """Keeps the finished parts of an interrupted conversion if it is the same one; otherwise starts with nothing."""
    known = part_folder / JOB
    if known.is_file():
        try:
            same = json.loads(known.read_text(encoding="utf-8")) == job
        except ValueError:
            same = False
        if same:
            logger.info("continuing the conversion in %s", part_folder)
            return
    shutil.rmtree(part_folder, ignore_errors=True)
    part_folder.mkdir(parents=True)
    known.write_text(json.dumps(job), encoding="utf-8")


def _run(converter: Converter, parts: Iterable[Part], folder: Path, workers: int) -> Iterator[dict[str, Any]]:
    """The report of each part, in order."""
    numbered = enumerate(parts)
    if workers < 1:
        yield from (_convert_part(number, part, converter, folder) for number, part in numbered)
        return
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting: deque[Future[dict[str, Any]]] = deque()
        for number, part in numbered:
            waiting.append(pool.submit(_convert_part, number, part, converter, folder))
            if len(waiting) > 2 * workers:  # parts are read as they are needed, not all at once
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _convert_part(number: int, part: Part, converter: Converter, folder: Path) -> dict[str, Any]:
    """Writes the shard of one part, or finds it finished; returns what happened to its records."""
    path, done = folder / f"shard-{number:06d}.tar", folder / f"shard-{number:06d}.json"
    if done.is_file():
        report: dict[str, Any] = json.loads(done.read_bytes())
        return report
    first, records = part
    report = {"name": path.name, "records": len(records), "read": 0, "faults": []}
    try:
        report["samples"] = write_shard(path, _usable(converter, first, records, report), set())
        if not report["samples"]:
            path.unlink()
        writing = done.with_suffix(".writing")
        writing.write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
        writing.replace(done)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}); make room and start the same conversion again, it "
            "continues where it stopped"
        ) from None
    return report


def _usable(converter: Converter, first: int, records: list[Any], report: dict[str, Any]) -> Iterator[RawSample]:
    """The samples of a part; the report takes note of those that cannot be used."""
    for number, record in enumerate(records, first):
        for name, make in converter.samples(number, record):
            report["read"] += 1
            try:
                sample = _checked(make())
            except SampleError as error:
                report["faults"].append((name, error.reason, str(error)))
            except OSError as error:
                raise ValueError(
                    f"{name} cannot be read ({error}); start the same conversion again when it can, it continues there"
                ) from error
            else:
                yield sample


def _checked(sample: RawSample) -> RawSample:
    """A sample with the bytes of its images.

    Raises:
        SampleError: (a ``ValueError``) if its conversation or an image cannot be used.
    """
    images = list(sample.get("images") or ())
    frames = sample.get("frames")  # of videos, which have one tag each
    check_conversation(sample.get("conversations", ()), len(frames if isinstance(frames, list) else images))
    return {**sample, "images": [_image_bytes(image, number) for number, image in enumerate(images)]}


def _image_bytes(image: str | Path | bytes, number: int) -> bytes:
    """The bytes of an image whose header is valid."""
    if isinstance(image, bytes):
        open_image(image, f"image {number}")
        return image
    path = Path(image)
    if not path.is_file():
        raise SampleError(f"no image {path.name!r} in {path.parent}", "missing_image")
    data = path.read_bytes()
    open_image(data, path.name)
    return data


def _finish(part_folder: Path, folder: Path, reports: list[dict[str, Any]]) -> None:
    """Assembles the index and renames the folder.

    Raises:
        ValueError: if two samples have the same key.
    """
    full = [report for report in reports if report["samples"]]
    shards = [{"name": r["name"], "bytes": (part_folder / r["name"]).stat().st_size} for r in full]
    samples = [
        {"key": sample["key"], "shard": shard, **{name: value for name, value in sample.items() if name != "key"}}
        for shard, report in enumerate(full)
        for sample in report["samples"]
    ]
    twice = [key for key, count in Counter(sample["key"] for sample in samples).items() if count > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} is used twice; the keys that a converter gives must be unique")
    index = {"format_version": FORMAT_VERSION, "shards": shards, "samples": samples}
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
    (part_folder / INDEX_NAME).write_text(text, encoding="utf-8")
    for report in reports:
        (part_folder / report["name"]).with_suffix(".json").unlink()
    (part_folder / JOB).unlink()
    if folder.exists():
        folder.rmdir()
    part_folder.rename(folder)

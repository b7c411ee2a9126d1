"""From a LLaVA-style JSON or JSONL file and its images or videos to shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from neo_components.data.convert.engine import Records, Samples, by_record, convert, file_facts, in_parts, read_image
from neo_components.data.convert.video import read_frames
from neo_components.data.shards.format import RawSample
from neo_components.data.skip_counts import SampleError, SkipCounts
from neo_components.data.text.conversation import IMAGE_TAG, check_conversation

VIDEO_TAG = "<video>"


def llava_to_shards(
    source: str | PathLike[str],
    image_folder: str | PathLike[str] | None,
    folder: str | PathLike[str],
    max_per_shard: int = 10_000,
    *,
    workers: int = 0,
    frames: int | None = 8,
    fps: float | None = None,
    title: str | None = None,
) -> SkipCounts:
    """Writes a LLaVA-style data set as shards.

    Each record is ``{"id": ..., "image": "a.jpg" | ["a.jpg", ...], "conversations": [...]}``; ``image`` is missing for
    text alone. ``video`` instead of ``image`` names a video file or a folder of frames, which stands behind one
    ``<video>`` or ``<image>`` tag. ``id`` and any further values are kept in the sample's JSON. Records that cannot be
    learnt from (no JSON, a missing or unreadable image, more or fewer ``<image>`` tags than images, no answer) are left
    out, counted and named in the log. Pixels of images are not decoded here, so a truncated one shows in training only.

    An interrupted conversion goes on when it is started again.

    Args:
        source: ``.jsonl`` with one record per line, or ``.json`` with a list of records.
        image_folder: images and videos are looked up here; ``None`` if there are none.
        folder: the new folder of shards.
        max_per_shard: records in one shard.
        workers: processes that write; 0 writes in this one.
        frames: frames of each video, evenly spaced; see :func:`~neo_components.data.convert.video.read_frames`.
        fps: frames per second of a video file instead.
        title: of the progress; ``None`` shows none.

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
    reader = _Reader(str(source), images, frames, fps)
    job = {**file_facts(source), "kind": "llava", "size": max_per_shard, "reader": repr(asdict(reader))}
    parts = in_parts(records_of(source), max_per_shard)
    total = count_records(source) if title else 0
    return convert(parts, reader, folder, job, workers=workers, title=title, total=total)


def records_of(source: Path) -> Iterator[Any]:
    """Records of a JSON list, or the lines of JSONL as bytes.

    Raises:
        ValueError: if the file is no list of records.
    """
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


def count_records(source: Path) -> int:
    """Number of the records, for the progress."""
    return sum(1 for _ in records_of(source))


def parse_record(record: Any) -> dict[str, Any]:
    """A record from its line.

    Raises:
        SampleError: (a ``ValueError``) if it is no object.
    """
    if isinstance(record, bytes):
        try:
            record = json.loads(record)
        except ValueError as error:
            raise SampleError(f"no JSON ({error})", "json") from None
    if not isinstance(record, dict):
        raise SampleError(f"a record must be an object, got {type(record).__name__}", "json")
    return record


@dataclass
class _Reader:
    """Makes samples of a part."""

    source: str
    images: Path | None
    frames: int | None
    fps: float | None

    def __call__(self, part: Records) -> Samples:
        return by_record(self.source, part, self._sample)

    def _sample(self, key: str, line: Any) -> RawSample:
        record = parse_record(line)
        names, videos = _names(record, "image"), _names(record, "video")
        if names and videos:
            raise SampleError("a record has images or videos, not both", "images")
        turns = record.get("conversations", ())
        if videos:
            turns = _as_images(turns)
        check_conversation(turns, len(names) + len(videos))
        extra = {name: value for name, value in record.items() if name not in _OWN}
        if videos:
            clips = [read_frames(self._path(name), self.frames, self.fps) for name in videos]
            files = [frame for clip in clips for frame in clip]
            extra["frames"] = [len(clip) for clip in clips]
        else:
            files = [read_image(self._path(name), name) for name in names]
        return {**extra, "key": key, "conversations": turns, "images": files}

    def _path(self, name: str) -> Path:
        if self.images is None:
            raise SampleError(f"no image {name!r}: no image folder was given", "missing_image")
        return self.images / name


_OWN = ("image", "video", "image_sizes", "frames", "conversations", "images", "key", "__key__")


def _names(record: dict[str, Any], kind: str) -> list[str]:
    names = record.get(kind) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SampleError(f"{kind!r} must be a name or a list of names, got {names!r:.100}", "images")
    return names


def _as_images(turns: Any) -> Any:
    """Turns whose ``<video>`` tags are ``<image>`` tags; the frames of a video stand behind one."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    return [
        {**turn, "value": turn["value"].replace(VIDEO_TAG, IMAGE_TAG)} if isinstance(turn.get("value"), str) else turn
        for turn in turns
    ]

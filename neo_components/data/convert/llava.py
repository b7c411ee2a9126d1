"""LLaVA-style JSON or JSONL with its images or videos."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neo_components.data.convert.base import Converter, check_folder, image_path, parse_record, read_lines
from neo_components.data.convert.video import check_rate, read_frames
from neo_components.data.shards.format import RawSample
from neo_components.data.skip_counts import SampleError
from neo_components.data.text.turns import IMAGE_TAG
from neo_components.registry import CONVERTERS

VIDEO_TAG = "<video>"

_OWN = ("image", "video", "image_sizes", "frames", "conversations", "images", "key", "__key__")


@CONVERTERS.register("llava")
@dataclass
class Llava(Converter):
    """Convert LLaVA-style conversations with images or videos into shards.

    Each record is ``{"id": ..., "image": "a.jpg" | ["a.jpg", ...], "conversations": [...]}``; a record of text alone
    has no ``image``. ``video`` instead of ``image`` names a video file or a folder of frames, which stands behind one
    ``<video>`` or ``<image>`` tag. ``id`` and any further values are kept in the sample's JSON.

    Args:
        conversations: LLaVA-style JSON file with a list of records, or JSONL file with one record per line.
        images: Folder that the names of images and videos are relative to.
        frames: Frames of each video, evenly spaced.
        fps: Frames per second of each video file instead.

    Raises:
        FileNotFoundError: if the file or the folder does not exist.
        ValueError: if a number is not positive.
    """

    conversations: Path
    images: Path | None = None
    frames: int = 8
    fps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder(self.images, "images")
        check_rate(self.frames, self.fps)

    def records(self) -> Iterator[Any]:
        """The records of a JSON list, or the lines of JSONL as bytes.

        Raises:
            ValueError: if the file is no list of records.
        """
        source = self.conversations
        if source.suffix == ".jsonl":
            yield from read_lines(source)
            return
        try:
            records = json.loads(source.read_bytes())
        except ValueError as error:
            raise ValueError(f"{source} is no JSON ({error}); name it .jsonl if it has one record per line") from None
        if not isinstance(records, list):
            raise ValueError(f"{source} must hold a list of records, got {type(records).__name__}")
        yield from records

    def sample(self, record: Any) -> RawSample:
        """See :meth:`Converter.sample`; pixels are not decoded, so a truncated image shows in training only."""
        record = parse_record(record)
        names, videos = _names(record, "image"), _names(record, "video")
        if names and videos:
            raise SampleError("a record has images or videos, not both", "images")
        sample = {name: value for name, value in record.items() if name not in _OWN}
        sample["conversations"] = record.get("conversations", ())
        sample["images"] = [image_path(self.images, name) for name in names]
        if videos:
            sample["conversations"] = _with_image_tags(sample["conversations"])
            clips = [read_frames(image_path(self.images, name), self.frames, self.fps) for name in videos]
            sample["images"] = [frame for clip in clips for frame in clip]
            sample["frames"] = [len(clip) for clip in clips]
        return sample


def _names(record: dict[str, Any], kind: str) -> list[str]:
    names = record.get(kind) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SampleError(f"{kind!r} must be a name or a list of names, got {names!r:.100}", "images")
    return names


def _with_image_tags(turns: Any) -> Any:
    """Turns whose ``<video>`` tags are ``<image>`` tags; the frames of a video stand behind one."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    return [
        {**turn, "value": turn["value"].replace(VIDEO_TAG, IMAGE_TAG)} if isinstance(turn.get("value"), str) else turn
        for turn in turns
    ]

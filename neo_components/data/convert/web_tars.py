"""From webdataset tars of image-text pairs, as img2dataset writes them, to shards.

Each sample has an image (``KEY.jpg``, ``png``, ``webp``) and its caption in ``KEY.txt``, or in ``KEY.json`` under
``caption`` or ``text``. A ``KEY.json`` with ``conversations`` is taken as it is. Nothing is unpacked to disk.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from neo_components.data.convert.captions import caption_sample
from neo_components.data.convert.engine import Samples, convert, file_facts
from neo_components.data.image.images import open_image
from neo_components.data.shards.format import RawSample, check_end, image_order, member_end, shard_files, split_member
from neo_components.data.skip_counts import SampleError, SkipCounts
from neo_components.data.text.conversation import check_conversation

Part = tuple[int, Path]
Members = dict[str, bytes]


def tars_to_shards(
    source: str | PathLike[str],
    folder: str | PathLike[str],
    *,
    prompt: str = "",
    workers: int = 0,
    title: str | None = None,
) -> SkipCounts:
    """Writes each tar of a folder as one shard.

    Args:
        source: folder of ``*.tar``.
        folder: the new folder of shards.
        prompt: text behind each image, for example a request to describe it.
        workers: processes that write; 0 writes in this one.
        title: of the progress; ``None`` shows none.

    Returns:
        how many samples were ``read``, ``kept`` (written), and ``skipped`` by reason; the rest of a damaged tar is one.

    Raises:
        FileNotFoundError: if there are no tars.
        FileExistsError: if the new folder holds something.
        ValueError: if a tar holds a pickle or a path that leads out of it, or nothing can be used.
    """
    files = shard_files(source)
    job = {"source": str(source), "kind": "webdataset", "prompt": prompt, "files": [file_facts(file) for file in files]}
    parts = enumerate(files)
    return convert(
        parts, _Reader(prompt), folder, job, workers=workers, title=title, total=len(files), count_parts=True
    )


@dataclass
class _Reader:
    prompt: str

    def __call__(self, part: Part) -> Samples:
        number, path = part
        for place, (key, members) in enumerate(_groups(path)):
            name = f"{path}, {key}"
            if isinstance(members, SampleError):
                yield name, partial(_fail, members)
            else:
                yield name, partial(self._sample, f"{number:06d}{place:08d}", key, members)

    def _sample(self, key: str, name: str, members: Members) -> RawSample:
        images = [members[suffix] for suffix in image_order(name, [s for s in members if s not in ("txt", "json")])]
        record = _record(members.get("json"))
        for number, data in enumerate(images):
            open_image(data, f"image {number}")
        if "conversations" in record:
            check_conversation(record["conversations"], len(images))
            extra = {n: v for n, v in record.items() if n not in ("key", "__key__", "images", "image_sizes", "id")}
            return {"id": name, **extra, "key": key, "images": images}
        if len(images) != 1:
            raise SampleError(f"a caption needs one image, found {len(images)}", "missing_image")
        text = (
            members["txt"].decode("utf-8", "replace") if "txt" in members else record.get("caption", record.get("text"))
        )
        if not isinstance(text, str):
            raise SampleError("no caption: neither KEY.txt, nor caption or text in KEY.json", "caption")
        return caption_sample(key, text.strip(), self.prompt, images[0], id=name)


def _record(content: bytes | None) -> dict[str, Any]:
    if content is None:
        return {}
    try:
        record = json.loads(content)
    except ValueError as error:
        raise SampleError(f"no JSON ({error})", "json") from None
    return record if isinstance(record, dict) else {}


def _fail(error: SampleError) -> RawSample:
    raise error


def _groups(path: Path) -> Iterator[tuple[str, Members | SampleError]]:
    """Neighbouring files of one key, by suffix; a fault where the tar is damaged, which ends it."""
    key, members, end = "", Members(), 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member_end(member)
                if not member.isreg() or (parts := split_member(member.name, also=("txt",))) is None:
                    continue
                if parts[0] != key and members:
                    yield key, members
                    members = {}
                key = parts[0]
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                if len(data) < member.size:
                    raise tarfile.ReadError("unexpected end of data")
                members[parts[1]] = data
        if members:
            yield key, members
        check_end(path, end)
    except (tarfile.TarError, EOFError) as error:
        yield key or "the first sample", SampleError(f"the tar is damaged from here on ({error})", "truncated")

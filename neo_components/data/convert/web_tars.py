"""Webdataset tars of image-text pairs, as img2dataset writes them.

Each sample has an image (``KEY.jpg``, ``png``, ``webp``) and its caption in ``KEY.txt``, or in ``KEY.json`` under
``caption`` or ``text``. A ``KEY.json`` with ``conversations`` is taken as it is. Nothing is unpacked to disk.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from neo_components.data.convert.base import Converter, Samples, file_facts
from neo_components.data.convert.captions import caption_turns
from neo_components.data.shards.format import RawSample, check_end, image_order, member_end, shard_files, split_member
from neo_components.data.skip_counts import SampleError
from neo_components.registry import CONVERTERS

Members = dict[str, bytes]


@CONVERTERS.register("webdataset")
@dataclass
class WebTars(Converter):
    """Convert image-text tars (jpg with txt or json) into shards, one for each tar.

    Args:
        tars: Folder of image-text tars, as img2dataset writes them.
        prompt: Text behind each image, for example a request to describe it.

    Raises:
        FileNotFoundError: if there are no tars.
    """

    shard_size = 1
    fixed_size = True
    tars: Path
    prompt: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        shard_files(self.tars)

    def records(self) -> list[Path]:
        """The tars."""
        return shard_files(self.tars)

    def identity(self) -> dict[str, Any]:
        """See :meth:`Converter.identity`; every tar counts."""
        return {**super().identity(), "tars": [file_facts(file) for file in self.records()]}

    def samples(self, number: int, record: Path) -> Samples:
        """The samples of a tar; what follows damaged bytes counts as one that cannot be used.

        Raises:
            ValueError: if the tar holds a pickle or a path that leads out of it.
        """
        for position, (key, members) in enumerate(_groups(record)):
            make = partial(_sample, f"{number:06d}{position:08d}", key, members, self.prompt)
            yield f"{record}, {key}", make


def _sample(key: str, name: str, members: Members | SampleError, prompt: str) -> RawSample:
    if isinstance(members, SampleError):
        raise members
    images = [members[suffix] for suffix in image_order(name, [s for s in members if s not in ("txt", "json")])]
    record = _record(members.get("json"))
    if "conversations" in record:
        extra = {n: v for n, v in record.items() if n not in ("key", "__key__", "images", "image_sizes", "id")}
        return {"id": name, **extra, "key": key, "images": images}
    if len(images) != 1:
        raise SampleError(f"a caption needs one image, found {len(images)}", "missing_image")
    text = members["txt"].decode("utf-8", "replace") if "txt" in members else record.get("caption", record.get("text"))
    if not isinstance(text, str):
        raise SampleError("no caption: neither KEY.txt, nor caption or text in KEY.json", "caption")
    return {"id": name, "key": key, "conversations": caption_turns(text.strip(), prompt), "images": images}


def _record(content: bytes | None) -> dict[str, Any]:
    if content is None:
        return {}
    try:
        record = json.loads(content)
    except ValueError as error:
        raise SampleError(f"no JSON ({error})", "json") from None
    return record if isinstance(record, dict) else {}


def _groups(path: Path) -> Iterator[tuple[str, Members | SampleError]]:
    """Neighboring files of one key, by suffix; a fault where the tar is damaged, which ends it."""
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

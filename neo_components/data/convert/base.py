"""What a converter is: a reader of another data format, one file and one registration.

A converter is a dataclass whose fields are its options, derived from :class:`Converter`. It yields records and makes a
sample of each; :func:`~neo_components.data.convert.engine.convert_to_shards` writes, counts and resumes. The fields are
also the options of its command ``neo data NAME``: a field without default is an argument, and the docstring's ``Args``
section is the help. ``docs/own_data.md`` shows a complete one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

from neo_components.data.shards.format import RawSample
from neo_components.data.skip_counts import SampleError

Samples = Iterator[tuple[str, Callable[[], RawSample]]]
"""The name of each sample for messages, and a function that makes it or raises a ``SampleError``."""


@dataclass
class Converter:
    """Base class of converters.

    A field that is a ``Path`` names a file or folder that is read; text given for it becomes a ``Path``.

    Attributes:
        shard_size: records in one shard unless the caller chooses otherwise.
        fixed_size: True if the caller cannot choose.

    Raises:
        FileNotFoundError: if there is no file or folder at a path.
    """

    shard_size: ClassVar[int] = 10_000
    fixed_size: ClassVar[bool] = False

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str | Path) and Path in (hints[field.name], *get_args(hints[field.name])):
                setattr(self, field.name, path := Path(value))
                if not path.exists():
                    raise FileNotFoundError(f"{field.name}: no such file or folder: {path}")

    def records(self) -> Iterable[Any]:
        """Yields the records in the order of the data set; they go to other processes, so they are small or cheap.

        Raises:
            ValueError: if the source is of another format.
        """
        raise NotImplementedError(f"{type(self).__name__} must define records()")

    def sample(self, record: Any) -> RawSample:
        """Makes the sample of a record, in the process that writes its shard.

        Returns:
            ``conversations``, ``images`` (the path of each file or its bytes) and further plain values. ``key`` is the
            number of the record unless it is given; keys are unique over the data set. The engine checks that
            conversation and images can be used.

        Raises:
            SampleError: (a ``ValueError``) if the record cannot be used: it is skipped, counted and named in the log.
        """
        raise NotImplementedError(f"{type(self).__name__} must define sample()")

    def samples(self, number: int, record: Any) -> Samples:
        """Yields the samples of a record; to be overridden where it has several.

        Args:
            number: of the record in the data set.
            record: from :meth:`records`.
        """
        yield (
            f"{self.sources[0] if self.sources else type(self).__name__}, record {number}",
            partial(self._keyed, number, record),
        )

    def _keyed(self, number: int, record: Any) -> RawSample:
        return {"key": f"{number:08d}", **self.sample(record)}

    def total(self) -> int:
        """Number of the records, for the progress bar."""
        return sum(1 for _ in self.records())

    @property
    def sources(self) -> list[Path]:
        """The files and folders that are read."""
        return [value for field in fields(self) if isinstance(value := getattr(self, field.name), Path)]

    def identity(self) -> dict[str, Any]:
        """What distinguishes this conversion from others, in plain values: only the same one is resumed."""
        options = {field.name: repr(getattr(self, field.name)) for field in fields(self)}
        files = [file_facts(path) for path in self.sources]
        return {"converter": f"{type(self).__module__}.{type(self).__qualname__}", "options": options, "files": files}


def file_facts(path: Path) -> dict[str, Any]:
    """What distinguishes a source file from a later version of it."""
    state = path.stat()
    return {"source": str(path.resolve()), "bytes": state.st_size, "changed": state.st_mtime_ns}


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a JSONL file that are not empty."""
    with path.open("rb") as lines:
        yield from (line for line in lines if line.strip())


def parse_record(record: Any) -> dict[str, Any]:
    """The JSON object of a line.

    Args:
        record: a line as bytes; an object is returned as it is.

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


def check_folder(folder: Path | None, option: str) -> None:
    """Checks that an option names a folder, if it is given.

    Raises:
        FileNotFoundError: if it is a file.
    """
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"{option}: no such folder: {folder}")


def image_path(folder: Path | None, name: str) -> Path:
    """Path of an image in the folder of images.

    Raises:
        SampleError: (a ``ValueError``) if no folder was given.
    """
    if folder is None:
        raise SampleError(f"no image {name!r}: no image folder was given", "missing_image")
    return folder / name

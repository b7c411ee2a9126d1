"""What benchmarks/reuse.py keeps: a file of JSON lines, one for each arm or probe that is done.

Several processes may append to one file, and one that is killed may leave a line unfinished: that one is left out when
the file is read, so its arm or probe is run again.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


def read(file: Path, kind: type[T]) -> list[T]:
    """What is done, of a dataclass; nothing if there is no file.

    Raises:
        ValueError: if a line has other fields.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else [], 1):
        try:
            values = json.loads(line or "null")
        except json.JSONDecodeError:
            log.warning("%s, line %d: left out, as it is unfinished", file, number)
            continue
        try:
            found += [kind(**values)] if values is not None else []
        except TypeError as error:
            raise ValueError(
                f"{file}, line {number}, is of another version of this benchmark ({error}); choose another --root"
            ) from error
    return found


def add(file: Path, done: Any) -> None:
    """Appends a line, in one write, and ends an unfinished one before it."""
    line = (json.dumps(asdict(done)) + "\n").encode()
    with file.open("ab") as stream:
        stream.write(line if _ended(file) else b"\n" + line)


def _ended(file: Path) -> bool:
    with file.open("rb") as stream:
        if not stream.seek(0, 2):
            return True
        stream.seek(-1, 2)
        return stream.read(1) == b"\n"

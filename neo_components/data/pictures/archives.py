"""Unpacks archives of Debian, npm and PyPI with Python's own libraries; nothing is written outside the folder."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MAX_BYTES = 1 << 30
"""No package is larger than this when unpacked."""

Member = tuple[str, bytes]
_DAMAGE = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError,
    RuntimeError,  # of encrypted members
)  # fmt: skip


def unpack(archive: Path, folder: Path, root: str = "") -> None:
    """Writes the regular files of an archive; links and devices are left out.

    Args:
        archive: a ``.deb``, ``.tgz`` or ``.whl``.
        folder: written into.
        root: folder of the archive whose files are kept.

    Raises:
        ValueError: if the archive is damaged, too large, of another format, or a path leads out of the folder.
    """
    readers = {".deb": _deb, ".tgz": _tar, ".whl": _zip}
    if archive.suffix not in readers:
        raise ValueError(f"{archive} must end in one of {', '.join(readers)}")
    total = 0
    try:
        for name, data in readers[archive.suffix](archive):
            path = _inside(name, root, archive)
            if path is None:
                continue
            if (total := total + len(data)) > MAX_BYTES:
                raise ValueError(f"{archive} unpacks to more than {MAX_BYTES} bytes; it is refused")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
    except _DAMAGE as error:
        raise ValueError(f"{archive} is damaged ({error}); remove it and fetch it again") from None
    if not total:
        raise ValueError(f"{archive} holds no file in {root or 'it'}")


def _inside(name: str, root: str, archive: Path) -> PurePosixPath | None:
    """The path of a member below ``root``; ``None`` if it is not in there."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"{archive} holds {name!r}, whose path leads out of the archive; it is refused")
    return path.relative_to(root) if path.is_relative_to(root) else None


def _check_size(archive: Path | io.BytesIO, size: int) -> None:
    """Before a member is read, so that none fills the memory."""
    if size > MAX_BYTES:
        where = archive if isinstance(archive, Path) else "the archive"
        raise ValueError(f"{where} holds a file of {size} bytes, more than {MAX_BYTES}; it is refused")


def _tar(archive: Path | io.BytesIO) -> Iterator[Member]:
    with tarfile.open(
        name=archive if isinstance(archive, Path) else None,
        fileobj=archive if isinstance(archive, io.BytesIO) else None,
    ) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() else None
            if file is not None:
                _check_size(archive, member.size)
                yield member.name, file.read()


def _zip(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as files:
        for info in files.infolist():
            if not info.is_dir():
                _check_size(archive, info.file_size)
                yield info.filename, files.read(info)


def _deb(archive: Path) -> Iterator[Member]:
    """The files of ``data.tar.xz`` in an ar archive: a magic line, then 60 bytes of header before each member."""
    data = archive.read_bytes()
    if not data.startswith(b"!<arch>\n"):
        raise ValueError(f"{archive} is no Debian package: it must begin with '!<arch>'")
    at = 8
    while at + 60 <= len(data):
        name, size = data[at : at + 16].decode("ascii", "replace").strip(" /"), data[at + 48 : at + 58]
        if not size.strip().isdigit():
            raise ValueError(f"{archive} is damaged: member {name!r} has no size")
        body = data[at + 60 : at + 60 + int(size)]
        if name.startswith("data.tar"):
            if not name.endswith((".xz", ".gz", ".tar")):
                raise ValueError(f"{archive} holds {name}; only data.tar.xz and data.tar.gz can be read")
            yield from _tar(io.BytesIO(body))
            return
        at += 60 + int(size) + int(size) % 2
    raise ValueError(f"{archive} holds no data.tar")

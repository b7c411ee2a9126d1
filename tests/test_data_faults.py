"""Data that goes bad under a run: skipped and counted, or a clear stop; never a hang, never a missing step."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from llm_builders import native_model, text_llm
from shard_builders import mixed_samples, module, png, raw_samples, sample, take, tar, truncated_png, write

from neo_components.data import NEODataModule
from neo_components.data.packed import BatchMaker
from neo_components.data.samples import SampleMaker
from neo_components.data.shards.folder import ShardFolder, ShardGoneError
from neo_components.data.skip_counts import TooManySkippedError

OPTIONS = {"seq_len": 128, "max_skipped": 1.0}


def steps(data: NEODataModule, count: int) -> list[list[str]]:
    """Keys of each of the next batches."""
    return [[key for sequence in batch.keys for key in sequence] for batch in take(data, count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_decoded_leaves_its_place_empty(workers: int, tmp_path: Path) -> None:
    """The other samples come in the same steps as if it were good."""
    good = {f"s{n:03d}": [png()] for n in range(40)}
    tar(tmp_path / "good" / "shard-000000.tar", raw_samples(good))
    # The same lengths, but the pixels of one in ten end early.
    bad = {key: [truncated_png()] if n % 10 == 0 else images for n, (key, images) in enumerate(good.items())}
    tar(tmp_path / "bad" / "shard-000000.tar", raw_samples(bad))
    whole = steps(module(tmp_path / "good", **OPTIONS), 40)
    data = module(tmp_path / "bad", workers=workers, **OPTIONS)
    left = steps(data, 40)
    lost = [key for before, now in zip(whole, left, strict=True) for key in before if key not in now]
    assert {int(key[1:]) % 10 for key in lost} == {0} and len(lost) > 4
    assert [[key for key in step if int(key[1:]) % 10] for step in whole] == left
    assert data.describe()["train"]["skipped"] == {"truncated": len(lost)}


def test_a_row_of_nothing_but_bad_samples_is_padding(tmp_path: Path) -> None:
    tar(tmp_path / "shard-000000.tar", raw_samples({f"s{n}": [truncated_png()] for n in range(5)}))
    data = module(tmp_path, **OPTIONS)
    for batch in take(data, 3):
        assert batch.keys == [[]] and (batch.labels == -100).all() and len(batch.patches) == 0
    with pytest.raises(TooManySkippedError, match=r"\d+ of \d+ samples had to be skipped \(truncated: \d+\)"):
        take(module(tmp_path, **{**OPTIONS, "max_skipped": 0.5}), 100)
    # Every parameter takes part all the same: with an absent gradient one rank would leave the others waiting.
    model = native_model(text_llm(tmp_path / "llm"))
    padding = BatchMaker([], SampleMaker(data.tokenizer, model.input_spec, 4096, 4096), 64).batch([])[0]
    loss = model.loss(padding)
    loss.backward()
    assert loss.item() == 0
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_changes_under_the_run(workers: int, tmp_path: Path) -> None:
    """Its samples have other lengths than planned: they are skipped and counted, and too many stop the run."""
    folder = write(tmp_path / "shards", [sample(f"s{n:02d}", answer="It is the red one.") for n in range(30)])
    data = module(folder, workers=workers, **OPTIONS)
    take(data, 2)
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes().replace(b"It is the red one.", b"Zq#0 %x ]|9 ~~ &@!"))
    found = steps(data, 20)
    assert data.describe()["train"]["skipped"].keys() == {"changed"}
    assert not {key for step in found[2:] for key in step} & {f"s{n}" for n in range(10, 20)}
    again = module(folder, **{**OPTIONS, "max_skipped": 0.1})
    with pytest.raises(TooManySkippedError, match="changed"):
        take(again, 100)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_ends_early_or_is_gone(workers: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", mixed_samples(40))
    data = module(folder, workers=workers, **OPTIONS)
    take(data, 1)
    shard = folder / "shard-000002.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000])
    steps(data, 20)
    assert data.describe()["train"]["skipped"].keys() == {"truncated"}
    shard.unlink()
    fresh = module(folder, **OPTIONS)
    with pytest.raises(ValueError, match=r"index\.json does not fit shard-000002\.tar"):
        fresh.setup()
    shard.write_bytes(whole)
    running = module(folder, workers=workers, **OPTIONS)
    running.setup()
    loader = running.train_dataloader()
    shard.unlink()
    with pytest.raises(ShardGoneError, match=r"shard-000002\.tar cannot be read any more .*; put it back and resume"):
        for _ in zip(range(60), loader, strict=False):
            pass


def test_lengths_that_are_damaged_are_counted_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "shards", mixed_samples(12))
    expected = steps(module(folder, **OPTIONS), 5)
    (file,) = folder.glob("lengths-*.npy")
    whole = file.read_bytes()
    for content in (b"nonsense", whole[:50], b""):
        file.write_bytes(content)
        assert steps(module(folder, **OPTIONS), 5) == expected
        assert f"{file} is damaged; the lengths are counted again" in caplog.text
        assert file.read_bytes() == whole


def test_lengths_where_the_folder_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the lengths' name stands in their way, as no test can take the right to write from root."""
    monkeypatch.setenv("NEO_COMPONENTS_CACHE", str(tmp_path / "cache"))
    folder = write(tmp_path / "shards", mixed_samples(12))
    expected = steps(module(folder, **OPTIONS), 5)
    (file,) = folder.glob("lengths-*.npy")
    file.unlink()
    file.mkdir()
    assert steps(module(folder, **OPTIONS), 5) == expected
    assert (tmp_path / "cache" / "lengths" / file.name).is_file()


def test_other_settings_have_lengths_of_their_own(tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", mixed_samples(12))
    module(folder, **OPTIONS).train_dataloader()
    module(folder, **OPTIONS, max_pixels=64 * 64).train_dataloader()
    module(folder, **OPTIONS, max_length=40).train_dataloader()
    assert len(list(folder.glob("lengths-*.npy"))) == 3
    module(folder, **OPTIONS, shuffle=3, seed=9).train_dataloader()
    assert len(list(folder.glob("lengths-*.npy"))) == 3


def test_a_rank_that_stops_stops_the_other(tmp_path: Path) -> None:
    """Two processes: too many bad samples end both with the reason, and none waits for the other for ever."""
    text_llm(tmp_path / "llm")
    images = {f"p{n:03d}": [truncated_png() if n % 3 == 0 else png()] for n in range(120)}
    tar(tmp_path / "pictures" / "shard-000000.tar", raw_samples(images))
    write(tmp_path / "text", mixed_samples(50, "t", images=False))
    (tmp_path / "run").mkdir()
    script = str(Path(__file__).with_name("killed_run.py"))
    command = [sys.executable, "-W", "ignore", script, str(tmp_path), str(tmp_path / "run"), "--steps=200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "samples had to be skipped (truncated: " in done.stderr


def test_a_foreign_tar_that_ends_early_stops_the_run(tmp_path: Path) -> None:
    """Cut anywhere, also between two members, where nothing but the missing end tells it."""
    path = tar(tmp_path / "shards" / "shard-000000.tar", raw_samples({f"s{n}": [png()] for n in range(9)}))
    whole = path.read_bytes()
    with tarfile.open(path) as opened:
        between = opened.getmembers()[6].offset
    for cut in (between, between + 100, between + 700, 300):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"shard-000000\.tar: the shard is damaged .*; write it again"):
            module(path.parent, **OPTIONS).setup()


def as_nobody(action: Callable[[], object]) -> str:
    """What an action says to a user without rights: root may read everything."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.setuid(65534)
        try:
            said = f"went on: {action()}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read().decode()
    os.waitpid(child, 0)
    return said


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_what_may_not_be_read_is_reported() -> None:
    # Not below pytest's own folder, which is closed to others.
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o755)
        folder = write(Path(base) / "shards", mixed_samples(12))
        (folder / "shard-000001.tar").chmod(0)
        said = as_nobody(lambda: ShardFolder(folder))
        assert said.startswith("PermissionError") and f"{folder}/shard-000001.tar" in said
        folder.chmod(0)
        said = as_nobody(lambda: ShardFolder(folder))
        assert said == f"PermissionError: {folder} cannot be read; change its permissions"


def test_paths_that_lead_nowhere_are_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, reason in (
        ("nothing", "No such file or directory"), ("file", "Not a directory"), ("file/shards", "Not a directory"),
        ("loop", "Too many levels of symbolic links"),
    ):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=rf"no shards \(\*\.tar\) in .*{name} \({reason}\); write them"):
            module(tmp_path / name, **OPTIONS).setup()
    folder = write(tmp_path / "shards", mixed_samples(12))
    (folder / "shard-000001.tar").unlink()
    (folder / "shard-000001.tar").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"shard-000001\.tar is no file \(a link to nothing\?\); put it back"):
        module(folder, **OPTIONS).setup()


def test_a_full_disk_leaves_no_half_folder(tmp_path: Path) -> None:
    """The limit of this process's files stands for the disk's."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"shards could not be written, nothing is left of it .*; make room"):
            write(tmp_path / "shards", mixed_samples(200), max_per_shard=200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []

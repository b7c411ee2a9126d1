"""Other data sets become shards: each format, what is left out of it, and going on after an interruption."""

from __future__ import annotations

import base64
import csv
import io
import json
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import document_of
from commands import good, neo
from PIL import Image
from shard_builders import content, module, png, tar, turns, write

from neo_components.components.ropes.native import Native
from neo_components.data import convert_to_shards, encode_conversation, load_tokenizer, read_shards
from neo_components.data.convert.captions import Captions
from neo_components.data.convert.llava import Llava
from neo_components.data.convert.texts import Texts
from neo_components.data.convert.video import evenly, read_frames
from neo_components.data.convert.vlmeval import VLMEval
from neo_components.data.convert.web_tars import WebTars
from neo_components.data.shards.folder import ShardFolder


def counts(folder: Path) -> list[tuple[list[dict[str, str]], int]]:
    """Conversation and number of images of each sample."""
    return [(sample["conversations"], len(sample["images"])) for sample in read_shards(folder)]


def caption(text: str, prompt: str = "") -> list[dict[str, str]]:
    return turns(f"<image>\n{prompt}" if prompt else "<image>", text)


# --- formats


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "sub/c.png")):
        (folder / name).write_bytes(png(color=(number, 0, 0)))
    (folder / "bad.png").write_bytes(b"nonsense")
    return folder


@pytest.mark.parametrize("kind", ["beside", "csv", "jsonl", "txt"])
def test_images_with_captions(kind: str, photos: Path, tmp_path: Path) -> None:
    texts = {"a.png": "one, two", "b.png": '"quoted"', "sub/c.png": "drei ü", "bad.png": "lost", "gone.png": "lost"}
    file: Path | None = tmp_path / f"captions.{kind}"
    expected = {"unreadable": 1, "missing_image": 1, "caption": 1}
    if kind == "beside":
        file, expected = None, {"unreadable": 1, "caption": 1}
        (photos / "d.png").write_bytes(png())
        for name, text in texts.items():
            if name != "gone.png":
                (photos / name).with_suffix(".txt").write_text(f"{text}\n", encoding="utf-8")
    elif kind == "csv":
        with (tmp_path / "captions.csv").open("w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows(
                [["file_name", "x", "caption"], *((n, "-", t) for n, t in texts.items()), ["a.png"]]
            )
    elif kind == "jsonl":
        lines = [json.dumps({"image": name, "text": text}) for name, text in texts.items()]
        (tmp_path / "captions.jsonl").write_text("\n".join([*lines, "{broken"]))
    else:
        lines = [f"{name}\t{text}" for name, text in texts.items()]
        (tmp_path / "captions.txt").write_text("\n".join([*lines, "no tab"]), encoding="utf-8")
    skips = convert_to_shards(Captions(photos, file, prompt="Describe it."), tmp_path / "shards")
    assert skips.kept == 3 and dict(skips.skipped) == expected
    assert counts(tmp_path / "shards") == [(caption(texts[n], "Describe it."), 1) for n in list(texts)[:3]]
    samples = list(read_shards(tmp_path / "shards"))
    assert [sample["name"] for sample in samples] == list(texts)[:3]
    assert samples[2]["images"] == [(photos / "sub" / "c.png").read_bytes()]


def test_captions_faults(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("name,caption\na.png,x\n")
    (tmp_path / "c.xml").write_text("")
    for file, message in (
        (tmp_path / "c.csv", r"no column file_name or .*names \['name', 'caption'\]"),
        (tmp_path / "c.xml", r"\.csv, \.jsonl"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_to_shards(Captions(photos, file), tmp_path / "shards")
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert_to_shards(Captions(photos, tmp_path / "none.csv"), tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_vlmevalkit_tables(tmp_path: Path) -> None:
    red, blue = (base64.b64encode(png(color=color)).decode() for color in ((200, 0, 0), (0, 0, 200)))
    lines = [
        {"index": "0", "image": red, "question": "Which?", "answer": "B", "A": "blue", "B": "red", "category": "color"},
        {"index": "1", "image": "0", "question": "What, then?", "answer": "Red.", "hint": "Look."},
        {"index": "2", "image": json.dumps([red, blue]), "question": "Compare", "answer": "Differ."},
        {"index": "3", "image": blue, "question": "Hidden", "answer": ""},
        {"index": "4", "image": "7", "question": "Lost", "answer": "x"},
        {"index": "5", "image": "%" * 80, "question": "Broken", "answer": "x"},
        {"index": "6", "image": base64.b64encode(b"n" * 90).decode(), "question": "Broken", "answer": "x"},
    ]
    with (tmp_path / "bench.tsv").open("w", newline="") as file:
        table = csv.DictWriter(
            file, ["index", "image", "question", "hint", "A", "B", "answer", "category"], delimiter="\t"
        )
        table.writeheader()
        table.writerows(lines)
    skips = convert_to_shards(VLMEval(tmp_path / "bench.tsv"), tmp_path / "shards")
    assert dict(skips.skipped) == {"no_answer": 1, "missing_image": 1, "unreadable": 2}
    samples = list(read_shards(tmp_path / "shards"))
    assert [(s["index"], s["kind"], len(s["images"])) for s in samples] == [
        ("0", "color", 1),
        ("1", "other", 1),
        ("2", "other", 2),
    ]
    asked = [sample["conversations"][0]["value"] for sample in samples]
    choice = "Answer with the option's letter from the given choices directly."
    assert asked == [
        f"<image>\nWhich?\nA. blue\nB. red\n{choice}",
        "<image>\nHint: Look.\nWhat, then?",
        "<image>\n<image>\nCompare",
    ]
    assert samples[1]["images"] == [png(color=(200, 0, 0))]
    (tmp_path / "bad.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(ValueError, match="no column answer, image, index, question"):
        convert_to_shards(VLMEval(tmp_path / "bad.tsv"), tmp_path / "other")


def test_image_text_tars(tmp_path: Path) -> None:
    source = tmp_path / "tars"
    tar(source / "00000.tar", {
        "000000.jpg": png(), "000000.txt": b"A red square.\n", "000000.json": b'{"caption": "no", "url": "x"}',
        "000001.json": b'{"caption": "From JSON."}', "000001.png": png(),
        "000002.png": png(), "000002.json": b'{"url": "x"}',
        "000003.png": b"nonsense", "000003.txt": b"x",
        "000004.txt": b"no image",
        "chat.json": content("<image>What?"), "chat.png": png(),
        "readme.md": b"ignored",
    })  # fmt: skip
    whole = tar(source / "00001.tar", {"a.png": png(), "a.txt": b"whole", "b.png": png(200, 200), "b.txt": b"cut"})
    whole.write_bytes(whole.read_bytes()[: 512 * 4 + 300])
    skips = convert_to_shards(WebTars(source), tmp_path / "shards", workers=2)
    assert dict(skips.skipped) == {"caption": 1, "unreadable": 1, "missing_image": 1, "truncated": 1}
    assert counts(tmp_path / "shards") == [
        (caption("A red square."), 1),
        (caption("From JSON."), 1),
        (turns("<image>What?"), 1),
        (caption("whole"), 1),
    ]
    assert [sample["id"] for sample in read_shards(tmp_path / "shards")] == ["000000", "000001", "chat", "a"]


@pytest.mark.parametrize("name", ["../a.txt", "/etc/a.png", "a.pkl", "a.npy"])
def test_tars_with_evil_members_are_refused(name: str, tmp_path: Path) -> None:
    tar(tmp_path / "tars" / "0.tar", {"a.png": png(), "a.txt": b"x", name: b"x"})
    with pytest.raises(ValueError, match=r"absolute or leads out|pickles can run code"):
        convert_to_shards(WebTars(tmp_path / "tars"), tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


RECORDS: list[dict[str, Any]] = [
    {"text": "A plain text.", "question": "Why?"},
    {"text": "", "question": "Empty?"},
    {"text": None, "question": "None?"},
    {"text": "An ü.", "question": "Who?"},
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_texts(kind: str, tmp_path: Path) -> None:
    source = tmp_path / f"texts.{kind}"
    if kind == "jsonl":
        source.write_text("\n".join(json.dumps(record) for record in RECORDS), encoding="utf-8")
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), source)
    skips = convert_to_shards(Texts(source), tmp_path / "plain")
    assert (skips.read, dict(skips.skipped)) == (4, {"no_answer": 1, "json": 1})
    assert [c for c, _ in counts(tmp_path / "plain")] == [
        [{"from": "gpt", "value": "A plain text."}],
        [{"from": "gpt", "value": "An ü."}],
    ]
    convert_to_shards(Texts(source, question="question"), tmp_path / "asked")
    assert [c for c, _ in counts(tmp_path / "asked")] == [turns("Why?", "A plain text."), turns("Who?", "An ü.")]


def test_chat_messages(tmp_path: Path) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]
    records = [
        {"messages": chat},
        {"messages": chat[:2]},
        {"messages": [{"role": "tool", "content": "x"}, *chat]},
        {"messages": 3},
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, records)))
    skips = convert_to_shards(Texts(tmp_path / "chat.jsonl"), tmp_path / "shards")
    assert dict(skips.skipped) == {"no_answer": 1, "role": 1, "turns": 1}
    assert counts(tmp_path / "shards") == [([{"from": "system", "value": "Be brief."}, *turns("Hi", "Ho")], 0)]
    with pytest.raises(ValueError, match=r"from \.jsonl or \.parquet, got 'chat\.json'"):
        (tmp_path / "chat.json").write_text("[]")
        convert_to_shards(Texts(tmp_path / "chat.json"), tmp_path / "other")
    (tmp_path / "bad.parquet").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is no Parquet file"):
        convert_to_shards(Texts(tmp_path / "bad.parquet"), tmp_path / "other")


# --- video


def film(path: Path, frames: int, codec: str) -> Path:
    """A video of ten frames a second; the green of a frame tells its number."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (0, 10 * number, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greens(frames: list[bytes]) -> list[int]:
    """The numbers of the frames."""
    means = [Image.open(io.BytesIO(data)).convert("RGB").resize((1, 1)).getpixel((0, 0)) for data in frames]
    return [round(mean[1] / 10) for mean in means if isinstance(mean, tuple)]


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.webm", "libvpx")])
def test_frames_of_a_video(name: str, codec: str, tmp_path: Path) -> None:
    path = film(tmp_path / name, 20, codec)
    assert greens(read_frames(path, 4)) == [2, 7, 12, 17]
    every = greens(read_frames(path, None))
    assert len(every) == 20 and max(abs(green - number) for number, green in enumerate(every)) <= 1  # codecs are lossy
    assert greens(read_frames(path, fps=2.0)) == [0, 5, 10, 15]


def test_even_spacing() -> None:
    assert list(evenly(20, 4)) == [2, 7, 12, 17]
    assert list(evenly(3, 8)) == [0, 1, 2]
    assert list(evenly(5, None)) == [0, 1, 2, 3, 4]
    assert list(evenly(100, 1)) == [50]


def test_videos_become_samples_whose_time_advances_by_frame(tmp_path: Path) -> None:
    film(tmp_path / "a.mp4", 20, "mpeg4")
    (tmp_path / "frames").mkdir()
    for number in range(6):
        (tmp_path / "frames" / f"{number}.png").write_bytes(png(color=(0, 10 * number, 0)))
    (tmp_path / "broken.mp4").write_bytes(b"nonsense")
    records = [
        {"video": "a.mp4", "conversations": turns("<video>\nWhat happens?")},
        {"video": ["frames", "a.mp4"], "conversations": turns("First <video> then <video>.")},
        {"video": "broken.mp4", "conversations": turns("<video>")},
        {"video": "gone.mp4", "conversations": turns("<video>")},
        {"video": "a.mp4", "image": "x.png", "conversations": turns("<video>")},
        {"video": "a.mp4", "conversations": turns("<video><video>")},
    ]
    (tmp_path / "videos.json").write_text(json.dumps(records))
    skips = convert_to_shards(Llava(tmp_path / "videos.json", tmp_path, frames=3), tmp_path / "shards")
    assert dict(skips.skipped) == {"video": 1, "missing_image": 1, "images": 1, "image_tags": 1}
    one, two = read_shards(tmp_path / "shards")
    assert (one["frames"], two["frames"]) == ([3], [3, 3])
    assert greens(one["images"]) == [3, 10, 16] and greens(two["images"]) == [1, 3, 5, 3, 10, 16]
    data = module(tmp_path / "shards", validation=[tmp_path / "shards"], seq_len=256)
    (batch,) = list(data.val_dataloader())
    # Each frame is 64 x 64 pixels, 4 visual tokens; the frames of a video stand next to each other.
    inside = batch.document_ids[0] == 1
    image_ids = batch.image_ids[0][inside]
    first = int(image_ids[image_ids >= 0].min())
    assert [int(n) - first for n in image_ids[image_ids >= 0]] == [n for frame in range(6) for n in [frame] * 4]
    local = torch.where(image_ids >= 0, image_ids - first, -1)
    times = Native().positions(document_of(local, [(2, 2)] * 6))[:, 0]
    starts = [int(times[local == frame][0]) for frame in range(6)]
    assert [starts[n + 1] - starts[n] for n in (0, 1, 3, 4)] == [1, 1, 1, 1]
    assert all((times[local == frame] == starts[frame]).all() for frame in range(6))
    token_ids, _ = encode_conversation(turns("<image>\nWhat happens?"), load_tokenizer(data.tokenizer_name), [12])
    assert batch.token_ids[0][batch.document_ids[0] == 0].tolist() == token_ids.tolist()


def test_video_without_its_library_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'neo-components\[video\]'"):
        read_frames(tmp_path / "a.mp4")


# --- the engine


def llava_source(folder: Path, count: int = 40) -> Path:
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(count):
        (folder / "images" / f"{number}.png").write_bytes(png(color=(number, 0, 0)) if number % 9 else b"nonsense")
        records.append({"image": f"{number}.png", "conversations": turns("<image>", f"It is {number}.")})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_processes_write_the_same_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = llava_source(tmp_path)
    alone = convert_to_shards(Llava(source, tmp_path / "images"), tmp_path / "alone", shard_size=6)
    log = caplog.text
    caplog.clear()
    together = convert_to_shards(Llava(source, tmp_path / "images"), tmp_path / "together", shard_size=6, workers=3)
    assert alone == together and alone.kept == 35
    assert caplog.text == log and "record 9 (unreadable)" in log
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")
    folder = ShardFolder(tmp_path / "together")
    assert [folder.read(n)["images"][0] for n in range(3)] == [png(color=(n, 0, 0)) for n in (1, 2, 3)]


def test_a_full_disk_stops_clearly_and_the_conversion_continues_later(tmp_path: Path) -> None:
    source = llava_source(tmp_path)
    big = [{"conversations": turns("Say it", "word " * 20000)} for _ in range(12)]
    source.write_text(json.dumps([*json.loads(source.read_text())[:12], *big]))
    convert_to_shards(Llava(source, tmp_path / "images"), tmp_path / "whole", shard_size=6)
    code = f"""
import resource, sys
from neo_components.data import convert_to_shards
from neo_components.data.convert.llava import Llava
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    convert_to_shards(Llava({str(source)!r}, {str(tmp_path / "images")!r}), {str(tmp_path / "shards")!r}, shard_size=6)
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "shard-000002.tar cannot be written (File too large); make room and start the same" in done.stdout
    part = tmp_path / "shards.part"
    finished = {path: path.stat().st_mtime_ns for path in (part / "shard-000000.tar", part / "shard-000001.tar")}
    assert not (tmp_path / "shards").exists()
    convert_to_shards(Llava(source, tmp_path / "images"), tmp_path / "shards", shard_size=6)
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")
    assert [(tmp_path / "shards" / path.name).stat().st_mtime_ns for path in finished] == list(finished.values())
    assert not part.exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def test_another_conversion_does_not_continue_with_it(tmp_path: Path) -> None:
    source = llava_source(tmp_path)
    part = tmp_path / "shards.part"
    convert_to_shards(Llava(source, tmp_path / "images"), tmp_path / "first", shard_size=6)
    shutil.copytree(tmp_path / "first", part)
    (part / "job.json").write_text('{"kind": "other"}')
    (part / "shard-000000.json").write_text("{}")
    convert_to_shards(Llava(source, tmp_path / "images"), tmp_path / "shards", shard_size=6)
    assert contents(tmp_path / "shards") == contents(tmp_path / "first")


# --- commands


def test_commands_close_with_a_summary(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\n{"text": ""}\n')
    out = good("data", "text", tmp_path / "t.jsonl", "-o", tmp_path / "text", "--workers", "0")
    assert out == f"read 2, written 1, skipped (no_answer) 1: {tmp_path}/text\n"
    (photos / "a.txt").write_text("An a.")
    done = neo("data", "captions", photos, "-o", tmp_path / "captions", "--prompt", "What?", "--workers", "2")
    assert done.out == f"read 4, written 1, skipped (caption) 3: {tmp_path}/captions\n"
    assert done.err.splitlines()[-1].startswith("captions: 4/4 (100 %)")
    assert counts(tmp_path / "captions") == [(caption("An a.", "What?"), 1)]
    with (tmp_path / "b.tsv").open("w") as file:
        file.write("index\timage\tquestion\tanswer\n1\t" + base64.b64encode(png()).decode() + "\tq\ta\n")
    assert good("data", "vlmeval", tmp_path / "b.tsv", "-o", tmp_path / "tsv").startswith("read 1, written 1: ")
    tar(tmp_path / "tars" / "0.tar", {"a.png": png(), "a.txt": b"x"})
    assert good("data", "webdataset", tmp_path / "tars", "-o", tmp_path / "web").startswith("read 1, written 1: ")


def test_inspection(tmp_path: Path) -> None:
    from shard_builders import TOKENIZER, mixed_samples, truncated_png

    samples = [{**one, "language": "en" if n % 3 else "de"} for n, one in enumerate(mixed_samples(30))]
    long = {"key": "long", "conversations": turns("Say", "word " * 300), "images": []}
    folder = write(tmp_path / "shards", [*samples, long])
    tar(folder / "shard-000009.tar", {"cut.json": content("<image>"), "cut.png": truncated_png(),
                                      "odd.json": content("<image><image>"), "odd.png": png()})  # fmt: skip
    (folder / "index.json").unlink()
    options = ["--tokenizer", TOKENIZER, "--seq-len", "256", "--min-pixels", "4096", "--max-pixels", "16384"]
    out = good("data", "inspect", folder, *options, "--decode", "--workers", "0", "-o", tmp_path / "seen")
    lines = out.splitlines()
    assert lines[0] == "samples 33, usable 31"  # the truncated one shows only when it is decoded
    assert lines[1] == "images in a sample: 0: 9, 1: 17, 2: 7"
    assert lines[2] == "height x width: 64x64 to 96x160, median 64x64"
    assert "language: en: 20, de: 10" in lines
    assert lines[-5:-2] == ["skipped (image_tags) 1: odd", "skipped (too_long) 1: long", "skipped (truncated) 1: cut"]
    for name in ("samples.png", "histograms.png"):
        with Image.open(tmp_path / "seen" / name) as image:
            assert min(image.size) > 500
            pixels = np.asarray(image.convert("RGB"))
        if name == "samples.png":  # in the color of the images
            assert (pixels[..., 1:] == (7, 9)).all(axis=-1).sum() > 50000
    index = good("data", "index", folder, "--tokenizer", TOKENIZER, "--min-pixels", "4096", "--max-pixels", "16384")
    assert index.startswith("usable 32 of 33, tokens ") and "unusable: image_tags: 1" in index
    assert [path.name for path in folder.glob("lengths-*.npy")] == [index.splitlines()[-1]]
    # Training takes exactly these lengths: nothing is counted again, even where it could not be written.
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    data = module(folder, validation=[folder], seq_len=256, max_skipped=0.5)
    keys = Counter(key for batch in data.val_dataloader() for sequence in batch.keys for key in sequence)
    assert len(keys) == 30 and {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before

"""Rows: nothing is split, lost or doubled; what cannot be used is skipped, counted, named, and too much of it stops."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_builders import (
    SPEC,
    TOKENIZER,
    content,
    gigantic_png,
    mixed_samples,
    module,
    png,
    raw_samples,
    sample,
    take,
    tar,
    truncated_png,
    turns,
    write,
)

from neo_components import InputSpec
from neo_components.data import encode_conversation, load_image, load_tokenizer, max_pixels_per_image
from neo_components.data.packing import patchify
from neo_components.data.skip_counts import SkipCounts, TooManySkippedError
from neo_components.types import IGNORED, Batch

ROW = 128


def documents(batches: list[Batch]) -> dict[str, list[dict[str, Any]]]:
    """The content of each document by the key of its sample, in order of appearance."""
    found: dict[str, list[dict[str, Any]]] = {}
    for batch in batches:
        first_patch = 0
        for sequence, its_keys in enumerate(batch.keys):
            assert batch.document_ids[sequence].unique().tolist() == sorted({-1, *range(len(its_keys))}) or (
                batch.document_ids[sequence].unique().tolist() == list(range(len(its_keys)))
            )
            for number, key in enumerate(its_keys):
                inside = batch.document_ids[sequence] == number
                places = inside.nonzero().flatten()
                assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1))  # in one piece
                patches = 4 * int((batch.image_ids[sequence][inside] >= 0).sum())
                document = {
                    "token_ids": batch.token_ids[sequence][inside].tolist(),
                    "labels": batch.labels[sequence][inside].tolist(),
                    "patches": batch.patches[first_patch : first_patch + patches],
                }
                first_patch += patches
                found.setdefault(key, []).append(document)
        assert first_patch == len(batch.patches)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_one_pass_gives_each_sample_whole_and_once(tmp_path: Path, workers: int) -> None:
    samples = mixed_samples(41)
    folder = write(tmp_path / "shards", samples)
    data = module(folder, validation=[folder], seq_len=ROW, micro_batch_size=3, workers=workers)
    batches = list(data.val_dataloader())
    assert all(batch.token_ids.shape[1] == ROW for batch in batches)
    found = documents(batches)
    assert sorted(found) == [one["key"] for one in samples]
    tokenizer = load_tokenizer(TOKENIZER)
    for one in samples:
        (document,) = found[one["key"]]
        limit = max_pixels_per_image(len(one["images"]), 4096, 16384)
        images = [load_image(data, 32, 4096, limit) for data in one["images"]]
        counts = [image[0].numel() // 32**2 for image in images]
        token_ids, labels = encode_conversation(one["conversations"], tokenizer, counts)
        assert document["token_ids"] == token_ids.tolist()
        assert document["labels"] == labels.tolist()
        assert torch.equal(document["patches"], patchify(images, SPEC)[0])
    assert data.describe()["validation"] == {"read": 41, "skipped": {}}
    # Best fit leaves little unused but in the last sequence of each worker.
    used = torch.cat([(batch.document_ids >= 0).float().mean(dim=1) for batch in batches])
    assert used.mean() > 0.8


def test_training_loses_and_doubles_nothing(tmp_path: Path) -> None:
    samples = mixed_samples(23)
    data = module(write(tmp_path / "shards", samples), seq_len=ROW)
    counts = Counter[str]()
    for batch in take(data, 40):
        for sequence in batch.keys:
            for key in sequence:
                counts[key] += 1
                # No sample a second time before every other one.
                assert len(counts) == 23 or counts.most_common(1)[0][1] == 1
        if len(counts) == 23:
            assert max(counts.values()) - min(counts.values()) <= 1
    assert counts.total() == data.describe()["train"]["read"] > 4 * 23


BAD: dict[str, tuple[list[bytes], bytes | None, str]] = {
    "unreadable": ([b"nonsense"], None, "unreadable"),
    "pickle": ([b"\x80\x04K\x01."], None, "unreadable"),
    "nothing": ([b""], None, "empty"),
    "cut_file": ([truncated_png()], None, "truncated"),
    "bomb": ([gigantic_png()], None, "too_large"),
    "thin": ([png(1, 201)], None, "aspect_ratio"),
    "second_bad": ([png(), b"nonsense"], None, "unreadable"),
    "more_tags": ([png()], content("<image><image>"), "image_tags"),
    "fewer_tags": ([png(), png()], content("<image>"), "image_tags"),
    "no_images": ([], content("<image>"), "image_tags"),
    "no_answer": ([], json.dumps({"conversations": turns()[:1]}).encode(), "no_answer"),
    "blank_answer": ([], content(answer=" "), "no_answer"),
    "stranger": ([], json.dumps({"conversations": [*turns(), {"from": "x", "value": "y"}]}).encode(), "role"),
    "reserved": ([], content("a <IMG_CONTEXT>"), "reserved"),
    "no_turns": ([], b"{}", "turns"),
    "broken_json": ([], b"{", "json"),
    "answer_cut_away": ([png(64, 128)], content("<image>" + "why " * 60), "too_long"),
    "image_cut": ([png(3200, 32)], content("<image>"), "too_long"),
}


def bad_shards(folder: Path, good: int = 30) -> Path:
    images = {f"good{number:03d}": [png()] for number in range(good)} | {key: bad[0] for key, bad in BAD.items()}
    questions = {key: bad[1] for key, bad in BAD.items() if bad[1] is not None}
    tar(folder / "shard-000000.tar", raw_samples(images, questions))
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_unusable_samples_are_skipped_counted_and_named(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bad_shards(tmp_path / "shards")
    options = {"max_skipped": 1.0, "max_length": 60, "max_pixels": 65536, "seq_len": 256, "workers": workers}
    data = module(folder, validation=[folder], **options)
    with caplog.at_level(logging.WARNING):
        found = documents(list(data.val_dataloader()))
    assert sorted(found) == [f"good{number:03d}" for number in range(30)]
    reasons = Counter(reason for _, _, reason in BAD.values())
    assert data.describe()["validation"] == {"read": 30 + len(BAD), "skipped": dict(reasons)}
    if workers == 0:  # a worker process has its own log
        for key, (_, _, reason) in BAD.items():
            assert f"skipped sample {folder}/{key} ({reason}): " in caplog.text
    trained = documents(take(module(folder, **options), 20))
    assert sorted(trained) == sorted(found)


def test_sample_longer_than_a_row_is_skipped_but_not_if_cut(tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", [*mixed_samples(10), sample("long", answer="word " * 400)])
    whole = module(folder, validation=[folder], max_skipped=0.5)
    assert "long" not in documents(list(whole.val_dataloader()))
    assert whole.describe()["validation"]["skipped"] == {"too_long": 1}
    cut = module(folder, validation=[folder], max_length=ROW)
    assert len(documents(list(cut.val_dataloader()))["long"][0]["token_ids"]) == ROW
    assert cut.describe()["validation"]["skipped"] == {}


def test_a_cut_never_goes_through_a_question(tmp_path: Path) -> None:
    long_question = {"conversations": [*turns(), *turns("why " * 100, "So.")], "key": "talk", "images": []}
    only = sample("only", question="why " * 100)
    lost = {"conversations": [*turns(), *turns("<image>")], "key": "lost", "images": [png(320, 320)]}
    folder = write(tmp_path / "shards", [long_question, only, lost])
    data = module(folder, validation=[folder], max_length=100, max_pixels=320 * 320, max_skipped=1.0)
    (document,) = documents(list(data.val_dataloader()))["talk"]
    assert document["token_ids"] == encode_conversation(turns(), load_tokenizer(TOKENIZER))[0].tolist()
    assert data.describe()["validation"] == {"read": 3, "skipped": {"too_long": 2}}


def test_too_many_skipped_stop_the_run(tmp_path: Path) -> None:
    images = {f"s{number:03d}": [png() if number % 10 else b"nonsense"] for number in range(200)}
    tar(tmp_path / "shard-000000.tar", raw_samples(images))
    message = r"\d+ of \d+ samples had to be skipped \(unreadable: \d+\), over the fraction of 0.05"
    for workers in (0, 1):
        data = module(tmp_path, validation=[tmp_path], max_skipped=0.05, workers=workers)
        with pytest.raises(TooManySkippedError, match=message):
            list(data.val_dataloader())
        with pytest.raises(TooManySkippedError, match=message):
            take(data, 100)
    assert len(documents(list(module(tmp_path, validation=[tmp_path], max_skipped=0.15).val_dataloader()))) == 180


def test_a_small_set_is_judged_at_its_end(tmp_path: Path) -> None:
    images = {f"s{number:03d}": [png() if number < 18 else b"nonsense"] for number in range(20)}
    tar(tmp_path / "shard-000000.tar", raw_samples(images))
    with pytest.raises(TooManySkippedError, match="2 of 20 samples"):
        list(module(tmp_path, validation=[tmp_path]).val_dataloader())
    with pytest.raises(TooManySkippedError, match="2 of 20 samples"):
        take(module(tmp_path), 100)


def test_nothing_usable(tmp_path: Path) -> None:
    tar(tmp_path / "shard-000000.tar", raw_samples({f"s{number}": [b"nonsense"] for number in range(9)}))
    with pytest.raises(ValueError, match=r"no sample of .* is usable"):
        take(module(tmp_path, max_skipped=1.0), 1)
    with pytest.raises(TooManySkippedError, match="9 of 9"):
        list(module(tmp_path, validation=[tmp_path]).val_dataloader())


@pytest.mark.parametrize(
    ("read", "skipped", "allowed", "complete", "stops"),
    [
        (100, 1, 0.01, False, False),
        (100, 2, 0.01, False, True),
        (99, 50, 0.01, False, False),
        (99, 2, 0.01, True, True),
        (10, 1, 0.01, True, False),  # a single one
        (10, 1, 0.0, False, True),
        (10, 0, 0.0, True, False),
        (10, 10, 1.0, True, False),
    ],
)
def test_when_a_run_stops(read: int, skipped: int, allowed: float, complete: bool, stops: bool) -> None:
    counts = SkipCounts(read, Counter({"truncated": skipped}))
    if stops:
        with pytest.raises(TooManySkippedError, match="over the fraction of"):
            counts.check(allowed, complete)
    else:
        counts.check(allowed, complete)


def test_image_tokens_beyond_the_vocabulary_are_no_targets(tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", [sample("drawn", [png()], question="Draw it", answer="see <image> here")])
    outside = InputSpec(500, 501, 502, 400, 16, 2, 3, SPEC.index_rule)
    for spec, target in ((SPEC, True), (outside, False)):
        data = module(folder, validation=[folder])
        data.input_spec = spec
        (document,) = documents(list(data.val_dataloader()))["drawn"]
        drawn = [i for i, token in enumerate(document["token_ids"]) if token in spec.image_special_token_ids]
        assert len(drawn) == 6
        assert all((document["labels"][i] != IGNORED) == target for i in drawn)

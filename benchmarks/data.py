"""From shards to batches: samples and tokens per second of one core, where the time goes, and the cost of a worker.

    python benchmarks/data.py [--seconds 4] [--sides 224 448 1024] [--photos FOLDER] [--only speed|memory|pixels]

A plain map-style loader runs beside it, alternating in the same run, and does the work as most training kits do: Pillow
opens and resizes a file, numpy normalizes it, the tokenizer encodes each turn's text with the image tokens written out,
images are collated in a list and texts padded. Token ids and labels must be equal, and pixels where they are exact.
Images are synthetic photographs (JPEG, quality 90) a third larger than what they are resized to; each sample has one,
and a short conversation about it.

Speed is counted in seconds of the processor, so that other programs on the machine count little; the median of rounds.
How far fast pixels are from exact ones is reported for the synthetic photographs, and for those of ``--photos``.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_setting import TOKENIZER, ours
from loader_memory import print_memory
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from neo_components.data import NEODataModule, load_tokenizer, smart_resize, write_shards
from neo_components.data import packed as packed_module
from neo_components.data import samples as samples_module
from neo_components.data.image.decoding import decode
from neo_components.data.image.files import open_image
from neo_components.data.image.images import IMAGE_MEAN, IMAGE_STD, resize, resize_fast
from neo_components.data.packing import patchify
from neo_components.data.shards.folder import ShardFolder

SAMPLES = 96
BATCH = 8
"""Samples of a batch of the plain loader; ours are packed sequences of as many tokens as eight samples have."""

ROUNDS = 7
SCALES = (0.5, 0.75, 1.5, 2.0, 3.0)
"""How much larger or smaller pixels are made to compare fast with exact ones."""


def photograph(side: int, seed: int) -> bytes:
    """Soft shapes with some noise, 4:3."""
    random = np.random.default_rng(seed)
    size = (int(side * 1.54), int(side * 1.155))
    soft = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(soft).astype(np.int16) + random.integers(-12, 13, (size[1], size[0], 3))
    data = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
    return data.getvalue()


def conversation(number: int) -> list[dict[str, str]]:
    """No two samples have a text in common."""
    answer = " ".join(f"The thing at place {n} is red and lies near number {number}." for n in range(4))
    return [{"from": "human", "value": f"<image>\nWhat is at place {number}?"}, {"from": "gpt", "value": answer}]


class PlainDataset(Dataset[dict[str, Any]]):
    """One sample at a time, from files."""

    def __init__(self, folder: Path, side: int, tokenizer: Any) -> None:
        self.files, self.side, self.tokenizer = sorted(folder.glob("*.jpg")), side, tokenizer

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> dict[str, Any]:
        image = Image.open(self.files[number]).convert("RGB")
        height, width = smart_resize(image.height, image.width, 32, self.side**2, self.side**2)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(image).astype(np.float32) / 255
        pixels = (pixels - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
        ids, labels = self.encode(conversation(number), height * width // 32**2)
        return {"image": torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), "ids": ids, "labels": labels}

    def encode(self, turns: list[dict[str, str]], visual: int) -> tuple[torch.Tensor, torch.Tensor]:
        question = turns[0]["value"].replace("<image>", "<img>" + "<IMG_CONTEXT>" * visual + "</img>")
        before = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        texts = [before, turns[1]["value"] + "<|im_end|>\n"]
        asked, answered = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return torch.tensor(asked + answered), torch.tensor([-100] * len(asked) + answered)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "images": [sample["image"] for sample in samples],
        "ids": pad([sample["ids"] for sample in samples], batch_first=True),
        "labels": pad([sample["labels"] for sample in samples], batch_first=True, padding_value=-100),
    }


def check_equal(plain: PlainDataset, data: NEODataModule) -> None:
    """That both loaders make the same of the samples of one batch."""
    batch = next(iter(data.train_dataloader()))
    spec, used = data.input_spec, 0
    assert spec is not None
    for document, key in enumerate(batch.keys[0]):
        sample, mine = plain[int(key[1:])], batch.document_ids[0] == document
        patches = patchify([sample["image"]], spec)[0]
        assert torch.equal(batch.token_ids[0, mine], sample["ids"])
        assert torch.equal(batch.labels[0, mine], sample["labels"])
        assert (batch.patches[used : used + len(patches)] - patches).abs().max() < 1e-5
        used += len(patches)


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def rate(batches: Iterator[Any], size: Callable[[Any], tuple[int, int]], seconds: float) -> tuple[float, float]:
    """(samples, tokens) per second of the processor."""
    samples = tokens = 0
    start = time.process_time()
    while time.process_time() - start < seconds or not samples:
        some, more = size(next(batches))
        samples, tokens = samples + some, tokens + more
    gone = time.process_time() - start
    return samples / gone, tokens / gone


def our_size(batch: Any) -> tuple[int, int]:
    return sum(map(len, batch.keys)), int((batch.document_ids >= 0).sum())


def plain_size(batch: Any) -> tuple[int, int]:
    return len(batch["images"]), int((batch["ids"] != 0).sum())


def fractions(data: NEODataModule, batches: int) -> dict[str, float]:
    """Fraction of the time in each part."""
    spent: dict[str, float] = defaultdict(float)
    places = [
        (samples_module, "decode", "decode"), (samples_module, "resize", "resize"),
        (samples_module, "resize_fast", "resize"), (samples_module, "encode_conversation", "tokenize"),
        (packed_module, "pack", "pack"), (ShardFolder, "read", "read"),
    ]  # fmt: skip
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for (owner, name, function), (_, _, label) in zip(kept, places, strict=True):

        def timed(*args: Any, function: Any = function, label: str = label, **options: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **options)
            finally:
                spent[label] += time.process_time() - start

        setattr(owner, name, timed)
    try:
        loader = iter(data.train_dataloader())
        next(loader)
        spent.clear()
        start = time.process_time()
        for _ in range(batches):
            next(loader)
        total = time.process_time() - start
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)
    found = {label: spent[label] / total for label in dict.fromkeys(label for _, _, label in places)}
    return found | {"rest": 1 - sum(found.values())}


def write(side: int, folder: Path) -> tuple[Path, Path]:
    """(folder of images, folder of shards) of the same samples."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(SAMPLES):
        (images / f"{number:04d}.jpg").write_bytes(photograph(side, number))
    files = enumerate(sorted(images.glob("*.jpg")))
    samples = ({"key": f"s{n:04d}", "conversations": conversation(n), "images": [file]} for n, file in files)
    write_shards(samples, folder / "shards")
    return images, folder / "shards"


def print_speed(side: int, seconds: float, plain: PlainDataset, shards: Path, seq_len: int) -> None:
    check_equal(plain, ours(shards, side, seq_len, exact_pixels=True))
    loader = DataLoader(plain, BATCH, shuffle=True, collate_fn=collate)
    arms: dict[str, tuple[Iterator[Any], Callable[[Any], tuple[int, int]]]] = {
        "plain": (endless(loader), plain_size),
        "ours": (iter(ours(shards, side, seq_len).train_dataloader()), our_size),
        "ours, exact": (iter(ours(shards, side, seq_len, exact_pixels=True).train_dataloader()), our_size),
    }
    results: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for batches, size in arms.values():
        rate(batches, size, seconds / 4)  # warm
    for _ in range(ROUNDS):
        for name, (batches, size) in arms.items():
            results[name].append(rate(batches, size, seconds / ROUNDS))
    ratios = {
        name: statistics.median(mine[0] / other[0] for mine, other in zip(found, results["plain"], strict=True))
        for name, found in results.items()
    }
    for name, found in results.items():
        samples, tokens = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{side:5d}  {name:12s} {samples:10.1f} {tokens:12.0f} {ratios[name]:8.2f}x")
    for name, exact in (("ours", False), ("exact", True)):
        text = ", ".join(
            f"{label} {100 * part:.0f} %"
            for label, part in fractions(ours(shards, side, seq_len, exact_pixels=exact), 6).items()
        )
        print(f"       time, {name}: {text}")


def print_pixels(photos: list[bytes], name: str) -> None:
    """How far the fast resize is from the exact one."""
    for scale in SCALES:
        counts = np.zeros(256, np.int64)
        for photo in photos:
            pixels = decode(open_image(photo))
            size = tuple(max(1, round(side * scale / 32)) * 32 for side in pixels.shape[:2])
            difference = (resize(pixels, size).int() - resize_fast(pixels, size).int()).abs()
            counts += np.bincount(difference.flatten().numpy(), minlength=256)
        largest, mean = int(np.flatnonzero(counts).max()), float(counts @ np.arange(256) / counts.sum())
        print(
            f"{name:10s} {scale:6.2f}x {100 * (1 - counts[0] / counts.sum()):10.2f} % "
            f"{largest:10d} {mean:10.4f} {len(photos):8d}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=6.0, help="of the processor, per arm and size")
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 448, 1024])
    parser.add_argument("--photos", type=Path, help="folder of JPEGs to compare fast with exact pixels on")
    parser.add_argument("--only", choices=["speed", "memory", "pixels"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in facts if "model name" in line), "")
    print(f"{model.strip() or platform.machine()}, one thread, torch {torch.__version__}, Pillow {Image.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        written = {side: write(side, Path(folder) / str(side)) for side in options.sides}
        lengths = {}
        if options.only in (None, "speed"):
            print(f"{'side':>5s}  {'loader':12s} {'samples/s':>10s} {'tokens/s':>12s} {'':>9s}   of one core")
        for side, (images, shards) in written.items():
            plain = PlainDataset(images, side, load_tokenizer(str(TOKENIZER)))
            lengths[side] = BATCH * (len(plain[SAMPLES - 1]["ids"]) + 8)
            if options.only in (None, "speed"):
                print_speed(side, options.seconds, plain, shards, lengths[side])
        if options.only in (None, "memory"):
            print_memory({side: (shards, lengths[side]) for side, (_, shards) in written.items()})
        if options.only in (None, "pixels"):
            print(f"{'pixels':10s} {'scale':>7s} {'differ':>12s} {'largest':>10s} {'mean':>10s} {'images':>8s}")
            print_pixels([photograph(side, 0) for side in options.sides], "synthetic")
            if options.photos:
                print_pixels([file.read_bytes() for file in sorted(options.photos.glob("*.jp*g"))], "photos")


if __name__ == "__main__":
    main()

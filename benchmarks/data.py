"""From shards to batches: samples and tokens per second on one core, where the time goes, and memory of a worker.

    python benchmarks/data.py [--seconds 4] [--sides 224 448 1024]

Beside it, in the same run and in turns, a plain map-style loader does the same work as most training kits do it: Pillow
opens and resizes a file, numpy normalises it, the same tokenizer encodes the conversation, images are collated in a
list and texts padded. Both run in one process with one thread. Images are synthetic photographs (JPEG, quality 90) a
third larger than what they are resized to; each sample has one, and a short talk about it.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
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
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from neo_components.data import NEODataModule, Source, encode_conversation, load_tokenizer, smart_resize, write_shards
from neo_components.data import rows as rows_module
from neo_components.data import samples as samples_module
from neo_components.data.conversation import image_token_ids
from neo_components.data.images import IMAGE_MEAN, IMAGE_STD
from neo_components.data.shard_folder import ShardFolder
from neo_components.types import InputSpec

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "conversation" / "tokenizer"
SAMPLES = 96
BATCH = 8
"""Samples of a batch of the plain loader; ours are rows of as many tokens as eight samples have."""


def photograph(side: int, seed: int) -> bytes:
    """Soft shapes with some noise, 4:3."""
    random = np.random.default_rng(seed)
    size = (int(side * 1.54), int(side * 1.155))
    soft = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(soft).astype(np.int16) + random.integers(-12, 13, (size[1], size[0], 3))
    data = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
    return data.getvalue()


def talk(number: int) -> list[dict[str, str]]:
    answer = " ".join(f"The thing at place {n} is red and lies near number {number}." for n in range(4))
    return [{"from": "human", "value": "<image>\nWhat is there?"}, {"from": "gpt", "value": answer}]


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
        ids, labels = encode_conversation(talk(number), self.tokenizer, [height * width // 32**2])
        return {"image": torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), "ids": ids, "labels": labels}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "images": [sample["image"] for sample in samples],
        "ids": pad([sample["ids"] for sample in samples], batch_first=True),
        "labels": pad([sample["labels"] for sample in samples], batch_first=True, padding_value=-100),
    }


def positions(image_ids: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
    """Positions as the native RoPE counts them, T alone: their cost is that of the real ones."""
    found = torch.zeros(len(image_ids), 3, dtype=torch.int64)
    found[:, 0] = torch.arange(len(image_ids))
    return found


def ours(shards: Path, side: int, row_length: int, exact: bool, workers: int = 0) -> NEODataModule:
    data = NEODataModule(
        str(TOKENIZER), [Source(str(shards))], row_length=row_length, min_pixels=side**2, max_pixels=side**2,
        workers=workers, exact_pixels=exact,
    )  # fmt: skip
    tokenizer = data.tokenizer
    data.input_spec = InputSpec(*image_token_ids(tokenizer), len(tokenizer), 16, 2, 3, positions)
    return data


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def rate(batches: Iterator[Any], size: Callable[[Any], tuple[int, int]], seconds: float) -> tuple[float, float]:
    """(samples, tokens) per second."""
    samples = tokens = 0
    start = time.perf_counter()
    while (gone := time.perf_counter() - start) < seconds or not samples:
        some, more = size(next(batches))
        samples, tokens = samples + some, tokens + more
    gone = time.perf_counter() - start
    return samples / gone, tokens / gone


def our_size(batch: Any) -> tuple[int, int]:
    return sum(map(len, batch.keys)), int((batch.document_ids >= 0).sum())


def plain_size(batch: Any) -> tuple[int, int]:
    return len(batch["images"]), int((batch["ids"] != 0).sum())


def shares(data: NEODataModule, batches: int) -> dict[str, float]:
    """Share of the time in each part."""
    spent: dict[str, float] = defaultdict(float)
    places = [
        (samples_module, "decode", "decode"), (samples_module, "resize", "resize"),
        (samples_module, "encode_conversation", "tokenise"), (rows_module, "pack", "pack"),
        (ShardFolder, "read", "read"),
    ]  # fmt: skip
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for (owner, name, function), (_, _, label) in zip(kept, places, strict=True):

        def timed(*args: Any, function: Any = function, label: str = label, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent[label] += time.perf_counter() - start

        setattr(owner, name, timed)
    try:
        loader = iter(data.train_dataloader())
        next(loader)
        spent.clear()
        start = time.perf_counter()
        for _ in range(batches):
            next(loader)
        total = time.perf_counter() - start
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)
    found = {label: spent[label] / total for _, _, label in places}
    return found | {"rest": 1 - sum(found.values())}


def worker_memory(data: NEODataModule, batches: int) -> tuple[float, float]:
    """(private, resident) memory in MB of a worker process after some batches, the larger of two workers."""
    loader = iter(data.train_dataloader())
    for _ in range(batches):
        next(loader)
    found = []
    for child in multiprocessing.active_children():
        facts = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()
        values = {line.split(":")[0]: int(line.split()[1]) / 1000 for line in facts if line.endswith("kB")}
        found.append((values["Private_Clean"] + values["Private_Dirty"], values["Rss"]))
    del loader
    return max(found)


def measure(side: int, seconds: float, folder: Path) -> None:
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(SAMPLES):
        (images / f"{number:04d}.jpg").write_bytes(photograph(side, number))
    files = sorted(images.glob("*.jpg"))
    shards = folder / "shards"
    write_shards(
        ({"key": f"s{n:04d}", "conversations": talk(n), "images": [file]} for n, file in enumerate(files)), shards
    )
    tokenizer = load_tokenizer(str(TOKENIZER))
    dataset = PlainDataset(images, side, tokenizer)
    row_length = BATCH * (len(dataset[SAMPLES - 1]["ids"]) + 8)
    loader = DataLoader(dataset, BATCH, shuffle=True, collate_fn=collate)
    arms: dict[str, tuple[Iterator[Any], Callable[[Any], tuple[int, int]]]] = {
        "plain": (endless(loader), plain_size),
        "ours, exact": (iter(ours(shards, side, row_length, True).train_dataloader()), our_size),
        "ours, fast": (iter(ours(shards, side, row_length, False).train_dataloader()), our_size),
    }
    results: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for batches, size in arms.values():
        rate(batches, size, seconds / 4)  # warm
    for _ in range(5):
        for name, (batches, size) in arms.items():
            results[name].append(rate(batches, size, seconds / 5))
    middle = {
        name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in results.items()
    }
    for name, (samples, tokens) in middle.items():
        faster = samples / middle["plain"][0]
        print(f"{side:5d}  {name:12s} {samples:10.1f} {tokens:12.0f} {faster:8.2f}x")
    for exact in (True, False):
        found = shares(ours(shards, side, row_length, exact), 6)
        text = ", ".join(f"{label} {100 * share:.0f} %" for label, share in found.items())
        print(f"       time, {'exact' if exact else 'fast'}: {text}")
    private, resident = worker_memory(ours(shards, side, row_length, False, workers=2), 8)
    print(f"       memory of a worker: {private:.0f} MB of its own, {resident:.0f} MB with what it shares")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=4.0, help="per arm and size")
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 448, 1024])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = next(
        (line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    print(f"{model.strip() or platform.machine()}, one thread, torch {torch.__version__}, Pillow {Image.__version__}")
    print(f"{'side':>5s}  {'loader':12s} {'samples/s':>10s} {'tokens/s':>12s} {'':>9s}")
    for side in options.sides:
        with tempfile.TemporaryDirectory() as folder:
            measure(side, options.seconds, Path(folder))


if __name__ == "__main__":
    main()

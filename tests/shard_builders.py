"""Small shards and loaders for the tests of ``neo_components.data``."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from neo_components.data import NEODataModule, Source, write_shards
from neo_components.types import Batch, DocumentTokens, InputSpec

TOKENIZER = str(Path(__file__).parent / "data" / "conversation" / "tokenizer")
IMAGE_IDS = (389, 390, 391)


def index_rule(document: DocumentTokens) -> Tensor:
    """Positions do not matter here: T counts tokens."""
    positions = torch.zeros(len(document.image_ids), 3, dtype=torch.int64)
    positions[:, 0] = torch.arange(len(document.image_ids))
    return positions


SPEC = InputSpec(*IMAGE_IDS, vocab_size=402, patch_size=16, fold=2, channels=3, index_rule=index_rule)
"""Fits the tokenizer in ``tests/data/conversation``."""


def png(height: int = 64, width: int = 64, color: tuple[int, int, int] = (200, 30, 60)) -> bytes:
    """The bytes of a PNG file of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def truncated_png() -> bytes:
    """A PNG file whose header is whole and whose pixels end early."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(buffer, "PNG")
    return buffer.getvalue()[:1500]


def gigantic_png() -> bytes:
    """A small file whose header announces 60000 x 60000 pixels."""
    data = bytearray(png(8, 8))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def turns(question: str = "What is it?", answer: str = "Red.") -> list[dict[str, str]]:
    """A conversation of one question and its answer."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def sample(key: str, images: Sequence[bytes] = (), question: str | None = None, answer: str = "Red.") -> dict[str, Any]:
    """A sample for ``write_shards``."""
    text = question if question is not None else "<image>" * len(images) + "What is it?"
    return {"key": key, "conversations": turns(text, answer), "images": list(images)}


def mixed_samples(count: int, prefix: str = "s", images: bool = True) -> list[dict[str, Any]]:
    """Samples of different lengths: text alone, one image, two images."""
    sizes = [[], [(64, 64)], [(64, 160)], [(64, 64), (96, 64)]] if images else [[]]
    return [
        sample(
            f"{prefix}{number:04d}",
            [png(*size, color=(number % 256, 7, 9)) for size in sizes[number % len(sizes)]],
            answer="It is " + "very " * (number % 7) + f"red {number}.",
        )
        for number in range(count)
    ]


def module(*folders: Path | str | Source, validation: Sequence[Path] = (), **arguments: Any) -> NEODataModule:
    """A DataModule over some folders, small rows, no worker processes."""
    train = [folder if isinstance(folder, Source) else Source(str(folder)) for folder in folders]
    options = {"seq_len": 128, "min_pixels": 4096, "max_pixels": 16384, "workers": 0, "shuffle": 20, **arguments}
    data = NEODataModule(TOKENIZER, train, [Source(str(folder)) for folder in validation], **options)
    data.input_spec = SPEC
    return data


def take(data: NEODataModule, batches: int) -> list[Batch]:
    """The next batches of training."""
    found: list[Batch] = []
    for batch in data.train_dataloader():
        found.append(batch)
        if len(found) == batches:
            break
    return found


def keys(batches: Sequence[Batch]) -> list[list[list[str]]]:
    """The keys of the samples of each row of each batch."""
    return [batch.keys for batch in batches]


def write(folder: Path, samples: Sequence[dict[str, Any]], max_per_shard: int = 10) -> Path:
    """A new folder of shards."""
    write_shards(samples, folder, max_per_shard)
    return folder


def tar(path: Path, members: dict[str, bytes]) -> Path:
    """A shard written by someone else: members by name, as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))
    return path


def content(question: str = "What is it?", answer: str = "Red.") -> bytes:
    """The JSON of a sample."""
    return json.dumps({"conversations": turns(question, answer)}).encode()


def raw_samples(images: dict[str, list[bytes]], questions: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """Members of a shard: one sample for each key, with these images unchecked; ``questions`` replaces its JSON."""
    members = {}
    for key, files in images.items():
        members[f"{key}.json"] = (questions or {}).get(key, content("<image>" * len(files)))
        for number, data in enumerate(files):
            members[f"{key}.png" if len(files) == 1 else f"{key}.{number}.png"] = data
    return members

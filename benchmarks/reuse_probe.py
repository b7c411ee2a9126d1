"""Linear probes on frozen visual features: how much of a task's labels a linear map reads off.

Every picture is squeezed to a square, passes the pre-Buffer alone, and gives one vector: the mean of its visual tokens
(``pooled``), or all of them side by side (``unpooled``). A ridge classifier (one-hot targets, penalty by the errors of
left-out training pictures) is fitted for each label of the task; the error is the mean over the labels of the fraction
of test pictures that it gets wrong.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from reuse_tasks import test_folder, train_folder
from torch import Tensor

from neo_components.components.pre_buffer import PreBuffer
from neo_components.data.image.images import load_image
from neo_components.data.packing import pack
from neo_components.data.shards.folder import read_shards
from neo_components.types import InputSpec, Sample

PICTURES = 700
"""Most training pictures."""
PENALTIES = tuple(10.0**power for power in range(-3, 4))
"""Relative to the mean eigenvalue of the features' products."""
FEATURES = ("pooled", "unpooled")
SEEN = 3
"""Training pictures that a class needs, so that it is counted."""


@dataclass
class Probe:
    """Errors of the probes on one pre-Buffer's features of one task, 0 to 1: ``errors`` by label, and their mean.

    ``asset`` is the SHA-256 of the source's weights, ``data`` that of the task's samples.
    """

    source: str
    asset: str
    weights: str
    task: str
    data: str
    seed: int
    pixels: int
    features: str
    error: float
    errors: dict[str, float]

    @property
    def key(self) -> tuple[Any, ...]:
        """What distinguishes it from other probes: not the source's name, but its weights."""
        return self.asset, self.weights, self.task, self.data, self.seed, self.pixels, self.features


def probe(root: Path, asset: str, which: Probe, wanted: Sequence[str] = FEATURES) -> list[Probe]:
    """Fits the probes of one task.

    Args:
        root: folder of the benchmark.
        asset: folder, hub id or name.
        which: the probe without its errors: weights (``reused``, or new ones of the same shapes, ``random`` or
            ``whitened``), task, seed of new weights, pixels of every image.
        wanted: of ``FEATURES``.
    """
    train, test = pictures(train_folder(root, which.task)), pictures(test_folder(root, which.task))
    images = [[_square(data, which.pixels) for data, _ in some] for some in (train, test)]
    pre_buffer = weights_of(asset, which.weights, which.seed, images[0])
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        tokens = [features_of(pre_buffer, some) for some in images]
    found = []
    for features in wanted:
        x, y = (some.mean(1) if features == "pooled" else some.flatten(1) for some in tokens)
        errors = {}
        for label in sorted({name for _, labels in train for name in labels}):
            error = label_error(x, [labels.get(label) for _, labels in train], y, [ls.get(label) for _, ls in test])
            if error is not None:
                errors[label] = round(error, 4)
        mean = round(sum(errors.values()) / len(errors), 4)
        found.append(replace(which, features=features, error=mean, errors=errors))
    return found


@torch.inference_mode()
def features_of(pre_buffer: PreBuffer, images: Sequence[Tensor], together: int = 50) -> Tensor:
    """Visual tokens [n, T, D] of images [3, H, W] of one size, as ``attach.image_features`` has them, in less time."""
    embedding: Any = pre_buffer.patch_embedding
    spec = InputSpec(
        0, 1, 2, vocab_size=3, patch_size=embedding.patch_size, fold=embedding.fold, channels=embedding.channels,
        index_rule=pre_buffer.rotary.variant.positions, image_layout=embedding.image_layout,
    )  # fmt: skip
    count = spec.image_tokens(*images[0].shape[-2:])
    token_ids = torch.tensor([1, *[0] * count, 2], device="cpu")
    found = []
    for start in range(0, len(images), together):
        some = images[start : start + together]
        batch = pack([Sample(token_ids, None, [image]) for image in some], spec)
        visual = embedding(batch.patches, batch.patch_positions, batch.indices.ids["image_grids"])
        ends = pre_buffer.boundary[:, None, None].expand(2, len(some), 1, -1)
        x = torch.cat([ends[0], visual.unflatten(0, (len(some), count)), ends[1]], 1).flatten(0, 1)[None]
        where = (batch.positions, batch.document_ids, batch.image_ids, batch.token_kinds)
        x = pre_buffer(x, *where, known=batch.known)[0].unflatten(0, (len(some), count + 2))
        found.append(x[:, 1:-1].float())
    return torch.cat(found)


def weights_of(source: str, weights: str, seed: int, images: list[Tensor]) -> PreBuffer:
    """An asset, or new weights of its shapes; ``whitened`` on images [3, H, W].

    Raises:
        ValueError: if the asset's patch embedding cannot be whitened.
    """
    asset = PreBuffer.from_pretrained(source)
    if weights == "reused":
        return asset
    old: Any = asset.patch_embedding
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new, embedding = PreBuffer(**asset.hparams), type(old)(**old.hparams)
    new.adopt(embedding)
    if weights == "whitened":
        side = embedding.patch_size
        cut = [image.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(2) for image in images]
        embedding.whiten(torch.cat([patches.flatten(0, 1) for patches in cut])[:20_000])
    return new


def pictures(folder: Path) -> list[tuple[bytes, dict[str, str]]]:
    """The different pictures of a folder of shards, with their labels."""
    found = {}
    for sample in read_shards(folder):
        found[hashlib.sha256(sample["images"][0]).digest()] = (sample["images"][0], sample["labels"])
    return list(found.values())[:PICTURES]


def _square(data: bytes, pixels: int) -> Tensor:
    """[3, S, S], normalized."""
    side = int(pixels**0.5)
    with Image.open(io.BytesIO(data)) as image:
        return load_image(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), side, pixels, pixels)


def label_error(x: Tensor, labels: list[str | None], y: Tensor, wanted: list[str | None]) -> float | None:
    """Error of a ridge classifier on test features y [m, F], trained on x [n, F].

    Pictures without the label, and those of classes with fewer than ``SEEN`` training pictures, are left out; ``None``
    if fewer than two classes or no test pictures are left.
    """
    counts = Counter(label for label in labels if label is not None)
    classes = sorted(name for name, count in counts.items() if count >= SEEN)
    rows = [row for row, label in enumerate(labels) if label in classes]
    asked = [row for row, label in enumerate(wanted) if label in classes]
    if len(classes) < 2 or not asked:
        return None
    targets = torch.tensor([classes.index(str(labels[row])) for row in rows], device="cpu")
    truth = torch.tensor([classes.index(str(wanted[row])) for row in asked], device="cpu")
    return float((ridge_classes(x[rows], targets, y[asked]) != truth).double().mean())


def ridge_classes(x: Tensor, targets: Tensor, y: Tensor) -> Tensor:
    """Classes [m] of y [m, F] by ridge regression on one-hot targets [n] of x [n, F].

    The penalty is the one with the fewest errors on left-out rows, by the diagonal of the projection.
    """
    x, y = x.double(), y.double()
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    x, y = (x - mean) / scale, (y - mean) / scale
    hot = torch.nn.functional.one_hot(targets).double()
    middle = hot.mean(0)
    values, vectors = torch.linalg.eigh(x @ x.T)
    values = values.clamp(min=0)
    along = vectors.T @ (hot - middle)
    best, fewest = PENALTIES[0], len(x) + 1
    for penalty in PENALTIES:
        kept = values / (values + penalty * values.mean())
        own = (vectors.square() * kept).sum(1) + 1 / len(x)
        missed = (hot - middle) - vectors @ (kept[:, None] * along)
        left_out = hot - missed / (1 - own).clamp(min=1e-9)[:, None]
        wrong = int((left_out.argmax(1) != targets).sum())
        if wrong < fewest:
            best, fewest = penalty, wrong
    dual = vectors @ (along / (values + best * values.mean())[:, None])
    return ((y @ x.T) @ dual + middle).argmax(1)

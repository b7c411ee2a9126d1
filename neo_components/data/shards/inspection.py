"""What is in a folder of shards, and what training would leave out of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_components.data.image.files import open_image
from neo_components.data.limits import MAX_PIXELS, MIN_PIXELS
from neo_components.data.plan.lengths import Lengths, folder_lengths
from neo_components.data.samples import SampleMaker
from neo_components.data.shards.folder import ShardFolder, open_folder
from neo_components.data.skip_counts import SampleError
from neo_components.storage.progress import progress
from neo_components.types import InputSpec, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAG_VALUES = 12
"""Most different values that a further value of samples may have to be counted as a tag."""

NAMED = 5
"""Samples named for each reason."""


@dataclass
class Findings:
    """What :func:`inspect_folder` found.

    Args:
        samples: number of samples.
        images: number of images in each sample, and how often.
        sizes: [images, 2] height and width in pixels.
        lengths: in tokens, of the usable samples.
        visual: visual tokens of the same.
        skipped: reason -> (how many, keys of the first).
        tags: name -> value -> how often, of the further values of samples that look like tags (language, kind, ...).
        shown: some samples as the model reads them.
    """

    samples: int
    images: Counter[int] = field(default_factory=Counter)
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    visual: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    skipped: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    tags: dict[str, Counter[str]] = field(default_factory=dict)
    shown: list[Sample] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A summary for the terminal."""
        found = [f"samples {self.samples}, usable {len(self.lengths)}"]
        found.append("images in a sample: " + ", ".join(f"{n}: {count}" for n, count in sorted(self.images.items())))
        if len(self.sizes):
            low, middle, high = np.percentile(self.sizes, (0, 50, 100), axis=0).astype(int)
            found.append(f"height x width: {low[0]}x{low[1]} to {high[0]}x{high[1]}, median {middle[0]}x{middle[1]}")
        if len(self.lengths):
            points = np.percentile(self.lengths, (0, 50, 95, 100)).astype(int)
            found.append("tokens: least {}, median {}, 95 % up to {}, most {}".format(*points))
            total = int(self.lengths.sum(dtype="int64"))
            found.append(f"tokens in all {total}, of them visual {int(self.visual.sum(dtype='int64'))}")
        for name, counts in self.tags.items():
            found.append(f"{name}: " + ", ".join(f"{value}: {count}" for value, count in counts.most_common()))
        for reason, (count, names) in sorted(self.skipped.items()):
            found.append(f"skipped ({reason}) {count}: {', '.join(names)}{' ...' if count > len(names) else ''}")
        return found


def inspect_folder(
    folder: str | PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    spec: InputSpec,
    *,
    seq_len: int = 4096,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    max_length: int | None = None,
    decode: bool = False,
    show: int = 10,
    workers: int = 0,
) -> Findings:
    """Looks at every sample of a folder.

    Args:
        folder: of shards.
        tokenizer: from ``load_tokenizer``.
        spec: of the model that is to be trained.
        seq_len: tokens of a packed sequence, L: longer samples would be skipped.
        min_pixels: smallest area of an image after resizing, in pixels.
        max_pixels: largest area of a single image, in pixels.
        max_length: longer samples are cut to this many tokens.
        decode: also decode the pixels of every image, which is slow but finds truncated ones.
        show: samples that are prepared to be shown, evenly spaced over the usable ones.
        workers: processes that count lengths.

    Raises:
        FileNotFoundError: if there are no shards.
        ValueError: if a shard is damaged or must not be read.
    """
    shards = open_folder(folder)
    maker = SampleMaker(tokenizer, spec, min_pixels, max_pixels, max_length)
    lengths = folder_lengths(shards, maker, workers)
    found = Findings(len(shards))
    _look(shards, lengths, found, maker if decode else None, seq_len)
    tokens = np.asarray(lengths.table[0])
    usable = np.flatnonzero((tokens > 0) & (tokens <= seq_len))
    found.lengths, found.visual = tokens[usable], np.asarray(lengths.table[1])[usable]
    few = min(show, len(usable))
    for position in sorted(set(np.linspace(0, len(usable) - 1, few).astype(int).tolist())) if few else ():
        try:
            found.shown.append(maker.finish(maker.draft(shards.read(int(usable[position])))))
        except SampleError:
            continue  # counted already, if pixels were decoded
    return found


def _look(shards: ShardFolder, lengths: Lengths, found: Findings, decoder: SampleMaker | None, seq_len: int) -> None:
    """Reads every sample once."""
    sizes: list[tuple[int, int]] = []
    tags: dict[str, Counter[str]] = {}
    with progress(f"reading {shards.folder}" if len(shards) > 5000 else None, len(shards)) as bar:
        for number in range(len(shards)):
            reason = lengths.reason(number)
            if reason is None and lengths.table[0, number] > seq_len:
                reason = "too_long"
            try:
                raw = shards.read(number)
                found.images[len(raw["images"])] += 1
                _count_tags(raw, tags)
                if decoder is not None and reason is None:
                    decoder.finish(decoder.draft(raw))
                for data in raw["images"]:
                    image = open_image(data)
                    sizes.append((image.height, image.width))
            except SampleError as error:
                reason = reason or error.reason
            if reason is not None:
                count, names = found.skipped.get(reason, (0, []))
                more = [shards.name(number).rpartition("/")[2]] if len(names) < NAMED else []
                found.skipped[reason] = (count + 1, names + more)
            bar.advance()
    found.sizes = np.array(sizes, np.int64).reshape(-1, 2)
    found.tags = {name: counts for name, counts in sorted(tags.items()) if 0 < len(counts) <= TAG_VALUES}


def _count_tags(raw: dict[str, Any], tags: dict[str, Counter[str]]) -> None:
    """Counts the further values of a sample; names with too many different ones are no tags, and are forgotten."""
    for name, value in raw.items():
        if name in ("key", "id", "index", "conversations", "images", "frames"):
            continue
        values = value if isinstance(value, list) else [value]
        counts = tags.setdefault(name, Counter())
        if len(counts) <= TAG_VALUES:
            counts.update(str(one) for one in values if isinstance(one, str | bool | int))

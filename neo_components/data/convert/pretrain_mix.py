"""The pretraining mix: pictures of all sources (``data/pictures``), distorted, with their questions, as shards.

A record is a source and a number; its sample depends on nothing but seed, split, source and number, so parts are
written in any order, in several processes, and an interrupted run goes on.
"""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from neo_components.data.convert.base import Converter, Samples
from neo_components.data.pictures.distortions import distort
from neo_components.data.pictures.packages import PACKAGES
from neo_components.data.pictures.picture import HELD_OUT, TRAIN, Picture, PictureSource
from neo_components.data.shards.format import RawSample
from neo_components.data.skip_counts import SampleError
from neo_components.errors import ArgumentError, one_of
from neo_components.registry import PICTURES

VALIDATION = "validation"
PARTS = (TRAIN, VALIDATION, HELD_OUT)

WEIGHTS: dict[str, float] = {
    "clip_art": 3.0, "icon_scenes": 3.0, "icons": 2.0, "lettering": 2.0, "scenes": 1.5, "charts": 1.5, "easy_vqa": 0.5,
}  # fmt: skip
"""Sampling weights of the sources that are not 1."""

SHORT = 24
"""Characters of the longest answer in the held-out part, where answers are compared with exact match."""

_VALIDATION_FROM = 1_000_000_000
_TRIES = 50
_STEP = 1_000_003
"""Distance to the number that is drawn instead of one that cannot be used: not one that another record draws soon."""


@dataclass
class PretrainMix(Converter):
    """Pictures of all sources with their questions.

    Args:
        packages: Folder that ``prepare`` of ``data/pictures/packages.py`` has made.
        pairs: Number of pictures, each with its conversation.
        part: train, validation (other distortions and questions; of sources without end, other pictures) or held_out.
        seed: The same seed gives the same samples.
        weights: Sampling weight by source; sources that are not named have the weight of ``WEIGHTS``, else 1.

    Raises:
        ValueError: if a part, a source or a number is not possible.
    """

    shard_size: ClassVar[int] = 2_000

    packages: Path
    pairs: int = 300_000
    part: str = TRAIN
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("part", self.part, PARTS)
        if self.pairs < 1:
            raise ArgumentError("pairs", f"must be 1 or more, got {self.pairs}")
        self.weights = {name: weight for name, weight in complete_weights(self.weights).items() if weight}
        for name in self.weights:
            source(name, self.packages)  # once, before the processes that write are forked
        if self.part == HELD_OUT:
            self.weights = {n: w for n, w in self.weights.items() if source(n, self.packages).items(HELD_OUT) != 0}
            if not self.weights:
                raise ArgumentError("weight", "must be above 0 for a source with a held-out part, these have none")

    def records(self) -> Iterator[tuple[str, int]]:
        """Sources in a mixed order, each with its own numbers."""
        rng = random.Random(f"pretrain mix {self.seed} {self.part}")
        names, weights = list(self.weights), list(self.weights.values())
        numbers = Counter(dict.fromkeys(names, _VALIDATION_FROM if self.part == VALIDATION else 0))
        for _ in range(self.pairs):
            name = rng.choices(names, weights)[0]
            yield name, numbers[name]
            numbers[name] += 1

    def samples(self, number: int, record: tuple[str, int]) -> Samples:
        """The sample of a record."""
        name, index = record
        yield f"{name} {index}", lambda: self.sample(record)

    def sample(self, record: tuple[str, int]) -> RawSample:
        """Draws a picture; one that cannot be used is replaced by another of the same source.

        Raises:
            SampleError: (a ``ValueError``) if many in a row cannot be used.
        """
        name, index = record
        for attempt in range(_TRIES):
            number = index + attempt * _STEP
            rng = random.Random(f"{self.seed} {self.part} {name} {number}")
            try:
                picture = source(name, self.packages).draw(number, HELD_OUT if self.part == HELD_OUT else TRAIN, rng)
                turns = self._turns(picture)
            except SampleError as error:
                fault = error
                continue
            image = distort(picture, rng)
            turns = [("<image>\n" + turns[0][0], turns[0][1]), *turns[1:]]
            return {
                "key": f"{name}-{index:09d}",
                "conversations": [
                    {"from": who, "value": text}
                    for turn in turns
                    for who, text in zip(("human", "gpt"), turn, strict=True)
                ],
                "images": [encode(image)],
                "source": name,
                "kind": picture.kind,
            }
        raise SampleError(
            f"{_TRIES} pictures of {name} in a row cannot be used, the last because: {fault}", fault.reason
        )

    def _turns(self, picture: Picture) -> Sequence[tuple[str, str]]:
        if self.part != HELD_OUT:
            return picture.turns
        if picture.kind == "caption" or len(picture.turns[-1][1]) > SHORT:
            raise SampleError("its answer is too long for exact match", "no_answer")
        return picture.turns[-1:]

    def total(self) -> int:
        """Number of the pictures."""
        return self.pairs

    @property
    def sources(self) -> list[Path]:
        """The folder of packages."""
        return [self.packages]

    def identity(self) -> dict[str, Any]:
        """Seed, part, weights and the checksums of the packages, wherever they lie."""
        needs = sorted({package for name in self.weights for package in PICTURES[name].needs})
        return {
            "converter": "pretrain_mix",
            "options": {"pairs": self.pairs, "part": self.part, "seed": self.seed, "weights": dict(self.weights)},
            "packages": {name: PACKAGES[name].sha256 for name in needs},
        }


def complete_weights(given: Mapping[str, float]) -> dict[str, float]:
    """The sampling weights of all registered sources; those of weight 0 are left out of a mix.

    Raises:
        ArgumentError: (a ``ValueError``) if a source is unknown, a weight negative, or all are 0.
    """
    for name, weight in given.items():
        one_of("weight", name, sorted(PICTURES))
        if not weight >= 0:
            raise ArgumentError("weight", f"of {name} must be 0 or more, got {weight}")
    weights = {name: float(given.get(name, WEIGHTS.get(name, 1.0))) for name in sorted(PICTURES)}
    if not any(weights.values()):
        raise ArgumentError("weight", f"must be above 0 for at least one of {', '.join(sorted(PICTURES))}")
    return weights


@cache
def source(name: str, packages: Path) -> PictureSource:
    """A source, made once in a process."""
    made: PictureSource = PICTURES.make(name, packages=packages)
    return made


def encode(image: Image.Image) -> bytes:
    """An image file: PNG where there are few colors, as in flat drawings; otherwise JPEG."""
    file = io.BytesIO()
    if image.getcolors(256) is not None:
        image.save(file, "PNG", compress_level=6)
    else:
        image.save(file, "JPEG", quality=90)
    return file.getvalue()

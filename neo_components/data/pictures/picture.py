"""What a source of pictures is: drawings, icons, lettering, charts ... that the pretraining mix draws from.

A source is registered in ``PICTURES``: one file and one registration. It draws the picture of any number on its own, so
that the mix is written in parts, in several processes, and goes on where it stopped.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

TRAIN, HELD_OUT = "train", "held_out"
SPLITS = (TRAIN, HELD_OUT)
"""``held_out`` has what no picture of ``train`` shows: other drawings, a whole set of icons, whole font families."""

COLOR, TURN, MIRROR, FRAME, DETAIL = "color", "turn", "mirror", "frame", "detail"
"""What answers can rest on, and no distortion may then change: colors; which way is up; left and right; what is at the
margins and where in the frame (crops); fine print (blur, noise and low resolution are kept mild)."""


@dataclass(frozen=True)
class Picture:
    """A picture and what is asked about it.

    Args:
        image: mode RGB, or RGBA if it has no background of its own. Longest side 64 to 256 pixels.
        turns: (question, answer) pairs, one to four, in the order in which they are asked.
        kind: of the questions, for reports by kind: ``name``, ``text``, ``count`` ...
        keeps: what distortions must not change, of COLOR, TURN, MIRROR, FRAME and DETAIL.
    """

    image: Image.Image
    turns: tuple[tuple[str, str], ...]
    kind: str
    keeps: frozenset[str] = frozenset()


class PictureSource:
    """Base class of sources.

    Args:
        packages: folder with the unpacked packages of ``packages.PACKAGES``, one folder for each by its name.

    Attributes:
        license: SPDX name of the license of the material.
        origin: where it comes from, for the data card.
        needs: names of the packages that it reads.

    Raises:
        FileNotFoundError: if a package is not there; the message states how to get it.
    """

    license: ClassVar[str]
    origin: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, packages: Path) -> None:
        self.packages = packages

    def items(self, split: str) -> int | None:
        """Number of different things that it has for a split (drawings, fonts); ``None`` if it draws without end."""
        raise NotImplementedError(f"{type(self).__name__} must define items()")

    def draw(self, number: int, split: str, rng: random.Random) -> Picture:
        """Draws a picture.

        Args:
            number: from 0 on; sources with items take item ``number % items(split)``.
            split: one of :data:`SPLITS`.
            rng: the only source of randomness; the mix seeds it by source, split and number.

        Raises:
            SampleError: (a ``ValueError``) if this item cannot be used; the mix counts it and takes the next.
        """
        raise NotImplementedError(f"{type(self).__name__} must define draw()")

"""Random changes to the images of training, by torchvision's transforms; all are off unless a recipe asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Augment:
    """Changes each image of training at random, before it is resized. All images of a sample are changed alike.

    Args:
        flip: chance of a mirrored image. Left and right are swapped, and writing becomes unreadable.
        color: brightness, contrast and saturation change by a factor between ``1 - color`` and ``1 + color``.
        jpeg_quality: least and greatest quality of a JPEG compression, 1 to 100; ``None`` compresses none.

    Raises:
        ValueError: listing every number that is out of its range.
    """

    flip: float = 0.0
    color: float = 0.0
    jpeg_quality: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        quality = self.jpeg_quality
        wrong = [
            f"augment.{name} must be {rule}, got {getattr(self, name)}"
            for name, rule, right in (
                ("flip", "from 0 to 1", 0 <= self.flip <= 1),
                ("color", "from 0 to 1", 0 <= self.color <= 1),
                ("jpeg_quality", "two of 1 to 100 in order", quality is None or 1 <= quality[0] <= quality[1] <= 100),
            )
            if not right
        ]
        if wrong:
            raise ValueError("; ".join(wrong))

    def __call__(self, pixels: np.ndarray, seed: Sequence[int]) -> np.ndarray:
        """Changes one image.

        Args:
            pixels: [H, W, 3] uint8.
            seed: the same seed makes the same change.

        Returns:
            [H, W, 3] uint8.
        """
        steps = self._steps()
        if not steps:
            return pixels
        image = torch.from_numpy(np.require(pixels, requirements="W")).permute(2, 0, 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
            for step in steps:
                image = step(image)
        return image.permute(1, 2, 0).contiguous().numpy()

    def _steps(self) -> list[Any]:
        """The transforms that do something. Each draws as often for every image, so a sample's images change alike."""
        from torchvision.transforms import v2

        steps: list[Any] = []
        if self.flip:
            steps.append(v2.RandomHorizontalFlip(self.flip))
        if self.color:
            steps.append(v2.ColorJitter(self.color, self.color, self.color))
        if self.jpeg_quality is not None:
            steps.append(v2.JPEG(list(self.jpeg_quality)))
        return steps

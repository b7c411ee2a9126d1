"""The sources of a run and their sampling weights: from a recipe's numbers, a temperature, and a fraction of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Source:
    """A folder of shards and its sampling weight.

    Args:
        shards: a folder of shards, local or remote (``s3://bucket/folder``, ``https://host/folder``, ...).
        weight: sampling weight relative to the other sources; any positive number.
    """

    shards: str
    weight: float = 1.0


def source_names(sources: Sequence[Source]) -> list[str]:
    """A short name for each source, for logs: the last part of its address, and more of it where two end alike.

    The same folder named twice has one name.
    """
    parts = [source.shards.rstrip("/").split("/") for source in sources]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        taken = next(n for n in range(1, len(own) + 1) if n == len(own) or all(o[-n:] != own[-n:] for o in others))
        names.append("/".join(own[-taken:]))
    return names


def mixture(
    sources: Sequence[Source],
    sizes: Sequence[int],
    has_images: Sequence[bool],
    temperature: float | None = None,
    text_fraction: float | None = None,
) -> list[float]:
    """The sampling weights of the sources; they add up to 1.

    Args:
        sources: with their weights as given.
        sizes: usable samples of each.
        has_images: whether each has any image.
        temperature: T multiplies each weight by ``size ** (1 / T)``: 1 mixes by size, a large T by the weights alone,
            as does ``None``. Source: Arivazhagan et al., 2019 (arXiv 1907.05019).
        text_fraction: weight of all sources without images together, so 0.3 is 3:7 of text to multimodal; within the
            two kinds the weights stay as they are. ``None`` leaves all weights as they are.

    Raises:
        ValueError: if ``text_fraction`` is given and all sources are of one kind.
    """
    weights = [source.weight for source in sources]
    if temperature is not None:
        weights = [weight * size ** (1 / temperature) for weight, size in zip(weights, sizes, strict=True)]
    if text_fraction is not None:
        kinds = {True: 1 - text_fraction, False: text_fraction}
        sums = {kind: sum(w for w, has in zip(weights, has_images, strict=True) if has is kind) for kind in kinds}
        if not all(sums.values()):
            names = ", ".join(source.shards for source in sources)
            kind = "with images" if sums[True] else "of text alone"
            raise ValueError(
                f"text_fraction is {text_fraction:g}, but all of data.train ({names}) are sources {kind}; add one of "
                "the other kind or take text_fraction away"
            )
        weights = [weight * kinds[has] / sums[has] for weight, has in zip(weights, has_images, strict=True)]
    return [weight / sum(weights) for weight in weights]

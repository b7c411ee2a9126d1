"""How language models stretch their rotary frequencies to contexts longer than those they were first trained on.

A scaling is a plain mapping, as in a Hugging Face config with nothing left out: ``rope_type`` and its numbers. Two of
them, ``longrope`` and ``dynamic``, rotate a long document by other frequencies than a short one:
:func:`length_bucket_of` gives the rope length bucket of a document, the set of frequencies that its length selects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from neo_components.errors import ArgumentError

ORIGINAL = "original_max_position_embeddings"

Scaling = Mapping[str, Any]

NUMBERS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor", ORIGINAL}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", ORIGINAL}, set()),
    "yarn": (
        {"factor", ORIGINAL},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "longrope": ({"short_factor", "long_factor", ORIGINAL}, {"factor", "attention_factor"}),
}
"""By ``rope_type``: what a scaling must say and what it may say. Lengths are T positions."""


def check_scaling(scaling: Scaling, width: int) -> None:
    """Looks whether a scaling is complete and known.

    Args:
        scaling: the mapping.
        width: T channels that turn.

    Raises:
        ValueError: naming what is unknown, missing or of the wrong length.
    """
    kind = scaling.get("rope_type")
    if kind not in NUMBERS:
        raise ArgumentError("rope_scaling", f"of rope_type {kind!r} is not supported (supported: {', '.join(NUMBERS)})")
    must, may = NUMBERS[kind]
    given = {name for name, value in scaling.items() if value is not None} - {"rope_type"}
    if missing := must - given:
        raise ArgumentError("rope_scaling", f"of rope_type {kind!r} lacks {', '.join(sorted(missing))}")
    if unknown := given - must - may:
        raise ArgumentError("rope_scaling", f"of rope_type {kind!r} does not know {', '.join(sorted(unknown))}")
    if kind == "dynamic" and width < 4:
        raise ArgumentError("rope_scaling", f"of rope_type 'dynamic' needs 4 or more turning channels, got {width}")
    for name in ("short_factor", "long_factor"):
        if name in given and len(scaling[name]) != width // 2:
            raise ArgumentError("rope_scaling", f"{name} must have {width // 2} numbers, got {len(scaling[name])}")


def length_bucket_of(scaling: Scaling | None, length: int) -> int:
    """Which set of frequencies a document of ``length`` T positions gets; equal numbers, equal frequencies.

    0 is that of short documents. ``longrope`` has one other, ``dynamic`` one for every length beyond the original.
    """
    if scaling is None or scaling["rope_type"] not in ("longrope", "dynamic") or length <= scaling[ORIGINAL]:
        return 0
    return 1 if scaling["rope_type"] == "longrope" else length


def frequencies(scaling: Scaling | None, width: int, base: float, length_bucket: int = 0) -> Tensor:
    """Radians per position of the pairs of ``width`` channels.

    Args:
        scaling: ``None`` for ``base ** (-2k / width)``.
        width: T channels that turn.
        base: of the unscaled frequencies.
        length_bucket: from :func:`length_bucket_of`.

    Returns:
        [width / 2] float32.
    """
    if scaling is None:
        return 1.0 / powers(width, base)
    return _SCALED[scaling["rope_type"]](scaling, width, base, length_bucket)


def powers(width: int, base: float) -> Tensor:
    """``base ** (2k / width)``, [width / 2] float32: the inverses of the unscaled frequencies."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    return torch.as_tensor(base, dtype=torch.float32, device="cpu") ** exponents


def magnitude(scaling: Scaling | None) -> float:
    """What the turned channels are multiplied by (queries and keys alike): 1 but for ``yarn`` and ``longrope``."""
    kind = None if scaling is None else scaling["rope_type"]
    if scaling is None or kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor = scaling.get("factor")
    if kind == "yarn":
        part, whole = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if part and whole:
            return _yarn_magnitude(factor, part) / _yarn_magnitude(factor, whole)
        return _yarn_magnitude(factor, 1.0)
    if factor is None or factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(scaling[ORIGINAL]))


def _yarn_magnitude(factor: Any, weight: float) -> float:
    """Peng et al. 2023, equation 22."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _linear(scaling: Scaling, width: int, base: float, length_bucket: int) -> Tensor:
    return 1.0 / powers(width, base) / scaling["factor"]


def _dynamic(scaling: Scaling, width: int, base: float, length_bucket: int) -> Tensor:
    """A larger base the longer the document (NTK-aware scaling)."""
    if not length_bucket:
        return 1.0 / powers(width, base)
    factor, original = scaling["factor"], scaling[ORIGINAL]
    stretch = torch.tensor(float(factor * length_bucket), device="cpu") / original - (factor - 1)
    return 1.0 / powers(width, base * stretch ** (width / (width - 2)))


def _llama3(scaling: Scaling, width: int, base: float, length_bucket: int) -> Tensor:
    """Long waves are stretched, short ones kept, those between mixed (Llama 3.1)."""
    plain, original = 1.0 / powers(width, base), scaling[ORIGINAL]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * plain / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / scaling["factor"] + share * plain


def _yarn(scaling: Scaling, width: int, base: float, length_bucket: int) -> Tensor:
    """A ramp over the pairs from kept to stretched frequencies (Peng et al. 2023, section 3.2)."""

    def pair(turns: float) -> float:
        """The pair, as a real number, that turns that often over the original context."""
        return width * math.log(scaling[ORIGINAL] / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair(scaling.get("beta_fast") or 32), pair(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001  # a step instead of a division by zero
    stretched = ((torch.arange(width // 2, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(0, 1)
    kept = 1 - stretched
    waves = powers(width, base)
    return (1.0 / (scaling["factor"] * waves)) * (1 - kept) + (1.0 / waves) * kept


def _longrope(scaling: Scaling, width: int, base: float, length_bucket: int) -> Tensor:
    """A factor of its own for every pair, one list for short and one for long documents (Ding et al. 2024)."""
    factors = torch.tensor(
        scaling["long_factor" if length_bucket else "short_factor"], dtype=torch.float32, device="cpu"
    )
    return 1.0 / (factors * powers(width, base))


_SCALED: dict[str, Callable[[Scaling, int, float, int], Tensor]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}

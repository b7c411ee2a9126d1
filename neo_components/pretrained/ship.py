"""Adds an exported pre-Buffer to the assets that ship: float16, checksums in ``assets/index.json``."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from neo_components.components.pre_buffer import PreBuffer
from neo_components.model.attach import image_features
from neo_components.storage import pretrained
from neo_components.storage.hub import PREFIX
from neo_components.storage.pretrained import Pretrained, StoredFile, list_pretrained, write_index

LARGEST = 40 * 10**6
"""Bytes of an asset that ships; a larger one lies on the hub."""
LARGEST_CHANGE = 0.01
"""Relative change of the features of an image by float16, above which an asset is refused."""
NAME = re.compile(r"[a-z][a-z0-9_-]*")
HERE = "THIS_FOLDER"
"""What an exported model card calls its own folder."""


def ship(
    folder: str | Path,
    name: str,
    description: str,
    assets: Path | None = None,
    hub: str = "",
    trained_for: str = "",
) -> Pretrained:
    """Writes an asset in float16 to ``assets/NAME`` and lists it in the index; one of the same name is replaced.

    Args:
        folder: an exported asset, with license, anchors and provenance.
        name: lower case letters, digits, ``-`` and ``_``.
        description: what it is for, in a sentence.
        assets: folder of the assets that ship, with its index; ``None``: that of this library.
        hub: hub id under which ``folder`` is published as it is; only its checksums are kept then.
        trained_for: steps and data in words, if those of its provenance say too little; ``1,800 steps on ...``.

    Raises:
        FileNotFoundError: if there is no asset, or no index.
        ValueError: if it is too large, lacks what users must know, or float16 changes what it computes.
    """
    assets = assets or pretrained.assets_folder()
    if not NAME.fullmatch(name):
        raise ValueError(f"name must be lower case letters, digits, '-' and '_', got {name!r}")
    if not description.strip():
        raise ValueError("description is empty; say in a sentence what the asset is for")
    exact = PreBuffer.from_pretrained(folder)
    _check_facts(exact, str(folder))
    listed = list_pretrained(assets)
    with tempfile.TemporaryDirectory() as place:
        written = Path(folder) if hub else _write_half(exact, Path(folder), name, Path(place) / name)
        entry = Pretrained(
            description.strip(), trained_for.strip() or trained_on(exact.info.provenance), exact.info.license,
            sum(parameter.numel() for parameter in exact.parameters()),
            {path.name: StoredFile.of(path) for path in sorted(written.iterdir()) if path.is_file()}, hub,
        )  # fmt: skip
        if not hub and entry.bytes > LARGEST:
            raise ValueError(
                f"{folder} has {entry.bytes:,} bytes in float16, and at most {LARGEST:,} ship; publish it with "
                "push_to_hub and give its hub id"
            )
        shutil.rmtree(assets / name, ignore_errors=True)
        if not hub:
            shutil.copytree(written, assets / name)
    write_index(listed | {name: entry}, assets)
    return entry


def trained_on(provenance: Mapping[str, Any]) -> str:
    """Steps and data of all stages: ``1,800 steps on easy_vqa, scenes``."""
    stages = provenance.get("stages", [])
    data = dict.fromkeys(str(name) for stage in stages for name in stage.get("data", []))
    return f"{sum(stage.get('steps', 0) for stage in stages):,} steps on {', '.join(data) or 'unnamed data'}"


def _check_facts(pre_buffer: PreBuffer, folder: str) -> None:
    """Whether a user finds in the asset what they must know of it."""
    lacking = {
        "a license (neo export --license)": not pre_buffer.info.license,
        "anchors (word embeddings for bridges)": pre_buffer.anchors is None,
        "its training stages (provenance.json beside the trained model)": not pre_buffer.info.provenance.get("stages"),
    }
    if any(lacking.values()):
        names = ", ".join(name for name, lacks in lacking.items() if lacks)
        raise ValueError(f"{folder} lacks {names}; export it again")


def _write_half(exact: PreBuffer, source: Path, name: str, folder: Path) -> Path:
    """Writes the asset in float16, if that is close enough."""
    half = PreBuffer.from_pretrained(source, dtype="float16")
    if strange := [key for key, tensor in half.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(f"{source}: {strange[0]} has values that are not finite in float16, which ends at 65,504")
    half.info.card = half.info.card.replace(HERE, f"{PREFIX}{name}")
    half.save_pretrained(folder)
    before, after = (_features(part) for part in (exact, PreBuffer.from_pretrained(folder)))
    change = float((after - before).norm() / before.norm())
    if change > LARGEST_CHANGE:
        raise ValueError(
            f"{source}: float16 changes the features of an image by {change:.1%}, and at most {LARGEST_CHANGE:.0%} is "
            "allowed; train with smaller weights"
        )
    return folder


@torch.no_grad()
def _features(part: PreBuffer) -> torch.Tensor:
    """Features of a fixed image of noise, of 4 x 4 visual tokens."""
    embedding = part.patch_embedding
    assert embedding is not None
    side = 4 * embedding.patch_size * embedding.fold
    image = torch.randn(embedding.channels, side, side, generator=torch.Generator().manual_seed(0))
    [features] = image_features(part, [image])
    return features

"""Packing: samples become one packed sequence of tokens, and everything that the model needs to know about it.

Documents of a sequence never attend to each other: every token carries its document's number, and T positions restart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from neo_components.types import (
    FILLING,
    IGNORED,
    NO_IMAGE,
    Batch,
    DocumentTokens,
    ImageGrid,
    InputSpec,
    Sample,
    TokenKind,
)

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""ImageNet's, in units of 255."""

REDUCTIONS = {"token": 0.0, "sample": 1.0, "square": 0.5}
"""Exponent p of the weight ``1 / n**p`` of each of a document's n target tokens."""


def pack(
    samples: Sequence[Sample], spec: InputSpec, loss_reduction: str = "square", seq_len: int | None = None
) -> Batch:
    """Packs samples into one sequence.

    Args:
        samples: documents, in order.
        spec: ``model.input_spec``.
        loss_reduction: weight of a target token: ``token`` 1, ``sample`` 1/n, ``square`` 1/sqrt(n), n the number of
            target tokens of its document.
        seq_len: pads the sequence to this many tokens.

    Returns:
        A batch of one packed sequence, [1, L].

    Raises:
        ValueError: if a sample's images do not fit its tokens, an id or a label is out of range, the samples are
            longer than ``seq_len``, or the reduction is unknown. The sample is named.
    """
    if loss_reduction not in REDUCTIONS:
        raise ValueError(f"loss_reduction must be one of {', '.join(REDUCTIONS)}, got {loss_reduction!r}")
    if not samples:
        raise ValueError("pack needs at least one sample")
    documents = [_document(sample, spec, place, loss_reduction) for place, sample in enumerate(samples)]
    columns = {name: torch.cat([document[name] for document in documents]) for name in documents[0]}
    columns["document_ids"] = torch.cat([torch.full_like(s.token_ids, n) for n, s in enumerate(samples)])
    columns["image_ids"] = _number_images(columns["image_ids"], columns["document_ids"], samples)
    length = len(columns["token_ids"])
    if seq_len is not None:
        if length > seq_len:
            raise ValueError(f"{length} tokens do not fit a row of {seq_len}; pack fewer samples or raise seq_len")
        columns = {name: _pad(column, seq_len, FILLING[name]) for name, column in columns.items()}
    images = [image for sample in samples for image in sample.images]
    patches, positions = patchify(images, spec)
    return Batch(
        **{name: column[None] for name, column in columns.items()},
        patches=patches,
        patch_positions=positions,
        image_grids=torch.tensor([_sides(image, spec) for image in images], dtype=torch.int64, device="cpu").view(
            -1, 2
        ),
        keys=[[sample.key for sample in samples]],
        sources=[[sample.source for sample in samples]],
        image_counts=[[len(sample.images) for sample in samples]],
        frames=[[frame for sample in samples for frame in sample.frames or [None] * len(sample.images)]],
    )


def _pad(column: Tensor, length: int, value: int) -> Tensor:
    filling = column.new_full((length - column.shape[0], *column.shape[1:]), value)
    return torch.cat([column, filling])


def _number_images(image_ids: Tensor, document_ids: Tensor, samples: Sequence[Sample]) -> Tensor:
    """Counts images over the whole sequence instead of within each document."""
    before = torch.tensor([0] + [len(sample.images) for sample in samples], device="cpu").cumsum(0)
    return torch.where(image_ids == NO_IMAGE, image_ids, image_ids + before[document_ids])


def _document(sample: Sample, spec: InputSpec, place: int, loss_reduction: str) -> dict[str, Tensor]:
    """Every per-token column of one sample but its document number; images counted from 0."""
    name = f"sample {sample.key!r}" if sample.key else f"sample {place}"
    ids = sample.token_ids
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"{name}: token_ids must be [L] with L > 0, got shape {tuple(ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= spec.vocab_size:
        _check_ids(ids, spec, name)
    document = lay_out(ids, _grids(sample, spec, name), spec, name)
    labels = _labels(sample, spec, name)
    target = labels != IGNORED
    weight = max(int(target.sum()), 1) ** -REDUCTIONS[loss_reduction]
    return {
        "token_ids": ids,
        "positions": spec.index_rule(document),
        "image_ids": document.image_ids,
        "token_kinds": document.kinds,
        "labels": labels,
        "loss_weights": target.float() * weight,
    }


def _grids(sample: Sample, spec: InputSpec, name: str) -> list[ImageGrid]:
    """The sizes of a sample's images in visual tokens, and which frames of videos they are."""
    frames = sample.frames or [None] * len(sample.images)
    if len(frames) != len(sample.images):
        raise ValueError(f"{name}: frames has {len(frames)} entries for {len(sample.images)} images; give one for each")
    return [ImageGrid(*_grid(image, spec, name), frame) for image, frame in zip(sample.images, frames, strict=True)]


def lay_out(token_ids: Tensor, images: Sequence[ImageGrid], spec: InputSpec, name: str) -> DocumentTokens:
    """What each token of a document is.

    Args:
        token_ids: [L] int64.
        images: sizes of its images, in order.
        spec: of the model.
        name: of the document, for messages.

    Raises:
        ValueError: if the image tokens are not one unbroken run for each image.
    """
    layouts = [spec.image_layout(image.rows, image.columns) for image in images]
    image_ids = number_image_tokens(token_ids, spec.image_token_id, [len(layout) for layout in layouts], name)
    kinds = torch.full_like(token_ids, TokenKind.TEXT)
    kinds[(token_ids == spec.image_start_id) | (token_ids == spec.image_end_id)] = TokenKind.BOUNDARY
    if layouts:
        kinds[image_ids != NO_IMAGE] = torch.cat(layouts).to(kinds.device)
    return DocumentTokens(image_ids, kinds, images)


def _check_ids(ids: Tensor, spec: InputSpec, name: str) -> None:
    known = (ids >= 0) & (ids < spec.vocab_size) | torch.isin(ids, ids.new_tensor(spec.image_special_token_ids))
    if not known.all():
        raise ValueError(
            f"{name}: token id {int(ids[~known][0])} is out of range; the vocabulary has {spec.vocab_size} tokens "
            f"and the image tokens are {spec.image_special_token_ids}"
        )


def number_image_tokens(token_ids: Tensor, image_token_id: int, counts: Sequence[int], name: str) -> Tensor:
    """Which image each token of one document belongs to.

    Args:
        token_ids: [L] int64.
        image_token_id: id that stands for one token of an image.
        counts: tokens of each image, in order.
        name: of the document, for messages.

    Returns:
        [L] int64: number of the token's image, counted from 0; ``-1`` for all other tokens.

    Raises:
        ValueError: if the image tokens are not one unbroken run for each image.
    """
    found = np.flatnonzero(token_ids.numpy(force=True) == image_token_id)
    if len(found) != sum(counts):
        raise ValueError(
            f"{name}: {len(found)} image tokens (id {image_token_id}), but its {len(counts)} images "
            f"give {sum(counts)} visual tokens {list(counts)}"
        )
    numbers = np.repeat(np.arange(len(counts)), counts)
    if ((np.diff(found) != 1) & (np.diff(numbers) == 0)).any():
        raise ValueError(
            f"{name}: the runs of image tokens (id {image_token_id}) do not match its images, which give "
            f"{list(counts)} visual tokens in this order; each image needs one unbroken run"
        )
    image_ids = np.full(len(token_ids), NO_IMAGE)
    image_ids[found] = numbers
    return torch.from_numpy(image_ids).to(token_ids.device)


def _labels(sample: Sample, spec: InputSpec, name: str) -> Tensor:
    if sample.labels is None:
        return torch.full_like(sample.token_ids, IGNORED)
    if sample.labels.shape != sample.token_ids.shape:
        raise ValueError(f"{name}: {tuple(sample.labels.shape)} labels for {tuple(sample.token_ids.shape)} token ids")
    labels = sample.labels.clone()
    # Nothing precedes a document's first token, so it is no target: in a packed sequence another document comes before.
    labels[0] = IGNORED
    targets = labels[labels != IGNORED]
    if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= spec.vocab_size):
        wrong = targets[(targets < 0) | (targets >= spec.vocab_size)]
        raise ValueError(
            f"{name}: label {int(wrong[0])} is out of range; the vocabulary has {spec.vocab_size} tokens "
            "(image tokens cannot be targets; use -100)"
        )
    return labels


def _grid(image: Tensor, spec: InputSpec, name: str) -> tuple[int, int]:
    """Rows and columns of visual tokens."""
    factor = spec.factor
    if image.ndim != 3 or image.shape[0] != spec.channels or image.shape[1] % factor or image.shape[2] % factor:
        raise ValueError(
            f"{name}: image of shape {tuple(image.shape)}; it must be [{spec.channels}, H, W] with H and W multiples "
            f"of {factor} (load_image resizes so)"
        )
    if image.dtype == torch.uint8 and spec.channels != len(IMAGE_MEAN):
        raise ValueError(f"{name}: raw pixels (uint8) need 3 channels to be normalized, the model has {spec.channels}")
    return image.shape[1] // factor, image.shape[2] // factor


def _sides(image: Tensor, spec: InputSpec) -> tuple[int, int]:
    """Rows and columns of patches."""
    return image.shape[1] // spec.patch_size, image.shape[2] // spec.patch_size


def patchify(images: Sequence[Tensor], spec: InputSpec) -> tuple[Tensor, Tensor]:
    """Cuts images into patches in the order that ``PatchEmbedding`` wants.

    Args:
        images: [C, H, W] each, float or raw (uint8, see ``Sample``).
        spec: sizes.

    Returns:
        Patches [P, C * patch_size**2] (channel, y, x), and their rows and columns [P, 2]. Visual tokens row by row, the
        ``fold**2`` patches of each next to each other, row by row too.
    """
    sides = [_sides(image, spec) for image in images]
    counts = [rows * columns for rows, columns in sides]
    patches = torch.empty(sum(counts), spec.channels * spec.patch_size**2, device="cpu")
    for image, mine in zip(images, patches.split(counts) if counts else (), strict=True):
        if image.dtype == torch.uint8:  # cut while they are small, and normalized where they have to lie
            mine.copy_(_cut_raw(image, spec.patch_size, spec.fold))
            normalize(mine.view(len(mine), spec.channels, spec.patch_size**2))
        else:
            mine.copy_(cut_patches(image, spec.patch_size, spec.fold))
    return patches, patch_grid(sides, spec.fold)


_MEAN, _STD = (torch.tensor(values, device="cpu")[:, None] for values in (IMAGE_MEAN, IMAGE_STD))


def normalize(pixels: Tensor) -> Tensor:
    """Brings pixels of 0 to 255 to ImageNet's mean and standard deviation, in place.

    Args:
        pixels: [..., 3, n] float32.
    """
    return pixels.div_(255).sub_(_MEAN.to(pixels.device)).div_(_STD.to(pixels.device))


def cut_patches(image: Tensor, patch_size: int, fold: int) -> Tensor:
    """[C, H, W] -> [P, C * patch_size**2], in the order of :func:`patchify`."""
    c, rows, columns = image.shape[0], image.shape[1] // patch_size, image.shape[2] // patch_size
    cut = image.reshape(c, rows // fold, fold, patch_size, columns // fold, fold, patch_size)
    return cut.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, c * patch_size**2)


def _cut_raw(image: Tensor, patch_size: int, fold: int) -> Tensor:
    """The same for bytes, which takes less time: the bytes of a patch's line move together."""
    c, height, width = image.shape
    lines = np.ascontiguousarray(image.permute(1, 0, 2).numpy()).view(np.dtype((np.void, patch_size)))
    rows, columns = height // patch_size, width // patch_size
    cut = lines.reshape(rows // fold, fold, patch_size, c, columns // fold, fold).transpose(0, 4, 1, 5, 3, 2)
    flat = np.ascontiguousarray(cut).view(np.uint8).reshape(rows * columns, c * patch_size**2)
    return torch.from_numpy(flat)


def patch_grid(sides: Sequence[tuple[int, int]], fold: int) -> Tensor:
    """Rows and columns [P, 2] int64 of the patches of images with that many (rows, columns) of patches."""
    positions = [torch.zeros(0, 2, dtype=torch.int64, device="cpu")]
    for rows, columns in sides:
        down, right = (torch.arange(count, device="cpu") for count in (rows, columns))
        grid = torch.stack(torch.meshgrid(down, right, indexing="ij"), dim=-1)
        folded = grid.reshape(rows // fold, fold, columns // fold, fold, 2).permute(0, 2, 1, 3, 4)
        positions.append(folded.reshape(rows * columns, 2))
    return torch.cat(positions)

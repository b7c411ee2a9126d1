"""The types that pass between the parts of the library, and the legend of shape letters.

Shape letters, used in names, comments and docstrings everywhere::

    B packed sequences    L tokens of each    D hidden width      N query heads   K key/value heads
    E head width          V vocabulary        P patches           I images        C image channels

A :class:`Sample` is what a user has, a :class:`Batch` is all that a model needs. Nothing but a ``Batch`` passes from
``neo_components.data`` to the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neo_components.token_indices import Index, TokenIndices, sent

IGNORED = -100
"""Label of a token that is no target (PyTorch's ``ignore_index``)."""

NO_IMAGE = -1
"""``Batch.image_ids`` of a token that no patch embedding gives."""

PADDING = -1
"""``Batch.document_ids`` of a token that only fills its sequence."""


class TokenKind:
    """What a token is; ``Batch.token_kinds`` holds these numbers.

    Plain numbers and no ``Enum``: compiled mask rules compare tensors with them, and ``torch.compile`` under ``vmap``
    compares a tensor with a member of an ``IntEnum`` wrongly (torch 2.14).
    """

    TEXT = 0
    """A word, or padding."""
    VISUAL = 1
    """A visual token: patches of an image."""
    BOUNDARY = 2
    """``<img>`` or ``</img>``, the token before or behind an image."""
    ROW_END = 3
    """Ends a row of an image's visual tokens."""
    QUERY = 4
    """A learned query that reads an image."""
    CLASS = 5
    """Stands for a whole image."""


class Frame(NamedTuple):
    """Which frame of which video an image is.

    Attributes:
        video: number of the video in its document.
        time: seconds since the video's first frame.
    """

    video: int
    time: float


@dataclass(frozen=True)
class ImageGrid:
    """One image of a document, as index rules see it.

    Args:
        rows: rows of visual tokens.
        columns: columns of visual tokens.
        frame: which frame of a video it is; ``None``: a still image.
    """

    rows: int
    columns: int
    frame: Frame | None = None


@dataclass(frozen=True)
class DocumentTokens:
    """One document, as index rules see it.

    Args:
        image_ids: [L] int64; number of the image that a token belongs to, counted in the document, ``-1`` for words and
            boundary tokens.
        kinds: [L] int64, of :class:`TokenKind`.
        images: the images, in order.
    """

    image_ids: Tensor
    kinds: Tensor
    images: Sequence[ImageGrid]

    def of_image(self, number: int) -> Tensor:
        """[rows * columns] int64: indices of the visual tokens of image ``number``, row by row."""
        inside = (self.image_ids == number) & (self.kinds == TokenKind.VISUAL)
        return inside.nonzero()[:, 0]


IndexRule = Callable[[DocumentTokens], Tensor]
"""``rule(document) -> positions [L, 3]``, int64 or float: T, H and W position of each token of one document."""

ImageLayout = Callable[[int, int], Tensor]
"""``layout(rows, columns) -> kinds [n]`` of the tokens that stand for an image of ``rows`` x ``columns`` visual tokens;
:attr:`TokenKind.VISUAL` for these, row by row, and other kinds for tokens that a patch embedding adds."""


def plain_layout(rows: int, columns: int) -> Tensor:
    """The layout of an image that is its visual tokens and nothing else, [rows * columns]."""
    return torch.full((rows * columns,), TokenKind.VISUAL, dtype=torch.int64, device="cpu")


def kinds_of(image_ids: Tensor) -> Tensor:
    """Kinds of tokens of which only ``image_ids`` are known: visual tokens and text; same shape."""
    return (image_ids != NO_IMAGE).long() * TokenKind.VISUAL


def tokens_around(image_ids: Tensor, kinds: Tensor) -> Tensor:
    """[..., L] ``image_ids`` in which a boundary token has the number of the image that it stands before or behind."""
    none = torch.full_like(image_ids[..., :1], NO_IMAGE)
    following = torch.cat([image_ids[..., 1:], none], dim=-1)
    previous = torch.cat([none, image_ids[..., :-1]], dim=-1)
    neighbor = torch.where(following == NO_IMAGE, previous, following)
    return torch.where(kinds == TokenKind.BOUNDARY, neighbor, image_ids)


@dataclass(frozen=True)
class InputSpec:
    """What the input of one model looks like; obtained from ``model.input_spec`` and handed to ``pack``.

    Args:
        image_token_id: id that stands for one token of an image.
        image_start_id: id of the token before an image, ``<img>``.
        image_end_id: id of the token behind an image, ``</img>``.
        vocab_size: rows of the word embedding, V. Ids of the three image tokens may lie beyond it.
        patch_size: side of a patch in pixels.
        fold: patches per side of a visual token; a visual token covers ``patch_size * fold`` pixels a side.
        channels: image channels, C.
        index_rule: gives each token its T, H and W position (``components/rotary.py``).
        image_layout: which tokens stand for an image.
    """

    image_token_id: int
    image_start_id: int
    image_end_id: int
    vocab_size: int
    patch_size: int
    fold: int
    channels: int
    index_rule: IndexRule
    image_layout: ImageLayout = plain_layout

    @property
    def factor(self) -> int:
        """Sides of an image are multiples of this many pixels."""
        return self.patch_size * self.fold

    @property
    def image_special_token_ids(self) -> tuple[int, int, int]:
        """The three ids that may lie beyond the vocabulary."""
        return self.image_token_id, self.image_start_id, self.image_end_id

    def image_tokens(self, height: int, width: int) -> int:
        """How many tokens stand for an image of that size in pixels, without its boundary tokens."""
        rows, columns = height // self.factor, width // self.factor
        return rows * columns if self.image_layout is plain_layout else len(self.image_layout(rows, columns))


@dataclass
class Sample:
    """One document: token ids, which of them are targets, and its images.

    Args:
        token_ids: [L] int64; each image is a run of ``image_token_id``, one for each of its tokens.
        labels: [L] int64, unshifted, ``-100`` where a token is no target; ``None`` for inference.
        images: tensors [C, H, W] float, normalized, sides a multiple of ``InputSpec.factor``; in order of appearance.
            Raw pixels, uint8 of 0 to 255, are normalized as ``load_image`` does when they are packed.
        key: name of the sample in its source, used in messages.
        source: name of its source; training logs the loss of each source.
        frames: for each image which frame of a video it is, or ``None``; empty if all are still images.
    """

    token_ids: Tensor
    labels: Tensor | None = None
    images: Sequence[Tensor] = ()
    key: str = ""
    source: str = ""
    frames: Sequence[Frame | None] = ()


class _Carried:
    """A slot beside the fields of :class:`Batch`: not copied by ``dataclasses.replace``, so that it is never out of
    date."""

    __slots__ = ("_indices",)
    _indices: TokenIndices | None


@dataclass
class Batch(_Carried):
    """B packed sequences of L tokens: everything that a model needs.

    Args:
        token_ids: [B, L] int64.
        positions: [B, L, 3] int64 or float; T, H and W position of each token.
        document_ids: [B, L] int64; number of the document in its sequence, ``-1`` for padding.
        image_ids: [B, L] int64; number of the image in its sequence, ``-1`` for words and boundary tokens.
        labels: [B, L] int64, unshifted, ``-100`` ignored; a document's first token is never a target.
        loss_weights: [B, L] float32, 0 where the label is ignored.
        patches: [P, C * patch_size**2] float32; the patches of all images in order of their visual tokens, the
            ``fold**2`` patches of one visual token next to each other; each is (channel, y, x).
        patch_positions: [P, 2] int64; row and column of each patch in its image's grid of patches.
        image_grids: [I, 2] int64; rows and columns of patches of each image; ``None``: read off ``patch_positions``.
        token_kinds: [B, L] int64, of :class:`TokenKind`; ``None``: visual tokens and text, as ``image_ids`` has them.
        keys: names of the samples of each sequence, in the order of their documents.
        sources: names of their sources.
        image_counts: how many images each of them has.
        frames: which frame of a video each image of a sequence is, in order; empty if all are still images.

    A batch that is moved to a device takes along what is known of its tokens on the CPU (:attr:`indices`).
    """

    token_ids: Tensor
    positions: Tensor
    document_ids: Tensor
    image_ids: Tensor
    labels: Tensor
    loss_weights: Tensor
    patches: Tensor
    patch_positions: Tensor
    image_grids: Tensor = None  # type: ignore[assignment]  # set below
    token_kinds: Tensor = None  # type: ignore[assignment]
    keys: list[list[str]] = field(default_factory=list)
    sources: list[list[str]] = field(default_factory=list)
    image_counts: list[list[int]] = field(default_factory=list)
    frames: list[list[Frame | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._indices = None
        if self.token_kinds is None:
            self.token_kinds = kinds_of(self.image_ids)
        if self.image_grids is None:
            self.image_grids = _grids(self.patch_positions)

    def frame_of(self, sequence: int, image: int) -> Frame | None:
        """Which frame of a video an image of a sequence is; ``None`` for a still image."""
        frames = self.frames[sequence] if self.frames else []
        return frames[image] if frames else None

    @property
    def known(self) -> TokenIndices | None:
        """Which tokens are targets and which belong to images, as far as the CPU knows: of a batch on the CPU, and of
        one that was moved from there (``to`` and ``pin_memory`` take it along). ``None`` if the batch was made on a
        device."""
        if self._indices is None and self.token_ids.device.type == "cpu":
            return self._find_indices()
        return self._indices

    @property
    def indices(self) -> TokenIndices:
        """The same; of a batch that was made on a device, found by reading its ids back, for which the CPU waits."""
        return self.known or self._find_indices()

    def _find_indices(self) -> TokenIndices:
        ids = {name: getattr(self, name).cpu() for name in KNOWN}
        targets = ids["labels"] != IGNORED
        targets[:, :1] = False  # no token precedes the first one
        chosen = {"targets": targets, "visual": ids["image_ids"] != NO_IMAGE}
        device = self.token_ids.device
        indices = {name: Index.of(mask).map(lambda x: sent(x, device)) for name, mask in chosen.items()}
        return TokenIndices(ids, indices)

    def with_indices(self, indices: TokenIndices) -> Batch:
        """The same batch with what the CPU knows of its tokens, given by who made its columns."""
        changed = replace(self)
        changed._indices = indices
        return changed

    def with_loss_weights(self, loss_weights: Tensor) -> Batch:
        """The same tokens with other loss weights, [B, L]."""
        changed = replace(self, loss_weights=loss_weights)
        changed._indices = self._indices
        return changed

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Batch:
        """A copy with every tensor on ``device``.

        Args:
            device: there.
            non_blocking: do not wait until it is there; ``None``: if its memory is page-locked.
        """
        if non_blocking is None:
            non_blocking = self.token_ids.is_pinned()
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; the hook that torch's DataLoader calls."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in _columns()}
        indices = self.indices
        moved = replace(self, **changed)
        moved._indices = TokenIndices(indices.ids, indices.map(change))
        return moved

    @staticmethod
    def stack(sequences: Sequence[Batch]) -> Batch:
        """Joins batches of equal length L into one with all their sequences.

        Raises:
            ValueError: if the lengths differ.
        """
        if len(sequences) == 1:  # nothing to copy: patches are large
            return sequences[0]
        lengths = {one.token_ids.shape[1] for one in sequences}
        if len(lengths) != 1:
            raise ValueError(
                f"packed sequences of one batch must be equally long, got lengths {sorted(lengths)}; set seq_len"
            )
        joined: dict[str, Any] = {name: torch.cat([getattr(one, name) for one in sequences]) for name in _columns()}
        joined |= {name: [entry for one in sequences for entry in getattr(one, name)] for name in LISTS}
        return Batch(**joined)


FILLING = {
    "token_ids": 0, "positions": 0, "document_ids": PADDING, "image_ids": NO_IMAGE, "token_kinds": TokenKind.TEXT,
    "labels": IGNORED, "loss_weights": 0,
}  # fmt: skip
"""Value of each column of tokens that only fill their sequence."""

LISTS = ("keys", "sources", "image_counts", "frames")
"""What a batch has of its samples in lists; all else in it is tensors."""


KNOWN = ("token_ids", "positions", "document_ids", "image_ids", "token_kinds", "labels", "image_grids")
"""Columns of a batch that are known on the CPU after it was moved."""


def _columns() -> list[str]:
    return [f.name for f in fields(Batch) if f.name not in LISTS]


def _grids(patch_positions: Tensor) -> Tensor:
    """[I, 2]: the sizes of images in patches, from the positions of their patches [P, 2]."""
    if patch_positions.is_meta or not len(patch_positions):
        return patch_positions.new_zeros(0, 2)
    first = (patch_positions == 0).all(-1).nonzero()[:, 0]
    last = torch.cat([first[1:], first.new_tensor([len(patch_positions)])]) - 1
    return patch_positions[last] + 1


@dataclass
class Output:
    """What a model returns.

    Args:
        logits: [B, L, V].
        loss: scalar, or ``None`` if the batch has no label.
        hidden_states: what each step produced, by name, if asked for.
    """

    logits: Tensor
    loss: Tensor | None = None
    hidden_states: dict[str, Tensor] | None = None

"""From the raw content of a shard to a :class:`~neo_components.types.Sample`, in two steps.

A :class:`Draft` has token ids and images of which only the header was read, so its length is known and it is small.
Pixels are decoded when the draft has found its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from neo_components.data.image.augment import Augment
from neo_components.data.image.decoding import decode
from neo_components.data.image.files import open_image
from neo_components.data.image.images import image_size, max_pixels_per_image, resize, resize_fast
from neo_components.data.shards.format import RawSample
from neo_components.data.skip_counts import SampleError
from neo_components.data.text.conversation import encode_conversation, image_token_ids
from neo_components.data.text.turns import ConversationError
from neo_components.types import IGNORED, DocumentTokens, Frame, InputSpec, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Draft:
    """A sample whose pixels are not decoded yet.

    Args:
        key: name in its source.
        token_ids: [L] int64.
        labels: [L] int64.
        images: opened images.
        sizes: height and width in pixels that each image is resized to.
        frames: which frame of which video each image is; empty if all are still images.
    """

    key: str
    token_ids: Tensor
    labels: Tensor
    images: list[Image.Image]
    sizes: list[tuple[int, int]]
    frames: Sequence[Frame | None] = ()


@dataclass
class SampleMaker:
    """Makes samples for one model.

    Args:
        tokenizer: from ``load_tokenizer``.
        spec: of the model.
        min_pixels: smallest area of an image after resizing, in pixels.
        max_pixels: largest area of a single image; several share it as :func:`max_pixels_per_image` tells.
        max_length: longer samples are cut to this many tokens, in an answer; ``None`` cuts none.
        exact: resize as the released model's code does, bit by bit; see :func:`resize`.
        augment: changes images at random; ``None`` leaves them.
    """

    tokenizer: PreTrainedTokenizerBase
    spec: InputSpec
    min_pixels: int
    max_pixels: int
    max_length: int | None = None
    exact: bool = True
    augment: Augment | None = None

    def draft(self, raw: RawSample) -> Draft:
        """Tokenises the conversation and plans the images.

        Raises:
            SampleError: (a ``ValueError``) if the sample cannot be used.
        """
        images = [open_image(data, f"image {number}") for number, data in enumerate(raw["images"])]
        sizes = self.resized([(image.height, image.width) for image in images])
        token_ids, labels = self.encode(raw, sizes)
        return Draft(raw["key"], token_ids, labels, images, sizes, _frames(raw, len(images)))

    def resized(self, sizes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Height and width in pixels that the images of one sample are resized to.

        Raises:
            ImageError: (a ``SampleError``) if an image is empty or too thin.
        """
        limit = max_pixels_per_image(len(sizes), self.min_pixels, self.max_pixels)
        return [
            image_size(height, width, self.spec.factor, self.min_pixels, limit, f"image {number}")
            for number, (height, width) in enumerate(sizes)
        ]

    def visual_tokens(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens that stand for resized images."""
        return sum(self.spec.image_tokens(height, width) for height, width in sizes)

    def encode(self, raw: RawSample, sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Token ids and labels [L] of a sample whose images have these sizes after resizing.

        Raises:
            SampleError: (a ``ValueError``) if the sample cannot be used.
        """
        token_ids, labels = encode_conversation(
            raw["conversations"],
            self.tokenizer,
            [self.visual_tokens(group) for group in _groups(raw, sizes)],
            strict=True,
            image_ids=self.spec.image_special_token_ids,
        )
        if self.max_length is not None and len(token_ids) > self.max_length:
            kept = _cut_in_an_answer(token_ids, labels, self.max_length, self.spec.image_token_id)
            token_ids, labels = token_ids[:kept], labels[:kept]
        # Image tokens beyond the vocabulary (an image in an answer) have no output that could be learned.
        labels[labels >= self.spec.vocab_size] = IGNORED
        return token_ids, labels

    def finish(self, draft: Draft, seed: Sequence[int] = ()) -> Sample:
        """Decodes the images; they are raw pixels, which ``pack`` normalises.

        Args:
            draft: from :meth:`draft`.
            seed: of the augmentation.

        Raises:
            ImageError: (a ``SampleError``) if an image cannot be decoded.
        """
        pixels = []
        for number, (image, size) in enumerate(zip(draft.images, draft.sizes, strict=True)):
            decoded = decode(image, name=f"image {number}")
            if self.augment is not None:
                decoded = self.augment(decoded, seed)
            pixels.append(resize(decoded, size) if self.exact else resize_fast(decoded, size))
        return Sample(draft.token_ids, draft.labels, pixels, draft.key, frames=draft.frames)


def _frames(raw: RawSample, images: int) -> list[Frame | None]:
    """Which frame of which video each image is: ``frames`` counts the images behind each tag, ``frame_times`` has their
    seconds. A video whose times are not known counts one second a frame."""
    counts = raw.get("frames")
    if counts is None:
        return []
    times = raw.get("frame_times") or [None] * images
    if len(times) != images or not all(time is None or isinstance(time, int | float) for time in times):
        raise SampleError(
            f"'frame_times' must hold a number for each of the {images} images, got {times!r:.60}", "images"
        )
    found: list[Frame | None] = []
    for video, count in enumerate(counts):
        for number in range(count):
            time = times[len(found)]
            found.append(None if count == 1 and time is None else Frame(video, float(number if time is None else time)))
    return found


def _groups(raw: RawSample, sizes: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
    """The images behind each ``<image>`` tag: one, or the frames of a video as ``frames`` of the sample tells."""
    frames = raw.get("frames")
    if frames is None:
        return [sizes[number : number + 1] for number in range(len(sizes))]
    if not isinstance(frames, list) or not all(type(n) is int and n > 0 for n in frames) or sum(frames) != len(sizes):
        raise SampleError(
            f"'frames' must tell how many of the {len(sizes)} images stand behind each tag, got {frames!r:.60}",
            "images",
        )
    ends = list(accumulate(frames))
    return [sizes[end - count : end] for end, count in zip(ends, frames, strict=True)]


def _cut_in_an_answer(token_ids: Tensor, labels: Tensor, length: int, image_token_id: int) -> int:
    """Where to cut a conversation that is too long: inside an answer, or behind the last one that is whole.

    Raises:
        ConversationError: (a ``SampleError``) if that cuts an image or every answer away.
    """
    learned = labels != IGNORED
    if not learned[length]:
        whole = learned[:length].nonzero()
        length = int(whole[-1]) + 1 if len(whole) else 0
    if not learned[:length].any():
        raise ConversationError("the length limit cuts the answer away, nothing is left to learn", "too_long")
    if (token_ids[length:] == image_token_id).any():
        raise ConversationError("the length limit cuts an image away; raise it or lower max_pixels", "too_long")
    return length


def plain_spec(tokenizer: PreTrainedTokenizerBase, factor: int) -> InputSpec:
    """What the input of any model with this tokenizer looks like, as far as samples without their positions go.

    Args:
        tokenizer: from ``load_tokenizer``.
        factor: side of a visual token in pixels.
    """
    return InputSpec(*image_token_ids(tokenizer), len(tokenizer), factor, 1, 3, _no_positions)


def _no_positions(document: DocumentTokens) -> Tensor:
    raise NotImplementedError("positions are those of a model; take model.input_spec")

"""From the raw content of a shard to a :class:`~neo_components.types.Sample`, in two steps.

A :class:`Draft` has token ids and images of which only the header was read, so its length is known and it is small.
Pixels are decoded when the draft has found its row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from neo_components.data.conversation import encode_conversation
from neo_components.data.images import image_size, max_pixels_per_image, open_image, to_pixels
from neo_components.data.shards import RawSample
from neo_components.types import IGNORED, InputSpec, Sample

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
    """

    key: str
    token_ids: Tensor
    labels: Tensor
    images: list[Image.Image]
    sizes: list[tuple[int, int]]


@dataclass
class SampleMaker:
    """Makes samples for one model.

    Args:
        tokenizer: from ``load_tokenizer``.
        spec: of the model.
        min_pixels: smallest area of an image after resizing, in pixels.
        max_pixels: largest area of a single image; several share it as :func:`max_pixels_per_image` tells.
        max_length: longer samples are cut to this many tokens; ``None`` cuts none.
    """

    tokenizer: PreTrainedTokenizerBase
    spec: InputSpec
    min_pixels: int
    max_pixels: int
    max_length: int | None = None

    def draft(self, raw: RawSample) -> Draft:
        """Tokenises the conversation and plans the images.

        Raises:
            SampleError: (a ``ValueError``) if the sample cannot be used.
        """
        images = [open_image(data, f"image {number}") for number, data in enumerate(raw["images"])]
        limit = max_pixels_per_image(len(images), self.min_pixels, self.max_pixels)
        factor = self.spec.factor
        sizes = [
            image_size(image, factor, self.min_pixels, limit, f"image {number}") for number, image in enumerate(images)
        ]
        token_ids, labels = encode_conversation(
            raw["conversations"],
            self.tokenizer,
            [(height // factor) * (width // factor) for height, width in sizes],
            self.max_length,
            strict=True,
            image_ids=self.spec.image_ids,
        )
        # Image tokens beyond the vocabulary (an image in an answer) have no output that could be learnt.
        labels[labels >= self.spec.vocab_size] = IGNORED
        return Draft(raw["key"], token_ids, labels, images, sizes)

    def finish(self, draft: Draft) -> Sample:
        """Decodes the images.

        Raises:
            ImageError: (a ``SampleError``) if an image cannot be decoded.
        """
        pairs = enumerate(zip(draft.images, draft.sizes, strict=True))
        pixels = [to_pixels(image, size, name=f"image {number}") for number, (image, size) in pairs]
        return Sample(draft.token_ids, draft.labels, pixels, draft.key)

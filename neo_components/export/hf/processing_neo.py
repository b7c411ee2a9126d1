"""From images and text to a model's inputs: the processor of an exported folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ImageProcessingMixin, ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image
from transformers.processing_utils import ImagesKwargs

from neo_components.data.image.files import open_image
from neo_components.data.image.images import image_size, max_pixels_per_image, to_pixels
from neo_components.data.limits import MAX_PIXELS, MIN_PIXELS
from neo_components.data.packing import cut_patches
from neo_components.data.text.turns import IMAGE_TAG, IMAGE_TOKENS


class NEOImagesKwargs(ImagesKwargs, total=False):
    """Limits that a call may change."""

    min_pixels: int
    max_pixels: int


class NEOImageProcessor(ImageProcessingMixin):
    """Images to patches.

    Args:
        patch_size: side of a patch in pixels.
        fold: patches per side of a visual token.
        min_pixels: an image is scaled up to at least this many pixels.
        max_pixels: and down to at most this many; several images of one prompt share twice as many.
        kwargs: kept as attributes.
    """

    model_input_names = ["pixel_values", "image_grid_hw"]  # noqa: RUF012 - a class attribute of transformers
    valid_kwargs = NEOImagesKwargs

    def __init__(
        self,
        patch_size: int = 16,
        fold: int = 2,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.patch_size, self.fold = patch_size, fold
        self.min_pixels, self.max_pixels = min_pixels, max_pixels

    def __call__(
        self, images: Any, min_pixels: int | None = None, max_pixels: int | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Resizes, normalizes and cuts images.

        Args:
            images: an image, the images of one prompt, or a list of those of each prompt. An image is a Pillow image,
                an array or tensor, a path, or an address (transformers opens it and applies its EXIF orientation).
            min_pixels: instead of the processor's own.
            max_pixels: instead of the processor's own.
            kwargs: ``return_tensors`` is taken and makes no difference: these are tensors.

        Returns:
            ``pixel_values`` [P, C * patch_size**2] float32, and ``image_grid_hw`` [I, 2] rows and columns of patches.

        Raises:
            ValueError: if an image cannot be read, or another setting is given.
        """
        unknown = sorted(name for name, value in kwargs.items() if value is not None and name != "return_tensors")
        if unknown:
            raise ValueError(f"images are always resized and normalized as in training; not to be changed: {unknown}")
        lowest = self.min_pixels if min_pixels is None else min_pixels
        highest = self.max_pixels if max_pixels is None else max_pixels
        patches, grids = [], []
        for prompt in _by_prompt(images):
            limit = max_pixels_per_image(len(prompt), lowest, highest)
            for image in prompt:
                opened = _open(image)
                factor = self.patch_size * self.fold
                pixels = to_pixels(opened, image_size(opened.height, opened.width, factor, lowest, limit))
                patches.append(cut_patches(pixels, self.patch_size, self.fold))
                grids.append([pixels.shape[1] // self.patch_size, pixels.shape[2] // self.patch_size])
        return BatchFeature({"pixel_values": torch.cat(patches), "image_grid_hw": torch.tensor(grids)})


def _by_prompt(images: Any) -> list[list[Any]]:
    """The images of each prompt."""
    if not isinstance(images, list | tuple):
        return [[images]]
    if images and all(isinstance(prompt, list | tuple) for prompt in images):
        return [list(prompt) for prompt in images]
    return [list(images)]


def _open(image: Any) -> Image.Image:
    if isinstance(image, str) and not Path(image).is_file():
        return load_image(image)
    if isinstance(image, str | Path | bytes | Image.Image):
        return open_image(image)
    return to_pil_image(image)


class NEOProcessor(ProcessorMixin):
    """Prompts to inputs: each ``<image>`` of a text becomes one image's visual tokens.

    Args:
        image_processor: :class:`NEOImageProcessor`.
        tokenizer: with the image tokens.
        chat_template: Jinja template.
        image_ids: the model's ids of the visual token, ``<img>`` and ``</img>``; the tokenizer's own if ``None``.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_ids: Sequence[int] | None = None,
    ) -> None:
        self.image_token = IMAGE_TAG
        self.image_ids = list(image_ids or tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS)))
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Inputs of the model.

        Args:
            images: one image, a list in the order of the tags of all texts, or a list for each text.
            text: a prompt or several, as :meth:`apply_chat_template` writes them, with an ``<image>`` for each image.
            kwargs: ``padding``, ``return_tensors`` and others of a tokenizer; ``min_pixels`` and ``max_pixels``.

        Returns:
            ``input_ids`` and ``attention_mask`` [B, L], and with images ``pixel_values`` [P, C * patch_size**2] and
            ``image_grid_hw`` [I, 2].

        Raises:
            ValueError: if tags and images differ in number, or a text holds a reserved token.
        """
        if images is None and text is None:
            raise ValueError("give images, text or both")
        limits = {name: kwargs.pop(name, None) for name in ("min_pixels", "max_pixels")} | kwargs.pop(
            "images_kwargs", {}
        )
        if text is None:
            return self.image_processor(images, **limits)
        texts = [text] if isinstance(text, str) else list(text)
        if any(token in prompt for prompt in texts for token in IMAGE_TOKENS):
            raise ValueError(f"a text holds one of the reserved {', '.join(IMAGE_TOKENS)}; write {IMAGE_TAG}")
        prompts = self._by_tags(images, [prompt.count(IMAGE_TAG) for prompt in texts])
        features = self.image_processor(prompts, **limits) if any(prompts) else {}
        tokens = [self.replace_image_token(features, n) for n in range(len(features.get("image_grid_hw", ())))]
        texts, offsets = self.get_text_with_replacements(texts, tokens)
        return self._features(texts, offsets, features, **kwargs | kwargs.pop("text_kwargs", {}))

    def _features(self, texts: list[str], offsets: Any, images: Any, **options: Any) -> BatchFeature:
        """What the tokenizer makes of the texts, with the images."""
        kind, with_offsets = options.pop("return_tensors", None), options.pop("return_text_replacement_offsets", False)
        # The chat template writes all special tokens, so the tokenizer adds none.
        features = dict(self.tokenizer(texts, **{"add_special_tokens": False} | options))
        features["input_ids"] = self._model_ids(features["input_ids"])
        features |= {"text_replacement_offsets": offsets} if with_offsets else {}
        return BatchFeature(features | dict(images), kind, skip_tensor_conversion=["text_replacement_offsets"])

    def _by_tags(self, images: Any, tags: list[int]) -> list[list[Any]]:
        """The images of each text; a flat list is distributed by the texts' tags."""
        nested = isinstance(images, list | tuple) and any(isinstance(prompt, list | tuple) for prompt in images)
        prompts = [] if images is None else _by_prompt(images)
        if not nested:
            left = [image for prompt in prompts for image in prompt]
            distributed = [[left.pop(0) for _ in range(count) if left] for count in tags]
            prompts = [*distributed, left] if left else distributed
        counts = [len(prompt) for prompt in prompts]
        if counts != tags:
            raise ValueError(
                f"{sum(tags)} {IMAGE_TAG} tags for {sum(counts)} images (text by text {tags} and {counts}); write one "
                "tag for each image"
            )
        return prompts

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """What a tag becomes: the visual tokens between their boundary tokens."""
        rows, columns = image_inputs["image_grid_hw"][image_idx].tolist()
        token, start, end = IMAGE_TOKENS
        return start + token * (rows * columns // self.image_processor.fold**2) + end

    def _model_ids(self, rows: list[list[int]]) -> list[list[int]]:
        """The tokenizer's three image ids replaced by the model's."""
        own = self.tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
        if own == self.image_ids:
            return rows
        if clash := {i for row in rows for i in row} & set(self.image_ids) - set(own):
            raise ValueError(f"the model's image tokens {self.image_ids} use ids {sorted(clash)} of the text")
        new = dict(zip(own, self.image_ids, strict=True))
        return [[new.get(i, i) for i in row] for row in rows]

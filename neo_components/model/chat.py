"""Questions to a trained model: the model with its tokenizer and image limits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neo_components.data import encode_prompt, load_image, load_tokenizer
from neo_components.data.image.images import IMAGE_MEAN, IMAGE_STD, max_pixels_per_image
from neo_components.data.limits import MAX_PIXELS, MIN_PIXELS
from neo_components.data.text.templates import stop_token_ids
from neo_components.data.text.turns import IMAGE_TAG
from neo_components.model.neo import NEO
from neo_components.storage.hub import resolve
from neo_components.storage.weights import read_json, write_text
from neo_components.types import Sample

PREPROCESSOR = "preprocessor_config.json"


@dataclass
class Chat:
    """A model with the tokenizer and image limits that prepare its input.

    Args:
        model: the model.
        tokenizer: Hugging Face tokenizer with the image tokens.
        min_pixels: images are scaled up to at least this many pixels.
        max_pixels: and down to at most this many.
    """

    model: NEO
    tokenizer: Any
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, dtype: torch.dtype | str = "float32", device: torch.device | str = "cpu"
    ) -> Chat:
        """Reads a model folder (or hub id) with its tokenizer and preprocessor_config.json.

        Args:
            source: folder or hub id.
            dtype: of the weights in memory: float32, bfloat16 or float16.
            device: of the model, which computes there.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if a file is damaged or does not fit.
        """
        folder = resolve(source)
        limits = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
        return cls(
            NEO.from_pretrained(folder, dtype=dtype).to(device),
            load_tokenizer(str(folder)),
            limits.get("min_pixels", MIN_PIXELS),
            limits.get("max_pixels", MAX_PIXELS),
        )

    def to(self, device: torch.device | str) -> Chat:
        """Moves the model to a device; answers are computed where it is."""
        self.model.to(device)
        return self

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes model, tokenizer and image limits into one folder."""
        folder = self.model.save_pretrained(folder)
        self.save_beside(folder)
        return folder

    def save_beside(self, folder: str | Path) -> None:
        """Writes the files beside the model: tokenizer and image limits."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        write_text(folder / PREPROCESSOR, json.dumps(self.image_config(), indent=2) + "\n")

    def image_config(self) -> dict[str, Any]:
        """Normalization and limits of images, as stored beside models and assets."""
        return {
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "factor": self.model.input_spec.factor,
            "image_mean": list(IMAGE_MEAN),
            "image_std": list(IMAGE_STD),
        }

    def prompt(self, question: str, images: Sequence[Any] = ()) -> Sample:
        """The model's input for a question about images (paths, bytes or PIL images).

        Images without an ``<image>`` tag in the question are put in front of it, a line each.

        Raises:
            ValueError: if the question is empty, or an image cannot be read.
        """
        if not question.strip():
            raise ValueError(f"the question is empty, got {question!r}; ask something, such as 'What is in the image?'")
        factor = self.model.input_spec.factor
        limit = max_pixels_per_image(len(images), self.min_pixels, self.max_pixels)
        pixels = [load_image(image, factor, self.min_pixels, limit) for image in images]
        if IMAGE_TAG not in question:
            question = f"{IMAGE_TAG}\n" * len(images) + question
        counts = [self.model.input_spec.image_tokens(*image.shape[1:]) for image in pixels]
        turns = [{"from": "human", "value": question}]
        ids = encode_prompt(turns, self.tokenizer, counts, image_ids=self.model.input_spec.image_special_token_ids)
        return Sample(ids, None, pixels)

    def ask(self, question: str, images: Sequence[Any] = (), max_new_tokens: int = 256, **options: Any) -> str:
        """The answer.

        Args:
            question: text; ``<image>`` marks the position of each image.
            images: paths, bytes or PIL images.
            max_new_tokens: most tokens of the answer.
            options: of ``NEO.generate``.

        Raises:
            ValueError: if the question is empty, an image cannot be read, or tags and images do not agree in number.
        """
        with torch.inference_mode():
            answer = self.model.generate(
                [self.prompt(question, images)],
                max_new_tokens,
                stop_token_ids=stop_token_ids(self.tokenizer),
                **options,
            )
        return self.tokenizer.decode(answer[0], skip_special_tokens=True).strip()

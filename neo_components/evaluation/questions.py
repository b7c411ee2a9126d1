"""Questions for a model: from shards, without their images, or with the images of other questions."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

from neo_components.data.shards.folder import read_shards
from neo_components.data.text.turns import IMAGE_TAG

NO_KIND = "other"
"""Kind of a question whose source names none."""


@dataclass(frozen=True)
class Question:
    """One question with its reference answers.

    Args:
        key: identifies the question in messages and reports.
        question: the text. If there is an image but no ``<image>`` in the text, the image precedes the text.
        answers: the reference answers.
        kind: group for the report.
        image: the bytes or the path of an image file; ``None`` for a question about text alone.
    """

    key: str
    question: str
    answers: Sequence[str]
    kind: str = NO_KIND
    image: bytes | str | PathLike[str] | None = field(default=None, repr=False)

    @property
    def prompt(self) -> str:
        """The text, with the image tag if there is an image."""
        if self.image is None or IMAGE_TAG in self.question:
            return self.question
        return f"{IMAGE_TAG}\n{self.question}"


def questions_from_shards(folder: str | PathLike[str]) -> Iterator[Question]:
    """The questions of a folder of shards, each without the earlier turns of its conversation.

    The kind is the sample's extra value ``kind``: a string for all of its questions, or a list with one for each.

    Raises:
        FileNotFoundError: if there are no shards.
        ValueError: if a conversation is not made of human/gpt pairs, a sample has several images, or ``kind`` does not
            fit the questions; the sample is named.
    """
    for sample in read_shards(folder):
        yield from _questions(sample)


def without_images(questions: Iterable[Question]) -> list[Question]:
    """The same questions without images, for a text-only baseline."""
    return [replace(question, image=None, question=_untagged(question.question)) for question in questions]


def shuffle_images(questions: Iterable[Question], seed: int) -> list[Question]:
    """The same questions with permuted images.

    The different images are permuted so that no question keeps its image. Questions without an image are unchanged.

    Args:
        questions: with at least two different images.
        seed: of the permutation.

    Raises:
        ValueError: if there are fewer than two different images.
    """
    questions = list(questions)
    images = list(dict.fromkeys(question.image for question in questions if question.image is not None))
    if len(images) < 2:
        raise ValueError(f"shuffling needs at least two different images, the questions have {len(images)}")
    random.Random(seed).shuffle(images)
    other = dict(zip(images, images[1:] + images[:1], strict=True))
    return [q if q.image is None else replace(q, image=other[q.image]) for q in questions]


def _questions(sample: Mapping[str, Any]) -> Iterator[Question]:
    key, turns, images = sample["key"], sample["conversations"], sample["images"]
    roles = [turn.get("from") for turn in turns or []]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
        raise ValueError(f"sample {key}: questions must be pairs of human and gpt turns, got the turns {roles}")
    if len(images) > 1:
        raise ValueError(f"sample {key}: has {len(images)} images; a question may have one")
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    kinds = sample.get("kind", NO_KIND)
    kinds = [kinds] * len(pairs) if isinstance(kinds, str) else kinds
    if len(kinds) != len(pairs):
        raise ValueError(
            f"sample {key}: 'kind' must be a string or a list of one for each of {len(pairs)} questions, got {kinds!r}"
        )
    for number, ((human, gpt), kind) in enumerate(zip(pairs, kinds, strict=True)):
        yield Question(
            key=f"{key}-{number}" if len(pairs) > 1 else key,
            question=human["value"].removeprefix(f"{IMAGE_TAG}\n"),
            answers=[gpt["value"]],
            kind=kind,
            image=images[0] if images else None,
        )


def _untagged(text: str) -> str:
    return text.replace(f"{IMAGE_TAG}\n", "").replace(IMAGE_TAG, "")

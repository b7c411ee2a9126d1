"""easy-VQA as a source of pictures, and its reader: images of one shape, with questions on its shape and its color.

easy-VQA (Victor Zhou, 2019; MIT): images of 64 x 64 pixels. The training split has 4,000 images and 38,575 questions,
the test split 1,000 images and 9,673 questions; there are 13 different answers.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from PIL import Image

from neo_components.data.pictures.picture import COLOR, HELD_OUT, SPLITS, TRAIN, Picture, PictureSource
from neo_components.errors import one_of
from neo_components.registry import PICTURES

_SHAPES = {"circle", "rectangle", "triangle"}
_YES_NO = {"yes", "no"}
_NAMES = {TRAIN: "train", HELD_OUT: "test"}


@dataclass(frozen=True)
class EasyVQAImage:
    """One image of the package and its questions.

    Args:
        number: of the image in the split.
        path: the PNG file.
        questions: (question, answer) pairs in the package's order.
    """

    number: int
    path: Path
    questions: tuple[tuple[str, str], ...]


def read_easy_vqa(split: str) -> list[EasyVQAImage]:
    """The images of one split with their questions, ordered by number.

    Args:
        split: ``"train"`` or ``"test"``.

    Raises:
        ValueError: for another split.
        ModuleNotFoundError: if the package ``easy-vqa`` is not installed.
    """
    return list(_read(split))


@cache
def _read(split: str) -> tuple[EasyVQAImage, ...]:
    try:
        import easy_vqa
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("easy-VQA is read from the package easy-vqa: run `pip install easy-vqa`") from error

    if split not in ("train", "test"):
        raise ValueError(f"easy-VQA has no split {split!r}; it has 'train' and 'test'")
    train = split == "train"
    questions, answers, numbers = easy_vqa.get_train_questions() if train else easy_vqa.get_test_questions()
    paths = easy_vqa.get_train_image_paths() if train else easy_vqa.get_test_image_paths()
    asked = defaultdict(list)
    for question, answer, number in zip(questions, answers, numbers, strict=True):
        asked[number].append((question, answer))
    return tuple(EasyVQAImage(number, Path(paths[number]), tuple(asked[number])) for number in sorted(asked))


def question_kind(answer: str) -> str:
    """The kind of a question, from its answer: yes or no, one of three shapes, or a color."""
    return "yes_no" if answer in _YES_NO else "shape" if answer in _SHAPES else "color"


@PICTURES.register("easy_vqa")
class EasyVQA(PictureSource):
    """The training split of easy-VQA; its test split is held out.

    Two questions in three or more are open; of the others as many are answered by yes as by no, also of those that ask
    whether a shape is missing.
    """

    license: ClassVar[str] = "MIT"
    origin: ClassVar[str] = "PyPI package easy-vqa (Victor Zhou, 2019)"

    def items(self, split: str) -> int:
        """Number of images.

        Raises:
            ValueError: for an unknown split.
        """
        one_of("split", split, SPLITS)
        return len(_read(_NAMES[split]))

    def draw(self, number: int, split: str, rng: random.Random) -> Picture:
        """An image of the package with one to three of its questions."""
        one_of("split", split, SPLITS)
        images = _read(_NAMES[split])
        drawn = images[number % len(images)]
        by_kind: dict[object, list[tuple[str, str]]] = defaultdict(list)
        for question, answer in drawn.questions:
            by_kind[(" no" in question, answer) if answer in _YES_NO else "open"].append((question, answer))
        turns: list[tuple[str, str]] = []
        for _ in range(rng.randint(1, 3)):
            negative, answer, asks_openly = rng.random() < 0.5, rng.choice(("yes", "no")), rng.random() < 2 / 3
            # An image that leaves only one of the answers would give that one more often.
            both = all(by_kind[negative, one] for one in ("yes", "no"))
            wanted: object = (negative, answer) if both and not asks_openly else "open"
            if left := [turn for turn in by_kind[wanted] if turn not in turns]:
                turns.append(rng.choice(left))
        with Image.open(drawn.path) as image:
            return Picture(image.convert("RGB"), tuple(turns or drawn.questions[:1]), "scene", frozenset({COLOR}))

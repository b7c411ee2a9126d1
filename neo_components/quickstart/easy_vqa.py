"""The quickstart's data: the easy-VQA package's own train and test split, as conversations in shards.

easy-VQA (Victor Zhou, 2019): images of 64 x 64 pixels with one colored shape, and questions about its shape and its
color, open and yes/no. The training split has 4,000 images and 38,575 questions, the test split 1,000 images and 9,673
questions; there are 13 different answers.
"""

from __future__ import annotations

import io
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from neo_components.data import write_shards
from neo_components.data.pictures.easy_vqa import EasyVQAImage, question_kind, read_easy_vqa

KINDS = ("shape", "color", "yes_no")
"""The kinds of question."""


@dataclass
class EasyVQAPart:
    """One folder of shards that :func:`write_easy_vqa` wrote.

    Args:
        folder: the folder.
        samples: number of samples.
        questions: number of questions.
        images: number of different images, 0 for text.
        kinds: number of questions of each kind.
    """

    folder: Path
    samples: int = 0
    questions: int = 0
    images: int = 0
    kinds: dict[str, int] = field(default_factory=dict)


def write_easy_vqa(
    folder: str | Path,
    *,
    validation_images: int = 400,
    questions_per_sample: int = 2,
    text_questions_per_sample: int = 1,
    mirror: bool = True,
    seed: int = 0,
) -> dict[str, EasyVQAPart]:
    """Writes easy-VQA as shards, one folder for each use.

    ``train_all``: all training questions; a sample is one image and some questions about it, so an image is in several
    samples. ``train_open``: only the open questions about shape and color, similar to captions. ``train_text``: all
    training questions without images. ``validation``: images held out of the training split, one question per sample.
    ``validation_text``: the same questions without images. ``test``: the test split, one question per sample. Training
    samples are in random order, the others ordered by image.

    Each sample's ``kind`` lists the kind of each of its questions.

    Args:
        folder: parent of the folders.
        validation_images: number of training images held out, with all of their questions.
        questions_per_sample: maximum number of questions per training sample with an image.
        text_questions_per_sample: maximum number of questions per sample of ``train_text``.
        mirror: add every training sample with an image a second time, mirrored left to right; no question depends on
            sides, and 3,600 images are few.
        seed: of the held-out images and of the order of samples and questions.

    Returns:
        The folders and counts, by name.

    Raises:
        ValueError: if no training image is left, or a number of questions is not positive.
    """
    folder = Path(folder)
    train, validation = split_images(validation_images, seed)
    parts = {
        "train_all": list(_conversations(train, questions_per_sample, seed)),
        "train_open": list(_conversations(train, questions_per_sample, seed, kinds=("shape", "color"))),
        "train_text": list(_conversations(train, text_questions_per_sample, seed, with_images=False)),
        "validation": list(_conversations(validation, 1)),
        "validation_text": list(_conversations(validation, 1, with_images=False)),
        "test": list(_conversations(read_easy_vqa("test"), 1)),
    }
    if mirror:
        for name in ("train_all", "train_open"):
            parts[name] = _with_mirrored(parts[name], seed)
    return {name: _write(samples, folder / name) for name, samples in parts.items()}


def split_images(validation_images: int, seed: int) -> tuple[list[EasyVQAImage], list[EasyVQAImage]]:
    """The images of the training split, divided by ``seed`` into training and held-out images.

    Raises:
        ValueError: if ``validation_images`` is negative or leaves no training image.
    """
    images = read_easy_vqa("train")
    if not 0 <= validation_images < len(images):
        raise ValueError(f"validation_images is {validation_images}; allowed: 0 to {len(images) - 1}")
    held_out = set(random.Random(seed).sample(range(len(images)), validation_images))
    train = [image for number, image in enumerate(images) if number not in held_out]
    return train, [images[number] for number in sorted(held_out)]


def text_conversations(
    images: Sequence[EasyVQAImage], seed: int = 0, questions_per_sample: int = 4
) -> list[list[dict[str, str]]]:
    """Text for training a language model: the questions about some images, without the images.

    Each question appears twice: alone, and in a conversation of up to ``questions_per_sample`` questions about the same
    image, so that the model also sees longer texts.
    """
    return [
        sample["conversations"]
        for questions in (1, questions_per_sample)
        for sample in _conversations(images, questions, seed, with_images=False)
    ]


def baselines() -> dict[str, float]:
    """Test scores of two baselines that ignore the image.

    Returns:
        ``"majority"``: the most frequent answer of the training split. ``"lookup"``: the most frequent answer to each
        question there, the optimum without images.
    """
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for image in read_easy_vqa("train"):
        for question, answer in image.questions:
            by_question[question][answer] += 1
    overall = sum(by_question.values(), Counter()).most_common(1)[0][0]
    asked = [pair for image in read_easy_vqa("test") for pair in image.questions]
    best = {question: counts.most_common(1)[0][0] for question, counts in by_question.items()}
    return {
        "majority": sum(answer == overall for _, answer in asked) / len(asked),
        "lookup": sum(answer == best.get(question, overall) for question, answer in asked) / len(asked),
    }


def _conversations(
    images: Iterable[EasyVQAImage],
    questions_per_sample: int,
    seed: int | None = None,
    *,
    kinds: Sequence[str] = KINDS,
    with_images: bool = True,
) -> Iterator[dict[str, Any]]:
    """Samples of at most ``questions_per_sample`` questions; with a seed, samples and questions are in random order."""
    if questions_per_sample < 1:
        raise ValueError(f"a sample needs at least one question, got {questions_per_sample}")
    shuffle = random.Random(seed)
    samples = []
    for image in images:
        asked = [pair for pair in image.questions if question_kind(pair[1]) in kinds]
        if seed is not None:
            asked = _mixed(asked, shuffle)
        for start in range(0, len(asked), questions_per_sample):
            some = asked[start : start + questions_per_sample]
            if seed is not None:
                shuffle.shuffle(some)
            samples.append(_sample(image, f"{image.number:04d}-{start:02d}", some, with_images))
    if seed is not None:
        shuffle.shuffle(samples)
    yield from samples


def _mixed(asked: Sequence[tuple[str, str]], shuffle: random.Random) -> list[tuple[str, str]]:
    """In random order with alternating kinds, so that the answers in one sample differ."""
    by_kind: dict[str, list[tuple[str, str]]] = {kind: [] for kind in KINDS}
    for pair in asked:
        by_kind[question_kind(pair[1])].append(pair)
    for pairs in by_kind.values():
        shuffle.shuffle(pairs)
    return [pair for group in zip_longest(*by_kind.values()) for pair in group if pair is not None]


def _sample(image: EasyVQAImage, key: str, asked: Sequence[tuple[str, str]], with_images: bool) -> dict[str, Any]:
    """One sample in LLaVA format, with the image tag before the first question."""
    turns = []
    for number, (question, answer) in enumerate(asked):
        tag = "<image>\n" if with_images and number == 0 else ""
        turns += [{"from": "human", "value": tag + question}, {"from": "gpt", "value": answer}]
    return {
        "key": key,
        "conversations": turns,
        "images": [image.path] if with_images else [],
        "kind": [question_kind(answer) for _, answer in asked],
    }


def _with_mirrored(samples: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Every sample with the original and with the mirrored image, in random order."""
    files = {path: _mirrored(path) for path in {path for sample in samples for path in sample["images"]}}
    both = samples + [
        sample | {"key": f"{sample['key']}m", "images": [files[path] for path in sample["images"]]}
        for sample in samples
    ]
    random.Random(seed).shuffle(both)
    return both


def _mirrored(path: Path) -> bytes:
    """The image mirrored left to right, as PNG."""
    with Image.open(path) as image:
        data = io.BytesIO()
        ImageOps.mirror(image).save(data, "png")
    return data.getvalue()


def _write(samples: list[dict[str, Any]], folder: Path) -> EasyVQAPart:
    """Writes one folder of shards and counts its contents."""
    write_shards(samples, folder)
    kinds = Counter(kind for sample in samples for kind in sample["kind"])
    return EasyVQAPart(
        folder=folder,
        samples=len(samples),
        questions=kinds.total(),
        images=len({path for sample in samples for path in sample["images"]}),
        kinds={kind: kinds[kind] for kind in KINDS if kinds[kind]},
    )

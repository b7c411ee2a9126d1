"""Asks a model every question, by greedy free generation, and scores the answers by a metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from neo_components.data.image.images import load_image
from neo_components.data.limits import MAX_PIXELS, MIN_PIXELS
from neo_components.data.text.conversation import encode_prompt
from neo_components.data.text.templates import stop_token_ids
from neo_components.evaluation.metrics.base import OVERALL, AnswerMetric, make_metric
from neo_components.evaluation.questions import Question, shuffle_images
from neo_components.registry import METRICS, Choice
from neo_components.storage.progress import progress as show_progress
from neo_components.types import InputSpec, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_MEMORY = 2**29
"""Bytes of decoded images that are kept before their questions are asked."""


class Generator(Protocol):
    """A model that can be evaluated: ``NEO``, or anything with the same methods."""

    @property
    def input_spec(self) -> InputSpec:
        """Description of the model's input."""

    def generate(
        self,
        samples: Sequence[Sample],
        max_new_tokens: int = 16,
        do_sample: bool = False,
        *,
        stop_token_ids: Sequence[int] = (),
    ) -> list[Tensor]:
        """Continues prompts: one [new] int64 each, the stop token included."""


@dataclass(frozen=True)
class Answer:
    """A model's answer to one question.

    Args:
        key: of the question.
        question: its text.
        answers: the reference answers.
        kind: of the question.
        prediction: the model's answer.
        score: by the metric, from 0 (wrong) to 1 (right).
        right: whether the score is at least one half.
    """

    key: str
    question: str
    answers: Sequence[str]
    kind: str
    prediction: str
    score: float
    right: bool


@dataclass(frozen=True)
class Report:
    """The outcome of :func:`evaluate`.

    Args:
        accuracy: mean score, ``"overall"`` and of each kind.
        counts: number of questions, ``"overall"`` and of each kind.
        predictions: one for each question, in the order of the questions.
        metric: the metric: its name, or a mapping of ``kind`` and every option.
    """

    accuracy: dict[str, float]
    counts: dict[str, int]
    predictions: list[Answer]
    metric: Choice


def evaluate(
    model: Generator,
    tokenizer: PreTrainedTokenizerBase,
    samples: Iterable[Question],
    *,
    metric: Choice = "exact_match",
    batch_size: int = 256,
    max_new_tokens: int = 16,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    shuffle_images_seed: int | None = None,
    device: torch.device | str | None = None,
    progress: str | None = "evaluating",
) -> Report:
    """Asks every question and scores the answers.

    Answers are generated freely and greedily; special tokens and outer whitespace are removed from them. An image that
    several questions share is decoded once, as long as its questions are near each other.

    Args:
        model: has ``generate`` and ``input_spec``.
        tokenizer: from :func:`neo_components.data.load_tokenizer`.
        samples: the questions.
        metric: name of a registered metric, or a mapping of ``kind`` (the name) and its options.
        batch_size: number of questions per call of ``generate``.
        max_new_tokens: maximum length of an answer in tokens.
        min_pixels: smallest area of an image after resizing, as in training.
        max_pixels: largest area of an image after resizing.
        shuffle_images_seed: gives each question the image of another one (:func:`shuffle_images`): an answer that is
            still right did not depend on the image.
        device: where to move the model first; ``None`` leaves it where it is.
        progress: title of the progress; ``None`` shows nothing.

    Raises:
        ValueError: if there is no question, one has no reference answer, ``batch_size`` is not positive, or the metric
            or one of its options is unknown.
        ImageError: (a ``ValueError``) if an image is unusable; the question is named.
    """
    questions = _checked(samples, batch_size)
    asked = questions if shuffle_images_seed is None else shuffle_images(questions, shuffle_images_seed)
    if device is not None and isinstance(model, torch.nn.Module):
        model.to(device)
    scorer = make_metric(metric, sorted({question.kind for question in questions}))
    encoder = _Encoder(tokenizer, model.input_spec, min_pixels, max_pixels)
    stops = stop_token_ids(tokenizer)
    answers = [""] * len(questions)
    with show_progress(progress, total=len(questions)) as bar:
        for batch in _batches(asked, encoder, batch_size):
            new = model.generate([sample for _, sample in batch], max_new_tokens, do_sample=False, stop_token_ids=stops)
            numbers = [number for number, _ in batch]
            for number, tokens in zip(numbers, new, strict=True):
                answers[number] = str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True)).strip()
            some = [questions[number] for number in numbers]
            scorer.update([answers[n] for n in numbers], [q.answers for q in some], [q.kind for q in some])
            bar.advance(len(batch), note=f"score {scorer.total.sum() / scorer.count.sum():.3f}")
    return _report(questions, answers, scorer, METRICS.complete(metric))


def _checked(samples: Iterable[Question], batch_size: int) -> list[Question]:
    questions = list(samples)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not questions:
        raise ValueError("no questions to ask; give at least one")
    for question in questions:
        if not question.answers:
            raise ValueError(f"question {question.key!r} has no reference answer; give at least one")
    return questions


class _Encoder:
    """Encodes questions as prompts; caches decoded images until :meth:`forget`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: InputSpec, min_pixels: int, max_pixels: int) -> None:
        self.tokenizer, self.spec = tokenizer, spec
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.images: dict[bytes | str | PathLike[str], Tensor] = {}

    @property
    def memory(self) -> int:
        """Bytes of the cached images."""
        return sum(image.nbytes for image in self.images.values())

    def forget(self) -> None:
        """Clears the cache; samples keep their images."""
        self.images.clear()

    def __call__(self, question: Question) -> Sample:
        images = [] if question.image is None else [self._image(question)]
        visual_tokens = [self.spec.image_tokens(*image.shape[1:]) for image in images]
        turns = [{"from": "human", "value": question.prompt}]
        token_ids = encode_prompt(turns, self.tokenizer, visual_tokens, image_ids=self.spec.image_special_token_ids)
        return Sample(token_ids, images=images, key=question.key)

    def _image(self, question: Question) -> Tensor:
        assert question.image is not None
        if question.image not in self.images:
            name = f"question {question.key!r}"
            self.images[question.image] = load_image(
                question.image, self.spec.factor, self.min_pixels, self.max_pixels, name=name
            )
        return self.images[question.image]


def _batches(questions: Sequence[Question], encode: _Encoder, batch_size: int) -> Iterator[list[tuple[int, Sample]]]:
    """Numbered prompts, in batches of similar length."""
    for window in _windows(questions, encode, batch_size):
        window.sort(key=lambda numbered: len(numbered[1].token_ids))
        for start in range(0, len(window), batch_size):
            yield window[start : start + batch_size]


def _windows(questions: Sequence[Question], encode: _Encoder, batch_size: int) -> Iterator[list[tuple[int, Sample]]]:
    """Numbered prompts in order, a multiple of the batch size at a time, limited by the memory of their images."""
    window: list[tuple[int, Sample]] = []
    for number, question in enumerate(questions):
        window.append((number, encode(question)))
        if len(window) % batch_size == 0 and encode.memory >= IMAGE_MEMORY:
            yield window
            window = []
            encode.forget()
    if window:
        yield window


def _report(questions: Sequence[Question], answers: Sequence[str], scorer: AnswerMetric, metric: Choice) -> Report:
    means = scorer.compute()
    assert isinstance(means, dict)  # as it was made with kinds
    kinds = Counter(question.kind for question in questions)
    scores = [scorer.checked_score(answer, q.answers) for q, answer in zip(questions, answers, strict=True)]
    predictions = [
        Answer(q.key, q.question, q.answers, q.kind, answer, score, score >= 0.5)
        for q, answer, score in zip(questions, answers, scores, strict=True)
    ]
    return Report(
        accuracy={name: float(mean) for name, mean in means.items()},
        counts={OVERALL: len(questions), **{kind: kinds[kind] for kind in scorer.kinds}},
        predictions=predictions,
        metric=metric,
    )

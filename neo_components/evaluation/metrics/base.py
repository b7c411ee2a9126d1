"""The base of all metrics: the mean of a score in [0, 1] that every answer gets, overall and by kind of question.

A metric is a class with a method ``score`` and a registered name::

    @METRICS.register("starts_with")
    class StartsWith(AnswerMetric):
        def score(self, prediction: str, targets: Sequence[str]) -> float:
            return float(any(prediction.startswith(target) for target in targets))

Sums and counts are added over processes, so a result depends neither on the batch size nor on the order of the answers
nor on the number of processes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from neo_components.registry import METRICS, Choice, split

OVERALL = "overall"
"""Name of the score over all answers in a grouped result."""


class AnswerMetric(Metric):
    """Mean score of answers, overall and by kind of question.

    A subclass defines :meth:`score`. Arguments of its constructor other than ``kinds`` are the metric's options.

    Args:
        kinds: kinds to report on, known beforehand so that all processes count in the same order. Empty: no groups.
        kwargs: passed to ``torchmetrics.Metric``.

    ``compute()`` returns the mean as a scalar, or with ``kinds`` a dictionary: ``"overall"`` and each kind. A kind
    without answers, or a metric without any, gives NaN.

    Raises:
        ValueError: if a kind is given twice or is called ``"overall"``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, kinds: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kinds = tuple(kinds)
        if len(set(self.kinds)) < len(self.kinds) or OVERALL in self.kinds:
            raise ValueError(f"kinds must differ from each other and from {OVERALL!r}, got {list(self.kinds)}")
        groups = max(len(self.kinds), 1)
        self.add_state("total", torch.zeros(groups, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(groups, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    def score(self, prediction: str, targets: Sequence[str]) -> float:
        """The score of one answer, from 0 (wrong) to 1 (right).

        Args:
            prediction: the model's answer; may be empty.
            targets: the reference answers, at least one; the same one may be given several times (ten annotators).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define score(prediction, targets)")

    def update(
        self,
        predictions: Sequence[str],
        targets: Sequence[str | Sequence[str]],
        kinds: Sequence[str] | None = None,
    ) -> None:
        """Adds the scores of some answers.

        Args:
            predictions: the model's answers.
            targets: for each prediction the reference answer, or several.
            kinds: the kind of each question; needed if the metric was made with ``kinds``, else ignored.

        Raises:
            ValueError: if the lists differ in length, a kind is missing or was not announced, or a score is not in
                [0, 1].
        """
        groups = self._groups(kinds, len(predictions))
        if not len(predictions) == len(targets) == len(groups):
            raise ValueError(
                f"predictions, targets and kinds must be equally long, got {len(predictions)}, {len(targets)} and "
                f"{len(groups)}"
            )
        for prediction, accepted, group in zip(predictions, targets, groups, strict=True):
            self.total[group] += self.checked_score(prediction, accepted)
            self.count[group] += 1

    def checked_score(self, prediction: str, targets: str | Sequence[str]) -> float:
        """:meth:`score` of one answer, for which there must be a reference answer.

        Raises:
            ValueError: if there is no reference answer, or the score is not in [0, 1].
        """
        accepted = [targets] if isinstance(targets, str) else list(targets)
        if not accepted:
            raise ValueError(f"no target to compare the prediction {prediction!r} with; give at least one")
        score = float(self.score(prediction, accepted))
        if not 0 <= score <= 1:
            raise ValueError(
                f"{type(self).__name__}.score must return a number from 0 to 1, got {score} for the prediction "
                f"{prediction!r} and the targets {accepted}"
            )
        return score

    def compute(self) -> Tensor | dict[str, Tensor]:
        """The mean score: a scalar, or a dictionary if the metric has kinds."""
        overall = (self.total.sum() / self.count.sum()).float()
        if not self.kinds:
            return overall
        return {OVERALL: overall, **dict(zip(self.kinds, (self.total / self.count).float(), strict=True))}

    def _groups(self, kinds: Sequence[str] | None, answers: int) -> list[int]:
        """Index of the group of each answer."""
        if not self.kinds:
            return [0] * answers
        if kinds is None:
            raise ValueError(f"this metric groups by kind: give the kind of each question, one of {list(self.kinds)}")
        unknown = sorted(set(kinds) - set(self.kinds))
        if unknown:
            raise ValueError(f"unknown kinds {unknown}; this metric was made for {list(self.kinds)}")
        return [self.kinds.index(kind) for kind in kinds]


def make_metric(choice: Choice, kinds: Sequence[str]) -> AnswerMetric:
    """A registered metric with its options.

    Args:
        choice: its name, or a mapping of ``kind`` (the name) and options.
        kinds: kinds of question to report on.

    Raises:
        ArgumentError: (a ``ValueError``) if the name or an option is unknown.
        TypeError: if what is registered is no :class:`AnswerMetric`, or its constructor does not take ``kinds``.
    """
    name, _ = split(choice, METRICS.kind)
    part = METRICS[name]
    if not (inspect.isclass(part) and issubclass(part, AnswerMetric)):
        raise TypeError(f"metric {name!r} must be a subclass of neo_components.evaluation.AnswerMetric, got {part!r}")
    if "kinds" not in inspect.signature(part).parameters:
        raise TypeError(f"metric {name!r}: its constructor must take 'kinds' and pass it to AnswerMetric.__init__")
    metric: AnswerMetric = METRICS.make(choice, kinds=kinds)
    return metric

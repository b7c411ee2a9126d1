"""Scores of answers, as torchmetrics: each sample is scored in ``update``, only counts are kept.

Counts are summed across processes, so a result depends neither on the batch size nor on the order of the samples nor on
the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

OVERALL = "overall"
"""Name of the score over all samples in a grouped result."""


def exact_match(prediction: str, targets: str | Sequence[str]) -> float:
    """1.0 if the prediction is one of the targets, else 0.0 (the rule of GQA, OCRVQA and easy-VQA).

    Both sides are trimmed and lower-cased; punctuation, articles and numbers are left as they are. With several targets
    the best one counts. An empty prediction is legal.

    Args:
        prediction: the model's answer.
        targets: the accepted answer, or several.

    Raises:
        ValueError: if there is no target.

    Source: VLMEvalKit, ``exact_matching`` policy.
    """
    accepted = [targets] if isinstance(targets, str) else list(targets)
    if not accepted:
        raise ValueError(f"no target to compare the prediction {prediction!r} with; give one accepted answer or more")
    return float(prediction.strip().lower() in {target.strip().lower() for target in accepted})


class ExactMatch(Metric):
    """Share of predictions that equal an accepted answer, overall and by kind of question.

    Args:
        kinds: kinds to report on, known beforehand so that all processes count in the same order. Empty: no groups.
        kwargs: passed to ``torchmetrics.Metric``.

    ``compute()`` returns the fraction as a scalar, or with ``kinds`` a dictionary: ``"overall"`` and each kind. A kind
    without samples, or a metric without any, gives NaN.

    Raises:
        ValueError: if a kind is given twice or is called ``"overall"``.

    Example:
        >>> metric = ExactMatch(kinds=["color", "shape"])
        >>> metric.update(["red", "circle"], [["red"], ["square"]], kinds=["color", "shape"])
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'overall': 0.5, 'color': 1.0, 'shape': 0.0}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: Tensor
    count: Tensor

    def __init__(self, kinds: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kinds = tuple(kinds)
        if len(set(self.kinds)) < len(self.kinds) or OVERALL in self.kinds:
            raise ValueError(f"kinds must differ from each other and from {OVERALL!r}, got {list(self.kinds)}")
        groups = max(len(self.kinds), 1)
        self.add_state("right", torch.zeros(groups, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(groups, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        predictions: Sequence[str],
        targets: Sequence[str | Sequence[str]],
        kinds: Sequence[str] | None = None,
    ) -> None:
        """Counts the hits of some samples.

        Args:
            predictions: the model's answers.
            targets: for each prediction the accepted answer, or several.
            kinds: the kind of each sample; needed if the metric was made with ``kinds``, else ignored.

        Raises:
            ValueError: if the lists differ in length, or a kind is missing or was not announced.
        """
        groups = self._groups(kinds, len(predictions))
        if not len(predictions) == len(targets) == len(groups):
            raise ValueError(
                f"predictions, targets and kinds must be equally long, got {len(predictions)}, {len(targets)} and "
                f"{len(groups)}"
            )
        for prediction, accepted, group in zip(predictions, targets, groups, strict=True):
            self.right[group] += int(exact_match(prediction, accepted))
            self.count[group] += 1

    def compute(self) -> Tensor | dict[str, Tensor]:
        """The fraction right: a scalar, or a dictionary if the metric has kinds."""
        overall = self.right.sum() / self.count.sum()
        if not self.kinds:
            return overall
        return {OVERALL: overall, **dict(zip(self.kinds, self.right / self.count, strict=True))}

    def _groups(self, kinds: Sequence[str] | None, samples: int) -> list[int]:
        """Number of the group of each sample."""
        if not self.kinds:
            return [0] * samples
        if kinds is None:
            raise ValueError(f"this metric groups by kind: give the kind of each sample, one of {list(self.kinds)}")
        unknown = sorted(set(kinds) - set(self.kinds))
        if unknown:
            raise ValueError(f"unknown kinds {unknown}; this metric was made for {list(self.kinds)}")
        return [self.kinds.index(kind) for kind in kinds]

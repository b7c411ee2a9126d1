"""Exact match, the rule of GQA, OCRVQA and easy-VQA. Source: VLMEvalKit, ``exact_matching`` policy."""

from __future__ import annotations

from collections.abc import Sequence

from neo_components.evaluation.metrics.base import AnswerMetric
from neo_components.registry import METRICS


def exact_match(prediction: str, targets: str | Sequence[str]) -> float:
    """1.0 if the prediction is one of the targets, else 0.0.

    Both sides are trimmed and lowercased; punctuation, articles and numbers are left as they are. An empty prediction
    is legal.

    Args:
        prediction: the model's answer.
        targets: the accepted answer, or several.

    Raises:
        ValueError: if there is no target.
    """
    accepted = [targets] if isinstance(targets, str) else list(targets)
    if not accepted:
        raise ValueError(f"no target to compare the prediction {prediction!r} with; give at least one")
    return float(prediction.strip().lower() in {target.strip().lower() for target in accepted})


@METRICS.register("exact_match")
class ExactMatch(AnswerMetric):
    """Fraction of predictions that equal an accepted answer, overall and by kind of question.

    Example:
        >>> metric = ExactMatch(kinds=["color", "shape"])
        >>> metric.update(["red", "circle"], [["red"], ["square"]], kinds=["color", "shape"])
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'overall': 0.5, 'color': 1.0, 'shape': 0.0}
    """

    def score(self, prediction: str, targets: Sequence[str]) -> float:
        """1.0 if the prediction is one of the targets, else 0.0 (:func:`exact_match`)."""
        return exact_match(prediction, targets)

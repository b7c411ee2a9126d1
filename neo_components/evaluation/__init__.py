"""Evaluation: questions, the runner that asks them, and the metrics that score the answers."""

from neo_components.evaluation.metrics.base import OVERALL, AnswerMetric, make_metric
from neo_components.evaluation.metrics.exact_match import ExactMatch, exact_match
from neo_components.evaluation.questions import Question, questions_from_shards, shuffle_images, without_images
from neo_components.evaluation.runner import Answer, Report, evaluate

__all__ = [
    "OVERALL", "Answer", "AnswerMetric", "ExactMatch", "Question", "Report", "evaluate", "exact_match", "make_metric",
    "questions_from_shards", "shuffle_images", "without_images",
]  # fmt: skip

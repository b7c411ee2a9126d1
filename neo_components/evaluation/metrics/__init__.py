"""Metrics of answers, one file each; ``METRICS`` finds them by name. :class:`AnswerMetric` is the base of all."""

from neo_components.evaluation.metrics.base import OVERALL, AnswerMetric, make_metric

__all__ = ["OVERALL", "AnswerMetric", "make_metric"]

"""Figures of masks, attention, samples and results, written as PNG."""

from neo_components.viewers.attention import draw_attention
from neo_components.viewers.masks import draw_mask
from neo_components.viewers.results import draw_answers, draw_curves
from neo_components.viewers.samples import draw_histograms, draw_samples

__all__ = ["draw_answers", "draw_attention", "draw_curves", "draw_histograms", "draw_mask", "draw_samples"]

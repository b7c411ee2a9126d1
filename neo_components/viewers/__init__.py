"""Pictures of masks, attention and results, written as PNG."""

from neo_components.viewers.attention import draw_attention
from neo_components.viewers.masks import draw_mask
from neo_components.viewers.results import draw_answers, draw_curves

__all__ = ["draw_answers", "draw_attention", "draw_curves", "draw_mask"]

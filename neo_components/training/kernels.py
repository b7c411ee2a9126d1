"""Resolves ``stage.kernels``: whether norms and gates of a model compute with Liger's kernels."""

from __future__ import annotations

import logging

import torch

from neo_components.components.liger import installed, use_liger
from neo_components.model.neo import NEO
from neo_components.recipe.stage import StageConfig

log = logging.getLogger(__name__)


def use_kernels(model: NEO, stage: StageConfig) -> int:
    """Gives a model the kernels of its stage; returns how many modules use Liger's.

    ``auto`` takes them where there is a GPU and the package is installed, unless blocks are compiled: inductor fuses
    norms and gates itself.

    Raises:
        ValueError: if ``liger`` is asked for, and there is no GPU or no package.
    """
    here = torch.cuda.is_available()
    if stage.kernels == "plain" or (stage.kernels == "auto" and not (here and installed() and not stage.compile)):
        return 0
    if not installed():
        raise ValueError(
            "stage.kernels: liger: the package liger-kernel is not installed: pip install liger-kernel, or use plain"
        )
    if not here:
        raise ValueError("stage.kernels: liger: its kernels need a GPU, and there is none here; use plain or auto")
    count = use_liger(model)
    log.info("stage.kernels: %d norms and gates compute with Liger's kernels", count)
    return count

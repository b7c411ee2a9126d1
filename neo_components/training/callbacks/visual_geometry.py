"""The geometry of visual tokens as they enter the language model, beside that of the words."""

from __future__ import annotations

from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from neo_components.components.geometry import geometry_of
from neo_components.token_indices import TokenIndices, sent
from neo_components.training.callbacks.loggers import log_once
from neo_components.training.module import NEOTraining
from neo_components.types import PADDING, TokenKind

MOST = 4096
"""Tokens of a micro-batch that are measured, its first ones."""
NAMES = ("visual/norm", "visual/mean_share", "visual/effective_rank", "words/norm")
"""Of the values of :func:`measured` in the log."""


class VisualGeometry(Callback):
    """Logs with every entry whose step has images: ``visual/norm`` and ``words/norm``, mean L2 norms of the
    tokens that enter the language model; ``visual/mean_share``, the fraction of the visual tokens' squared norm that is
    their common mean; and ``visual/effective_rank``, in how many directions they vary (``components.geometry``).

    Measured on the first process, in the step's last micro-batch with images, on at most 4,096 visual tokens and as
    many words; in other steps nothing is computed.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self._found: Tensor | None = None
        self._hook: Any = None

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watches the language model's input if the step may be logged."""
        assert isinstance(module, NEOTraining)
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            llm = module.model.post_llm
            self._hook = llm.register_forward_pre_hook(self._measure, with_kwargs=True)

    def _measure(self, llm: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if (known := named.get("known")) is not None and known.visual.count:
            self._found = measured(arguments[0], known)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs what was measured, if the step is complete."""
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        if trainer.global_step % trainer.log_every_n_steps == 0 and self._found is not None:  # type: ignore[attr-defined]
            found = zip(NAMES, self._found.tolist(), strict=True)
            self.values = {name: value for name, value in found if value == value}  # NaN: no words
            log_once(trainer, self.values, trainer.global_step - 1)
            self._found = None


@torch.no_grad()
def measured(x: Tensor, known: TokenIndices) -> Tensor:
    """[4]: norm, mean share and effective rank of the visual tokens, and mean norm of the words (NaN without words).

    Args:
        x: [B, L, D], what enters the language model.
        known: what the CPU knows of these tokens.
    """
    flat = x.flatten(0, 1)
    words = (known.ids["token_kinds"] == TokenKind.TEXT) & (known.ids["document_ids"] != PADDING)
    index = torch.from_numpy(np.flatnonzero(words.numpy())[:MOST])
    lengths = flat.index_select(0, sent(index, x.device)).float().norm(dim=1)
    visual = geometry_of(flat.index_select(0, known.visual.exact[:MOST]))
    return torch.stack([*visual, lengths.mean()])

"""Callbacks for progress lines, history, weight averaging, and answers to validation questions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from neo_components.evaluation import OVERALL, Question, Report, evaluate
from neo_components.model.chat import Chat
from neo_components.registry import Choice, split
from neo_components.storage.progress import progress
from neo_components.viewers import draw_answers

SHOWN = 8
"""Number of questions in the figure of each validation."""


class LineProgress(Callback):
    """Progress as plain lines, for logs and pipes; printed by rank 0."""

    def __init__(self, title: str) -> None:
        self.title, self.note = title, ""

    @rank_zero_only
    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Starts at the step that the run starts or resumes from."""
        self.context = progress(self.title, int(trainer.max_steps))
        self.bar = self.context.__enter__()
        self.bar.advance(trainer.global_step)

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advances and shows the loss, behind the last micro-batch of a step."""
        if new := trainer.global_step - self.bar.done:
            if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                self.note = f"loss {float(module.step_loss):.3f}"  # type: ignore[arg-type]
            self.bar.advance(new, self.note)

    @rank_zero_only
    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Closes the progress."""
        self.context.__exit__(None, None, None)


def averaging(decay: float) -> Callback:
    """An exponential moving average of the weights for validation, checkpoints and the trained model.

    Args:
        decay: weight of the previous average, for example 0.999.
    """
    # The buffers are tables of rotary axes, which must not be averaged.
    return EMAWeightAveraging(decay=decay, use_buffers=False)


class History(Callback):
    """Keeps (step, seconds since the start, training loss) of every step, and (step, values) of every validation."""

    def __init__(self) -> None:
        self._losses: list[tuple[int, float, float]] = []
        self._unread: list[tuple[int, float, Tensor]] = []
        self.validations: list[tuple[int, dict[str, float]]] = []
        self.began = time.monotonic()
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Starts at the step that the run starts or resumes from."""
        self._step = trainer.global_step

    @property
    def losses(self) -> list[tuple[int, float, float]]:
        """Of every step. New losses are read from their device."""
        if self._unread:
            values = torch.stack([loss for _, _, loss in self._unread]).tolist()
            self._losses += [(step, at, loss) for (step, at, _), loss in zip(self._unread, values, strict=True)]
            self._unread = []
        return self._losses

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Adds a validation."""
        found = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        self.validations.append((trainer.global_step, found))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds a step. Losses are read with every entry of the log only, as reading waits for the device."""
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        self._unread.append((step, time.monotonic() - self.began, module.step_loss))  # type: ignore[arg-type]
        if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            _ = self.losses


class Predictions(Callback):
    """Answers validation questions by free generation at every validation.

    Logs the mean score as ``val/METRIC``, and to TensorBoard the first eight images with question, reference answer and
    prediction.

    Args:
        questions: the questions.
        chat: the model in training, its tokenizer and image limits.
        folder: where the figures are written.
        metric: scores the answers; its name, or a mapping of ``kind`` and options.
        max_new_tokens: length limit of an answer.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        chat: Chat,
        folder: Path,
        metric: Choice = "exact_match",
        max_new_tokens: int = 16,
    ) -> None:
        self.questions, self.chat = list(questions), chat
        self.folder, self.metric, self.max_new_tokens = folder, metric, max_new_tokens
        self.scores: list[tuple[int, float, float]] = []
        self.began = time.monotonic()

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Answers, scores and logs. All ranks do the same work, so that none waits for another."""
        report = evaluate(
            self.chat.model,
            self.chat.tokenizer,
            self.questions,
            metric=self.metric,
            min_pixels=self.chat.min_pixels,
            max_pixels=self.chat.max_pixels,
            max_new_tokens=self.max_new_tokens,
            progress=None,
        )
        score = report.accuracy[OVERALL]
        module.log(f"val/{split(self.metric)[0]}", score, prog_bar=True, rank_zero_only=True)
        self.scores.append((trainer.global_step, time.monotonic() - self.began, score))
        if trainer.is_global_zero:
            self._show(trainer, report)

    def _show(self, trainer: lightning.Trainer, report: Report) -> None:
        """Draws the first questions that have an image."""
        rows = [
            (question.image, a.question, a.answers[0], a.prediction, a.right)
            for question, a in zip(self.questions, report.predictions, strict=True)
            if question.image is not None
        ][:SHOWN]
        if not rows:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = draw_answers(rows, self.folder / f"answers-{trainer.global_step:06d}.png")
        with Image.open(path) as figure:
            pixels = np.asarray(figure.convert("RGB"))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("val/answers", pixels, trainer.global_step, dataformats="HWC")

"""The only place with a ``training_step``: a NEO and a stage joined for Lightning's Trainer."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from neo_components.model import NEO
from neo_components.training.groups import train_only
from neo_components.training.optimizers import build_optimizer
from neo_components.training.stage import StageConfig
from neo_components.types import IGNORED, NO_IMAGE, PADDING, Batch


class NEOTraining(lightning.LightningModule):
    """Trains one stage.

    Logs, per step: ``train/loss``, ``train/grad_norm``, ``train/lr``, ``perf/tokens_per_s``, ``perf/images_per_s``,
    ``perf/fill`` (share of the row that is no padding); per validation ``val/loss``, the mean over all learnt tokens.

    Args:
        model: what is trained, in place.
        stage: what of it, how long and how fast.
    """

    def __init__(self, model: NEO, stage: StageConfig) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        self.trainable = train_only(model, stage.train)
        self.val_loss = MeanMetric()
        self._step_began = 0.0

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Loss of one batch.

        Raises:
            ValueError: if it is not finite: whatever is trained after that is lost.
        """
        loss = self.model.loss(batch)
        if not torch.isfinite(loss):
            names = [key for row in batch.keys for key in row]
            raise ValueError(
                f"the loss is {float(loss)} at step {self.global_step}; lower stage.lr or look at the samples of this "
                f"step ({', '.join(names[:8])} ...); the last checkpoint is from before"
            )
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Adds a batch to the validation loss, weighted by its learnt tokens so that packing does not matter."""
        batch.loss_weights = (batch.labels != IGNORED).float()
        self.val_loss.update(self.model.loss(batch), weight=batch.loss_weights.sum())
        self.log("val/loss", self.val_loss, prog_bar=True, batch_size=1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the gradient norm before clipping."""
        norms = [p.grad.norm() for p in self.trainable if p.grad is not None]
        self.log("train/grad_norm", torch.stack(norms).norm())
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Starts the clock of one step."""
        self._step_began = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        """Logs speed; the time excludes waiting for data."""
        seconds = time.perf_counter() - self._step_began
        used = batch.document_ids != PADDING
        starts = (batch.image_ids != NO_IMAGE) & (batch.image_ids != batch.image_ids.roll(1, -1))
        self.log("perf/tokens_per_s", float(used.sum()) / seconds)
        self.log("perf/images_per_s", float(starts.sum()) / seconds)
        self.log("perf/fill", used.float().mean())

    def configure_optimizers(self) -> Any:
        """The stage's optimizer; linear warm-up, then a cosine down to the floor."""
        optimizer = build_optimizer(self.model, self.stage)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, self.stage))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def lr_factor(step: int, stage: StageConfig) -> float:
    """Learning rate at a step, as a fraction of the peak."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    progress = min(1.0, (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps))
    return stage.min_lr_ratio + (1 - stage.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

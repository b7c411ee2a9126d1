"""The only place with a ``training_step``: a NEO and a stage joined for Lightning's Trainer."""

from __future__ import annotations

import logging
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
from neo_components.training.shards import gradient_norms
from neo_components.training.stage import StageConfig
from neo_components.types import IGNORED, NO_IMAGE, PADDING, Batch

log = logging.getLogger(__name__)


class NEOTraining(lightning.LightningModule):
    """Trains one stage.

    Logs, per step: ``train/loss``, ``train/grad_norm``, ``train/lr``, ``train/skipped_steps``, ``perf/tokens_per_s``,
    ``perf/images_per_s``, ``perf/fill`` (share of the row that is no padding), and ``grad_norm/GROUP`` of each group
    that learns; that of ``post_llm.hw`` starts high, as the first gradient of the zero keys passes their norm. Per
    validation ``val/loss``, the mean over all learnt tokens.

    The loss of a step is the weighted mean over all learnt tokens of its batches, on all processes together: however a
    step's rows are divided into accumulated batches and processes, the gradient is the same.

    A step whose gradient is not finite changes nothing: no weight, no optimizer state. It is logged with the names of
    its samples; ``stage.max_skipped_steps`` of them in a row stop the run.

    Args:
        model: what is trained, in place.
        stage: what of it, how long and how fast.
    """

    def __init__(self, model: NEO, stage: StageConfig) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        for stack in (model.pre_buffer, model.post_llm):
            stack.recomputed = round(stage.recompute * len(stack.layers))
        self.choose_trained()
        self.val_loss = MeanMetric()
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._step_began = 0.0
        self._keys: list[str] = []
        self._totals: list[Tensor] = []

    def choose_trained(self) -> None:
        """Lets what the stage names learn and freezes the rest; again where a strategy has replaced the parameters."""
        self.trainable = train_only(self.model, self.stage.train)
        learning = {id(parameter) for parameter in self.trainable}
        self.groups = {
            name: parameters
            for name, parameters in self.model.groups().items()
            if any(id(parameter) in learning for parameter in parameters)
        }

    @property
    def divided(self) -> bool:
        """Whether a step's gradient is put together from several batches, accumulated or on several processes."""
        return self.trainer.accumulate_grad_batches > 1 or self.trainer.world_size > 1

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Loss of one batch; where a step has several, the sum over its tokens, still to be divided (see the class)."""
        loss = self.model.loss(batch)
        self._keys += [key for row in batch.keys for key in row]
        weight = loss_weight(batch) if self.divided else loss.new_ones(())
        self._totals.append(torch.stack([loss.detach() * weight, weight]).double())
        return loss * weight if self.divided else loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Adds a batch to the validation loss, weighted by its learnt tokens so that packing does not matter."""
        batch.loss_weights = (batch.labels != IGNORED).float()
        self.val_loss.update(self.model.loss(batch), weight=batch.loss_weights.sum())
        self.log("val/loss", self.val_loss, prog_bar=True, batch_size=1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Completes the step's gradient, drops it if it is not finite, and logs loss and norm before clipping."""
        loss = self._complete()
        norms = gradient_norms(self.trainable)
        norm = joined(list(norms.values()))
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/grad_norm", norm)
        for name, parameters in self.groups.items():
            self.log(f"grad_norm/{name}", joined([norms[id(p)] for p in parameters if id(p) in norms]))
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        if bool(torch.isfinite(norm)) and bool(torch.isfinite(loss)):
            self._skipped_in_a_row = 0
        else:
            self._skip(float(loss), float(norm))
        self.log("train/skipped_steps", float(self.skipped_steps))
        self._keys = []

    def _complete(self) -> Tensor:
        """Divides the gradient of the summed loss by the sum of the weights; returns the loss of the step."""
        totals = torch.stack(self._totals).sum(0)
        self._totals = []
        if not self.divided:
            return (totals[0] / totals[1]).float()
        totals = self.trainer.strategy.reduce(totals, reduce_op="sum")
        weight = totals[1].clamp(min=1e-5)
        # Lightning has divided by the batches of a step, and the strategies average over the processes.
        factor = float(self.trainer.accumulate_grad_batches * self.trainer.world_size / weight)
        for parameter in self.trainable:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return (totals[0] / weight).float()

    def _skip(self, loss: float, norm: float) -> None:
        """Drops the gradient: an optimizer leaves a parameter without one alone. All processes see the same norm.

        Raises:
            ValueError: if too many steps in a row were dropped.
        """
        for parameter in self.trainable:
            parameter.grad = None
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        names = ", ".join(self._keys[:8]) + (f" and {len(self._keys) - 8} more" if len(self._keys) > 8 else "")
        seen = f"loss {loss}, gradient norm {norm} at step {self.global_step}"
        log.warning("step skipped: %s; its samples: %s", seen, names)
        if self._skipped_in_a_row >= self.stage.max_skipped_steps:
            raise ValueError(
                f"{self._skipped_in_a_row} steps in a row were not finite (stage.max_skipped_steps), the last with "
                f"{seen}; lower stage.lr or look at its samples: {names}; no weight was changed by these steps"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the count of skipped steps."""
        checkpoint["faults"] = {"skipped_steps": self.skipped_steps, "in_a_row": self._skipped_in_a_row}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores it."""
        faults = checkpoint.get("faults", {})
        self.skipped_steps = faults.get("skipped_steps", 0)
        self._skipped_in_a_row = faults.get("in_a_row", 0)

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


def loss_weight(batch: Batch) -> Tensor:
    """The sum of weights that ``NEO.loss`` divides by."""
    weight = batch.loss_weights[:, 1:]
    return weight[batch.labels[:, 1:] != IGNORED].sum().clamp(min=1e-5)


def joined(norms: list[Tensor]) -> Tensor:
    """Norm of all the vectors that have these norms; 0 if there are none."""
    return torch.stack(norms).norm() if norms else torch.zeros(())


def lr_factor(step: int, stage: StageConfig) -> float:
    """Learning rate at a step, as a fraction of the peak."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    progress = min(1.0, (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps))
    return stage.min_lr_ratio + (1 - stage.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

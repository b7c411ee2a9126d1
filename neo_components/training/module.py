"""The training module: a NEO and a stage for Lightning's Trainer. No other module has a ``training_step``."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from neo_components.data.module import NEODataModule
from neo_components.model.layouts import own_config
from neo_components.model.neo import NEO
from neo_components.recipe.stage import StageConfig
from neo_components.storage.shards import local_of
from neo_components.training.activation_checkpointing import blocks_of
from neo_components.training.callbacks.loggers import log_once
from neo_components.training.callbacks.loss_parts import LossParts
from neo_components.training.context_parallel.model import ContextParallel, check_model
from neo_components.training.fp8 import use_fp8
from neo_components.training.fsdp2.norms import gradient_norms
from neo_components.training.kernels import use_kernels
from neo_components.training.lora import lora_parameters, set_trainable
from neo_components.training.optimizers import Joined, OneByOne, build_optimizer
from neo_components.training.skipped_steps import SkippedSteps
from neo_components.training.word_alignment import WordAlignment
from neo_components.types import IGNORED, Batch

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig


class NEOTraining(lightning.LightningModule):
    """Trains one stage.

    Logs with every entry the step's ``train/loss``, ``train/word_alignment`` if the stage has it, ``train/grad_norm``,
    ``train/skipped_steps``, ``lr/OPTIMIZER``, and ``grad_norm/GROUP`` of each trainable group; that of ``post_llm.hw``
    starts high, as the first gradient of the zero keys passes their norm. Logs over all steps since the last entry
    ``loss_by_source/SOURCE`` and ``loss_by_modality/text``, ``/image`` and ``/images``. Logs for each validation
    ``val/loss``, the mean over all target tokens, and on held-out text ``val/text_perplexity``, the exponential of
    that mean.
    ``performance.Performance`` logs speed and memory.

    The loss of a step is the weighted mean over all target tokens of its micro-batches, on all processes together. The
    gradient does not depend on how the step is split into micro-batches and processes.

    A step whose gradient is not finite changes neither weights nor optimizer state. With the next entry it is counted
    and logged with the keys of its samples; ``stage.max_skipped_steps`` consecutive ones stop the run.

    Between entries the CPU reads nothing from the device, so that it prepares the next steps while the device computes.

    Args:
        model: trained in place.
        stage: what trains, how long and how fast.

    Attributes:
        losses_by_part: the last entry's losses by source and by modality.
        step_loss: loss of the last step, a scalar on its device.

    Raises:
        ValueError: if ``stage.activation_checkpointing`` is ``auto``, a group or an adapter's target is unknown, or
            ``stage.context_parallel`` processes cannot compute the model together.
    """

    def __init__(self, model: NEO, stage: StageConfig) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        if stage.activation_checkpointing == "auto":
            raise ValueError(
                "stage.activation_checkpointing is auto: resolve it first, as neo train does "
                "(training.activation_checkpointing.resolve_auto), or give a number from 0 to 1"
            )
        check_model(model, stage.context_parallel)
        self.set_trainable()
        use_kernels(model, stage)
        use_fp8(model, stage)
        for stack in (model.pre_buffer, model.post_llm):
            stack.checkpointed_blocks = blocks_of(stage.activation_checkpointing, len(stack.layers))
            stack.checkpoint_keeps = stage.checkpoint_keeps
            if stage.compile:
                stack.compile_blocks()
        self.context: ContextParallel | None = None
        self.alignment = WordAlignment(model) if stage.word_alignment else None
        self.val_loss, self.text_loss = MeanMetric(), MeanMetric()
        self.loss_parts = LossParts([])
        self.losses_by_part: dict[str, float] = {}
        self.step_loss: Tensor | None = None
        self._skipped = SkippedSteps(stage.max_skipped_steps)
        self._keys: list[str] = []
        self._totals: list[Tensor] = []

    def set_trainable(self) -> None:
        """Makes the stage's groups and adapters trainable and freezes the rest. Called again after sharding."""
        self.trainable = set_trainable(self.model, self.stage)
        adapters = lora_parameters(self.model)
        trainable = {id(parameter) for parameter in self.trainable}
        self.groups = {
            name: parameters
            for name, parameters in (self.model.groups() | {"post_llm.lora": adapters}).items()
            if any(id(parameter) in trainable for parameter in parameters)
        }

    @property
    def several_batches(self) -> bool:
        """Whether a step has several micro-batches, accumulated or on several processes."""
        return self.trainer.accumulate_grad_batches > 1 or self.trainer.world_size > 1

    def setup(self, stage: str) -> None:
        """Lightning's hook: with ``stage.context_parallel``, the processes of a group read and compute the same
        batches."""
        if self.stage.context_parallel > 1 and self.context is None:
            self.context = ContextParallel.of_size(self.stage.context_parallel)
            self.context.apply(self.model)
        if self._data is not None:
            self._data.context_parallel = self.stage.context_parallel

    def on_fit_start(self) -> None:
        """Reads the names of the data's sources; for data without names, losses are logged by modality only."""
        self.loss_parts = LossParts(self._data.source_names if self._data else [])

    @property
    def _data(self) -> NEODataModule | None:
        """The data module; ``None`` if the Trainer was given data loaders or another data module."""
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, NEODataModule) else None

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The mean loss of a batch; if a step has several, the weighted sum, which :meth:`_complete` divides."""
        nll: list[Tensor] = []
        batch = batch.with_indices(batch.indices)  # found once for all that follows
        with self.alignment.watching() if self.alignment else nullcontext():
            loss = self.model.loss(batch, nll)
        self.loss_parts.add(batch, nll[0])
        self._keys += [key for row in batch.keys for key in row]
        weight = loss_weight(batch) if self.several_batches else loss.new_ones(())
        self._totals.append(torch.stack([loss.detach() * weight, weight]).double())
        loss = self._aligned(loss, batch)
        return loss * weight if self.several_batches else loss

    def _aligned(self, loss: Tensor, batch: Batch) -> Tensor:
        """The loss with the auxiliary one of ``stage.word_alignment``, which is logged for itself."""
        alignment = None if self.alignment is None else self.alignment.loss(batch)
        if alignment is None:
            return loss
        self.log("train/word_alignment", alignment.detach(), batch_size=1)
        return loss + self.stage.word_alignment * alignment

    def validation_step(self, batch: Batch, batch_index: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the validation loss, or to the loss of held-out text."""
        names = self._data.validation_names if self._data else []
        if names[dataloader_idx : dataloader_idx + 1] == ["text_validation"]:
            self.text_loss.update(*mean_nll(self.model, batch))
        else:
            self.val_loss.update(*mean_nll(self.model, batch))
            self.log("val/loss", self.val_loss, prog_bar=True, batch_size=1, add_dataloader_idx=False)

    def on_validation_epoch_end(self) -> None:
        """Logs the perplexity of held-out text, if there is held-out text."""
        if self.text_loss.update_called:
            self.log("val/text_perplexity", self.text_loss.compute().exp())
            self.text_loss.reset()

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were skipped. New steps are read from their device."""
        self._skipped.read()
        return self._skipped.total

    @property
    def _logs_step(self) -> bool:
        """Whether Lightning's loggers get an entry for the step that is being made."""
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Completes the gradient, drops it if it is not finite, and logs loss and norm before clipping."""
        loss = self.step_loss = self._complete()
        norms = gradient_norms(self.trainable)
        norm = joint_norm(list(norms.values())).to(loss.device)
        # All processes have the same norm.
        optimizer.found_inf = self._skipped.add(self.global_step, loss, norm, self._keys)  # type: ignore[attr-defined]
        self._keys = []
        self.log("train/loss", loss)  # not prog_bar=True, which makes Lightning read the value at every step
        self.log("train/grad_norm", norm)
        if self._logs_step:
            self._log_entry(optimizer, norms)

    def _log_entry(self, optimizer: torch.optim.Optimizer, norms: dict[int, Tensor]) -> None:
        for name, parameters in self.groups.items():
            self.log(f"grad_norm/{name}", joint_norm([norms[id(p)] for p in parameters if id(p) in norms]))
        for group in optimizer.param_groups:
            if group["params"]:
                self.log(f"lr/{group['name']}", group["lr"])
        self.losses_by_part = self.loss_parts.take(self.device, self._add_up)
        log_once(self.trainer, self.losses_by_part, self.global_step)
        if self.step_loss is not None:
            self.trainer.progress_bar_metrics["train/loss"] = float(self.step_loss)
        self.log("train/skipped_steps", float(self.skipped_steps))

    def on_train_start(self) -> None:
        """Moves offloaded states back to the CPU: Lightning restores a checkpoint's to the device."""
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, OneByOne | Joined):
                optimizer.bring_home()

    def on_train_end(self) -> None:
        """Counts the steps after the last entry."""
        self._skipped.read()

    def _complete(self) -> Tensor:
        """Divides the gradient of the summed loss by the sum of the weights; returns the loss of the step."""
        totals = torch.stack(self._totals).sum(0)
        self._totals = []
        if not self.several_batches:
            return (totals[0] / totals[1]).float()
        totals = self._add_up(totals)
        weight = totals[1].clamp(min=1e-5)
        # Lightning has divided by the number of batches, and the strategies average over the processes.
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / weight
        for parameter in self.trainable:
            if parameter.grad is not None:
                local_of(parameter.grad).mul_(factor)
        return (totals[0] / weight).float()

    def _add_up(self, tensor: Tensor) -> Tensor:
        """Sums over all processes."""
        return self.trainer.strategy.reduce(tensor, reduce_op="sum")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the model's arguments, the options of its parts among them, and the number of skipped steps."""
        checkpoint["model"] = json.dumps(own_config(self.model))
        checkpoint["faults"] = self._skipped.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the number of skipped steps."""
        self._skipped.load_state_dict(checkpoint.get("faults", {}))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The stage's optimizer, with linear warm-up and cosine decay."""
        optimizer = build_optimizer(self.model, self.stage)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, self.stage))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def mean_nll(model: NEO, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood of a batch's target tokens, with equal weights so that packing does not matter, and
    the number of these tokens."""
    weights = (batch.labels != IGNORED).float()
    return model.loss(batch.with_loss_weights(weights)), weights[:, 1:].sum()


def loss_weight(batch: Batch) -> Tensor:
    """The sum of loss weights, by which ``NEO.loss`` divides."""
    index = batch.indices.targets.exact
    return batch.loss_weights.flatten().index_select(0, index).sum().clamp(min=1e-5)


def joint_norm(norms: list[Tensor]) -> Tensor:
    """Norm of the concatenation of vectors with these norms; 0 without vectors."""
    return torch.stack(norms).norm() if norms else torch.zeros(())


def lr_factor(step: int, stage: StageConfig) -> float:
    """Learning rate at a step as a fraction of the peak."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    progress = min(1.0, (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps))
    return stage.min_lr_ratio + (1 - stage.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

"""Speed, use of the device, memory and skipped samples of a run, told with every entry of the log."""

from __future__ import annotations

import re
import resource
import sys
import time
from dataclasses import replace
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from neo_components.data.skip_counts import REASONS
from neo_components.estimate.flops import step_flops
from neo_components.model.neo import NEO
from neo_components.types import PADDING, Batch

PEAKS = {
    r"\bB200\b": 2250e12,
    r"\bGH200\b": 989e12,
    r"\bH200 NVL\b": 835e12,
    r"\bH200\b": 989e12,
    r"\bH100 NVL\b": 835e12,
    r"\bH100 PCIe\b": 756e12,
    r"\bH100\b.*\bHBM3\b": 989e12,
    r"\bA100\b": 312e12,
    r"\bA30\b": 165e12,
    r"\bA10\b": 125e12,
    r"\bL40S\b": 362e12,
    r"\bL40\b": 181e12,
    r"\bL4\b": 121e12,
    r"\bRTX 4090$": 165e12,
    r"\bRTX 3090$": 71e12,
}
"""Name of a GPU -> its peak in FLOPs per second for dense matrices of bfloat16 or float16 that are summed in float32.
Source: NVIDIA's data sheets, whose figures "with sparsity" are halved; for the RTX the Ada and GA102 white papers."""

REASONS_IN_ORDER = sorted(REASONS)


def peak_flops(name: str, precision: str) -> float | None:
    """FLOPs per second of which a device is capable, or ``None`` where that is not known.

    Args:
        name: of the device, as torch tells it.
        precision: Lightning's; anything but half precision has no known peak.
    """
    if not precision.startswith(("bf16", "16")):
        return None
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, name)), None)


def process_gb() -> float:
    """Most memory that this process has had, in GB (1e9 bytes); its data workers not counted."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


class Performance(Callback):
    """Logs, over all steps since the last entry and over all processes:

    ``perf/tokens_per_s`` (no padding counted), ``perf/images_per_s``, ``perf/packing_efficiency`` (share of the rows
    that is no padding), ``perf/data_wait`` (share of the time in which the step waited for data), ``perf/tflops`` (of
    the model's own FLOPs, 1e12 per second and device; see ``estimate.flops``), ``perf/mfu`` (those over the device's
    peak, where that is known), ``memory/process_gb`` and ``memory/device_gb`` (the most so far, of the fullest process
    or device), ``data/skipped`` and ``data/skipped_REASON`` (samples so far).

    Time is that of the steps and of waiting for data; validation and checkpoints are left out.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.images = 0
        self._new = self._nothing()
        self._began = self._ended = 0.0
        self._steps = 0

    @staticmethod
    def _nothing() -> dict[str, float]:
        return dict.fromkeys(("tokens", "images", "places", "flops", "seconds", "waited"), 0.0)

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Starts where the run starts or resumes."""
        self._steps, self._ended = trainer.global_step, 0.0

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Keeps the time of a validation out."""
        self._ended = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Starts the clock of a batch; what passed since the one before was waiting for it."""
        self._began = time.perf_counter()
        if self._ended:
            self._new["waited"] += self._began - self._ended

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Counts a batch, and logs with every entry."""
        self._new["seconds"] += time.perf_counter() - self._began
        self._new["tokens"] += int((batch.document_ids != PADDING).sum())
        self._new["images"] += sum(map(sum, batch.image_counts))
        self._new["places"] += batch.document_ids.numel()
        assert isinstance(module.model, NEO)
        # Counted document by document: on a GPU every number would be waited for.
        ids = {name: getattr(batch, name).cpu() for name in ("token_ids", "labels", "document_ids", "image_ids")}
        self._new["flops"] += sum(part.model for part in step_flops(module.model, replace(batch, **ids)).values())
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            if self._steps % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                self._log(trainer, module)
        self._ended = time.perf_counter()

    def _log(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        new = self._collect(trainer)
        # Each process brought its own seconds, so that sums over them are per device.
        seconds = new["seconds"] + new["waited"]
        rate = new["flops"] / seconds
        module.log("perf/tokens_per_s", new["tokens"] * trainer.world_size / seconds)
        module.log("perf/images_per_s", new["images"] * trainer.world_size / seconds)
        module.log("perf/packing_efficiency", new["tokens"] / new["places"])
        module.log("perf/data_wait", new["waited"] / seconds)
        module.log("perf/tflops", rate / 1e12)
        device = torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else ""
        if peak := peak_flops(device, str(trainer.precision)):
            module.log("perf/mfu", rate / peak)
        for name, value in {**self._memory(trainer, module), **self._skipped(trainer, module)}.items():
            module.log(name, value)

    def _collect(self, trainer: lightning.Trainer) -> dict[str, float]:
        """What is new since the last call, added to the totals."""
        new = self._added(trainer)
        self._new = self._nothing()
        self.tokens += int(new["tokens"])
        self.images += int(new["images"])
        return new

    def _added(self, trainer: lightning.Trainer) -> dict[str, float]:
        """What is new, added over all processes."""
        values = torch.tensor(list(self._new.values()), dtype=torch.float64, device=trainer.strategy.root_device)
        added = trainer.strategy.reduce(values, reduce_op="sum").tolist()
        return dict(zip(self._new, added, strict=True))

    def _memory(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> dict[str, float]:
        most = [process_gb()]
        if module.device.type == "cuda":
            most.append(torch.cuda.max_memory_allocated(module.device) / 1e9)
        values = torch.tensor(most, dtype=torch.float64, device=module.device)
        reduced = trainer.strategy.reduce(values, reduce_op="max").tolist()
        return dict(zip(("memory/process_gb", "memory/device_gb"), reduced, strict=False))

    def _skipped(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> dict[str, float]:
        """Samples that could not be used, by reason; empty where the data does not tell."""
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "describe"):
            return {}
        skipped = data.describe()["train"]["skipped"]
        counts = torch.tensor([float(skipped.get(reason, 0)) for reason in REASONS_IN_ORDER], device=module.device)
        total = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        found = {f"data/skipped_{name}": count for name, count in zip(REASONS_IN_ORDER, total, strict=True) if count}
        return {"data/skipped": sum(total)} | found

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the totals, and keeps the time of writing out of the next entry. All processes come here together."""
        self._ended = 0.0
        new = self._added(trainer)
        total = {"tokens": self.tokens + new["tokens"], "images": self.images + new["images"]}
        checkpoint["performance"] = {name: int(value) for name, value in total.items()}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Goes on counting from the totals of the run before."""
        totals = checkpoint.get("performance", {})
        self.tokens, self.images = totals.get("tokens", 0), totals.get("images", 0)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Counts what came after the last entry."""
        self._collect(trainer)

"""Throughput, utilization, memory and skipped samples of a run, logged with every entry.

Lightning's ``Throughput`` does not fit: it multiplies the rate of rank 0 by the number of processes, though each
process has another number of tokens, needs a window of a fixed number of batches, and refuses batches without samples
(images). Its table of peaks lacks the B200 and the H200, has the L4's for an L40S, and twice the H100 NVL's.
"""

from __future__ import annotations

import logging
import re
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from neo_components.data.module import NEODataModule
from neo_components.data.skip_counts import REASONS
from neo_components.errors import UnknownFlopsError
from neo_components.estimate.flops import step_flops
from neo_components.model.neo import NEO
from neo_components.training.module import NEOTraining
from neo_components.types import PADDING, Batch

log = logging.getLogger(__name__)

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
"""Pattern of a GPU's name -> its peak FLOP/s for dense bfloat16 or float16 matrices with float32 accumulation. Source:
NVIDIA's data sheets, with numbers "with sparsity" halved; for RTX cards the Ada and GA102 white papers."""

REASONS_IN_ORDER = sorted(REASONS)


def peak_flops(name: str, precision: str) -> float | None:
    """Peak FLOP/s of a device, or ``None`` if unknown.

    Args:
        name: of the device, from ``torch.cuda.get_device_name``.
        precision: Lightning's name; peaks are known for 16-bit precision only.
    """
    if not precision.startswith(("bf16", "16")):
        return None
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, name)), None)


TIMES = ("seconds", "waited")


def _readers(trainer: lightning.Trainer) -> int:
    """How many processes read each batch, so that sums over processes count it as often."""
    module = trainer.lightning_module
    assert isinstance(module, NEOTraining)
    return module.stage.context_parallel


def process_gb() -> float:
    """Peak memory of this process in GB (1e9 bytes), without its data workers."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


class Performance(Callback):
    """Logs throughput, utilization, memory and skipped samples.

    Over all steps since the last entry and over all processes: ``perf/tokens_per_s`` (without padding),
    ``perf/images_per_s``, ``perf/packing_efficiency`` (fraction of positions that are no padding), ``perf/data_wait``
    (fraction of time waiting for data), ``perf/tflops`` (model FLOPs, 1e12 per second and device, see
    ``estimate.flops``) and ``perf/mfu`` (the same relative to the device's peak, if that is known). Since the start:
    ``memory/process_gb`` and ``memory/device_gb`` (peaks, of the process or device with the most), ``data/skipped`` and
    ``data/skipped_REASON`` (numbers of samples).

    ``perf/tflops`` and ``perf/mfu`` are left out, with one warning, where a part's FLOPs are not known.

    The time includes steps and waiting for data, but not validation and checkpoints.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.images = 0
        self._new = self._nothing()
        self._began = self._ended = 0.0
        self._steps = 0
        self._counts_flops = True

    @staticmethod
    def _nothing() -> dict[str, float]:
        return dict.fromkeys(("tokens", "images", "positions", "flops", "seconds", "waited"), 0.0)

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Starts at the step that the run starts or resumes from."""
        self._steps, self._ended = trainer.global_step, 0.0

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Excludes the time of a validation."""
        self._ended = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Starts the clock of a batch. The time since the last batch was spent waiting for data."""
        self._began = time.perf_counter()
        if self._ended:
            self._new["waited"] += self._began - self._ended

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Adds a batch, and logs with every entry."""
        self._new["seconds"] += time.perf_counter() - self._began
        self._new["tokens"] += int((batch.indices.ids["document_ids"] != PADDING).sum())
        self._new["images"] += sum(map(sum, batch.image_counts))
        self._new["positions"] += batch.document_ids.numel()
        assert isinstance(module.model, NEO)
        if self._counts_flops:
            self._add_flops(module.model, batch)
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            if self._steps % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                self._log(trainer, module)
        self._ended = time.perf_counter()

    def _add_flops(self, model: NEO, batch: Batch) -> None:
        # On the CPU, as the count reads one number per document.
        ids: Mapping[str, Any] = batch.indices.ids
        on_cpu = replace(batch, **ids)
        try:
            self._new["flops"] += sum(part.model for part in step_flops(model, on_cpu).values())
        except UnknownFlopsError as error:
            self._counts_flops = False
            log.warning("perf/tflops and perf/mfu are not logged: %s", error)

    def _log(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        new = self._collect(trainer)
        # Seconds are summed over processes too, so ratios of sums are rates per device.
        seconds = new["seconds"] + new["waited"]
        rate = new["flops"] / seconds
        module.log("perf/tokens_per_s", new["tokens"] * trainer.world_size / seconds)
        module.log("perf/images_per_s", new["images"] * trainer.world_size / seconds)
        module.log("perf/packing_efficiency", new["tokens"] / new["positions"])
        module.log("perf/data_wait", new["waited"] / seconds)
        if self._counts_flops:
            module.log("perf/tflops", rate / 1e12)
            device = torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else ""
            if peak := peak_flops(device, str(trainer.precision)):
                module.log("perf/mfu", rate / peak)
        for name, value in {**self._memory(trainer, module), **self._skipped(trainer, module)}.items():
            module.log(name, value)

    def _collect(self, trainer: lightning.Trainer) -> dict[str, float]:
        """The sums since the last call, which are added to the totals."""
        new = self._added(trainer)
        self._new = self._nothing()
        self.tokens += int(new["tokens"])
        self.images += int(new["images"])
        return new

    def _added(self, trainer: lightning.Trainer) -> dict[str, float]:
        """The sums since the last entry, over all processes."""
        values = torch.tensor(list(self._new.values()), dtype=torch.float64, device=trainer.strategy.root_device)
        added = dict(zip(self._new, trainer.strategy.reduce(values, reduce_op="sum").tolist(), strict=True))
        every = _readers(trainer)
        return {name: sum_ / (1 if name in TIMES else every) for name, sum_ in added.items()}

    def _memory(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> dict[str, float]:
        most = [process_gb()]
        if module.device.type == "cuda":
            most.append(torch.cuda.max_memory_allocated(module.device) / 1e9)
        values = torch.tensor(most, dtype=torch.float64, device=module.device)
        reduced = trainer.strategy.reduce(values, reduce_op="max").tolist()
        return dict(zip(("memory/process_gb", "memory/device_gb"), reduced, strict=False))

    def _skipped(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> dict[str, float]:
        """Skipped samples by reason; empty if the data module does not count them."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, NEODataModule):
            return {}
        skipped = data.describe()["train"]["skipped"]
        counts = torch.tensor([float(skipped.get(reason, 0)) for reason in REASONS_IN_ORDER], device=module.device)
        total = (trainer.strategy.reduce(counts, reduce_op="sum") / _readers(trainer)).tolist()
        found = {f"data/skipped_{name}": count for name, count in zip(REASONS_IN_ORDER, total, strict=True) if count}
        return {"data/skipped": sum(total)} | found

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the totals, and excludes the time of saving. All processes come here together."""
        self._ended = 0.0
        new = self._added(trainer)
        total = {"tokens": self.tokens + new["tokens"], "images": self.images + new["images"]}
        checkpoint["performance"] = {name: int(value) for name, value in total.items()}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restores the totals of the resumed run."""
        totals = checkpoint.get("performance", {})
        self.tokens, self.images = totals.get("tokens", 0), totals.get("images", 0)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Adds the steps after the last entry to the totals."""
        self._collect(trainer)

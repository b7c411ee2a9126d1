"""Signals that end a run: all processes save a checkpoint together after the step, and the run can resume from it.

Schedulers send SIGTERM before they reclaim a machine. A SLURM job can also request a signal before its time limit
(``#SBATCH --signal=USR1@120``); the run then saves and requeues the job.

Lightning's own handlers save or communicate inside the handler, in the middle of a computation. With several processes
that can deadlock, so they are replaced by a handler that only stores the signal.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from neo_components.training.checkpoints import LAST

log = logging.getLogger(__name__)

REQUEUE = signal.SIGUSR1
"""Under SLURM: save and requeue the job."""


def slurm_environment() -> SLURMEnvironment | None:
    """Lightning's SLURM environment without its requeueing; ``None`` if SLURM did not start this process."""
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return None
    return SLURMEnvironment(auto_requeue=False)


class SaveOnSignal(Callback):
    """Saves ``last.ckpt`` after the step in which any process received a signal, and ends the run.

    The run ends with exit code 143. An accumulated step is completed first. Further signals have no effect: schedulers
    send one to every process of a job, and torchrun forwards its own.

    Args:
        folder: of the run's checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.received = 0
        self._group: Any = None
        self._before: dict[int, Any] = {}

    def setup(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        """Remembers the handlers: Lightning registers its own behind this hook, and removes them ahead of
        ``on_fit_end``, so that restoring those would leave a process that no signal ends."""
        if threading.current_thread() is threading.main_thread():
            signals = [signal.SIGTERM, *([REQUEUE] if slurm_environment() else [])]
            self._before = {number: signal.getsignal(number) for number in signals}

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Replaces Lightning's handlers; Python allows it in the main thread only."""
        if trainer.world_size > 1 and trainer.strategy.root_device.type != "cpu":
            # Between CPUs, so that no process waits for its device in every step.
            self._group = torch.distributed.new_group(backend="gloo")
        for number in self._before:
            signal.signal(number, self._store)

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Restores the handlers."""
        self._restore()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Restores the handlers."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _store(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves and ends the run if any process has received a signal. All processes come here together."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        received = self.received
        if trainer.world_size > 1:
            highest = torch.tensor(received)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, self._group)
            received = int(highest)
        if not received:
            return
        trainer.save_checkpoint(self.folder / LAST)
        if trainer.is_global_zero:
            name, path = signal.Signals(received).name, self.folder / LAST
            log.warning("%s: saved %s at step %d; resume with --resume last", name, path, trainer.global_step)
            if received == REQUEUE:
                requeue(os.environ)
        trainer.strategy.barrier()
        raise SIGTERMException


def requeue(environment: Mapping[str, str]) -> bool:
    """Requeues this SLURM job; returns whether that worked."""
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], check=False, capture_output=True, text=True)
    except FileNotFoundError:
        log.warning("job %s could not be requeued: scontrol was not found; submit it again with --resume auto", job)
        return False
    if done.returncode:
        log.warning("job %s could not be requeued: %s", job, done.stderr.strip() or done.stdout.strip())
    return done.returncode == 0

"""Signals that end a run: every process saves together, after a whole step, and the run can go on from there.

SIGTERM is what schedulers send before they take a machine away. Under SLURM a job may also ask for a signal ahead of
its time limit (``#SBATCH --signal=USR1@120``): then the run saves, and puts the job back into the queue.

Lightning's own handlers save or exchange messages inside the handler, in the middle of whatever a process computes.
With several processes that can wait for each other for ever; so they are replaced by one that only takes a note.
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
"""Under SLURM: save, and put the job back into the queue."""


def slurm_environment() -> SLURMEnvironment | None:
    """Lightning's reading of a SLURM job, without its own requeueing; ``None`` if SLURM did not start this process."""
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return None
    return SLURMEnvironment(auto_requeue=False)


class SaveOnSignal(Callback):
    """Saves ``last.ckpt`` after the step in which a signal came to any of the processes, and ends the run.

    The run ends with exit code 143. In the middle of an accumulated step it goes on to the step's end first. More
    signals change nothing: schedulers send one to every process of a job, and torchrun passes its own on to the others.

    Args:
        folder: of the run's checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.came = 0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Takes over from Lightning's handlers; a signal can be taken in the main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            return
        signals = [signal.SIGTERM, *([REQUEUE] if slurm_environment() else [])]
        self._before = {number: signal.signal(number, self._note) for number in signals}

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Gives the handlers back."""
        self._give_back()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Gives the handlers back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = self.came or number

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks, in all processes at once, whether a signal has come to any; saves and ends the run then."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        came = self.came
        if trainer.world_size > 1:
            seen = torch.tensor(came, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
            came = int(seen)
        if not came:
            return
        trainer.save_checkpoint(self.folder / LAST)
        if trainer.is_global_zero:
            name, path = signal.Signals(came).name, self.folder / LAST
            log.warning("%s: saved %s at step %d; go on with --resume last", name, path, trainer.global_step)
            if came == REQUEUE:
                requeue(os.environ)
        trainer.strategy.barrier()
        raise SIGTERMException


def requeue(environment: Mapping[str, str]) -> bool:
    """Puts this SLURM job back into the queue; tells whether that worked."""
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], check=False, capture_output=True, text=True)
    except FileNotFoundError:
        log.warning("job %s could not be requeued: scontrol is not there; submit it again, it goes on by itself", job)
        return False
    if done.returncode:
        log.warning("job %s could not be requeued: %s", job, done.stderr.strip() or done.stdout.strip())
    return done.returncode == 0

"""However a run's processes are started, it is the same run; signals save it, and what starts it again goes on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import installed_neo
from test_sharding import TESTS, stored

from neo_components.training.callbacks.signals import requeue, slurm_environment
from neo_components.training.checkpoints import read_checkpoint

NEO = Path(sys.executable).with_name("neo")
ENDLESS = ["stage.steps=5000", "stage.checkpoint_every=2", "stage.min_lr_ratio=1"]


def recipe(world: Path, output: Path, *more: str) -> list[str]:
    return [str(world / "run.yaml"), f"output={output}", "trainer.devices=2", "trainer.strategy=fsdp2", *more]


def environment(**own: str) -> dict[str, str]:
    paths = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | own


def last(output: Path) -> int:
    return int(read_checkpoint(output / "checkpoints" / "last.ckpt")["global_step"])


def wait_for(output: Path, *processes: subprocess.Popen[str]) -> None:
    """Until the run has saved once."""
    end = time.monotonic() + 600
    while not any((output / "checkpoints").glob("step-*.ckpt")):
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Job:
    """Two tasks of a SLURM job, as srun starts them, and a ``scontrol`` that writes down what it is asked."""

    def __init__(self, folder: Path, number: str) -> None:
        self.folder, self.number = folder, number
        (folder / "bin").mkdir(exist_ok=True)
        control = folder / "bin" / "scontrol"
        control.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
        control.chmod(0o755)

    def start(self, *arguments: str) -> list[subprocess.Popen[str]]:
        port = str(free_port())
        job = {
            "SLURM_JOB_ID": self.number, "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": port,
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        return [
            subprocess.Popen(
                [NEO, "train", *arguments], cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=environment(**job, SLURM_PROCID=str(task), SLURM_LOCALID=str(task)),
            )
            for task in range(2)
        ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_slurm_job_saves_when_it_is_warned_and_goes_on(world: Path, tmp_path: Path) -> None:
    """The signal comes to one task; both end, the job is requeued once, and the same command goes on."""
    job, output = Job(tmp_path, "1234567"), tmp_path / "run"
    arguments = recipe(world, output, *ENDLESS, "--resume", "auto")
    tasks = job.start(*arguments)
    wait_for(output, *tasks)
    tasks[1].send_signal(signal.SIGUSR1)
    told = [task.communicate(timeout=600) for task in tasks]
    assert [task.returncode for task in tasks] == [143, 143], told
    assert "SIGUSR1: saved" in told[0][1] + told[1][1]
    assert (tmp_path / "asked").read_text() == "requeue 1234567\n"
    done = last(output)
    steps = done + 2 + done % 2  # a checkpoint is written at every second
    tasks = job.start(*arguments, f"stage.steps={steps}")
    told = [task.communicate(timeout=600) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], told
    assert last(output) == steps
    # As two processes that were never stopped, started by the command itself.
    whole = installed_neo(
        "train", *recipe(world, tmp_path / "whole", *ENDLESS, f"stage.steps={steps}"), folder=tmp_path
    )
    assert whole.status == 0, whole.err
    one, other = (stored(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("run", "whole"))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_torchrun_passes_sigterm_on(world: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", NEO, "train"]
    process = subprocess.Popen(
        [*command, *recipe(world, tmp_path / "run", *ENDLESS)], env=environment(), text=True, stderr=subprocess.PIPE
    )
    wait_for(tmp_path / "run", process)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=600)
    assert process.returncode != 0 and "SIGTERM: saved" in told
    assert last(tmp_path / "run") >= 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_torchrun_starts_again_what_was_killed(world: Path, tmp_path: Path) -> None:
    """The line of the page: no argument changes between the first start and the second."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    arguments = recipe(world, tmp_path / "run", *ENDLESS, "stage.steps=40", "--resume", "auto")
    process = subprocess.Popen(
        [*command, NEO, "train", *arguments], env=environment(), text=True, stderr=subprocess.PIPE
    )
    wait_for(tmp_path / "run", process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 0, told[-4000:]
    assert last(tmp_path / "run") == 40


def test_where_slurm_did_not_start_the_process_there_is_no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    assert slurm_environment() is None
    for name, value in {"NTASKS": "2", "NTASKS_PER_NODE": "2", "JOB_NAME": "train"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = slurm_environment()
    assert found is not None and not found.auto_requeue
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert slurm_environment() is None


def test_requeueing_names_the_task_of_an_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    array = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not requeue(array) and "scontrol was not found; submit it again" in caplog.text
    control = tmp_path / "scontrol"
    control.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nexit $FAILS\n')
    control.chmod(0o755)
    monkeypatch.setenv("FAILS", "0")
    assert requeue(array) and (tmp_path / "asked").read_text() == "requeue 9_3\n"
    monkeypatch.setenv("FAILS", "1")
    assert not requeue(array)

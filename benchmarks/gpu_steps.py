"""The steps of the three parts as commands, and running one under a time limit."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
SHAPE = [
    "--hidden=2048", "--heads=16", "--pre=12", "--post=28", "--vocabulary=151936", "--tied", "--lengths=8192",
    "--documents=16",
]  # fmt: skip
"""NEO-2.2B at 8192 packed tokens, as options of train_step.py."""
BANDWIDTHS = {"B200": 8000, "H200": 4800, "H100 NVL": 3938, "H100 PCIe": 2039, "H100": 3350, "A100": 2039}
"""Part of a GPU's name -> GB/s of its memory, the first that fits. Source: NVIDIA's data sheets."""
PRETRAINED_MINUTES = 7.0
"""Minutes for which the training of the pretrained pre-Buffer is planned."""
GRACE = 15.0
"""Seconds from the request to end until a step is killed; a training run saves a checkpoint in them."""


@dataclass(frozen=True)
class Step:
    """One command of a part.

    Args:
        part: number of the part.
        name: of its result and its log.
        command: what is run.
        needs: file or folder without which the step is left out, and the reason is printed.
        folder: what an earlier attempt left, removed before the next one; ``None``: the step goes on by itself.
        extra: further variables of the environment.
    """

    part: int
    name: str
    command: list[str]
    needs: Path | None = None
    folder: Path | None = None
    extra: dict[str, str] = field(default_factory=dict)

    def clear(self) -> None:
        """Removes what an earlier attempt left."""
        if self.folder is not None and self.folder.exists():
            shutil.rmtree(self.folder)


def all_steps(output: Path, device: str, tiny: bool, machine: dict[str, Any]) -> list[Step]:
    """The steps of all parts, in order; ``machine`` is the description that every result carries."""
    python = [sys.executable, "-u"]
    short = ["--tiny"] if tiny else []
    tests = ["-m", "pytest", "-p", "gpu_tests", "-p", "no:cacheprovider", "-m", "gpu", "--gpu-device", device, "-v"]
    tests += [
        "--tb=short",
        "-o",
        "timeout=120",
        "--results",
        str(output / "tests.jsonl"),
        "--commit",
        machine["commit"],
    ]
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_gpu_*.py"))]
    files.remove("tests/test_gpu_script.py")  # of this script itself, on a CPU
    # Beside the processes that compile there is one that computes.
    plugin = {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])}
    steps = [Step(1, "tests", [*python, *tests, *files], extra=plugin)]
    for stage in (1, 3):
        folder = output / f"train_step_stage_{stage}"
        measured = [*SHAPE, "--stages", str(stage), "--precision", "bf16", "--compile", "--repeat", "8"]
        command = [str(BENCHMARKS / "train_step.py"), "--device", device, *measured, "--memory", "0", *short]
        steps.append(Step(2, folder.name, [*python, *command, "--output", str(folder)], folder=folder))
    for name, script, options in (
        ("decode", "decode.py", ["--dtype", "float32" if tiny else "bfloat16", *_bandwidth(machine["device"])]),
        ("data_wait", "gpu_data.py", []),
    ):
        command = [str(BENCHMARKS / script), "--device", device, *options, *short, "--output", str(output / name)]
        steps.append(Step(2, name, [*python, *command], needs=BENCHMARKS / script, folder=output / name))
    return [*steps, *_training(python, output, device, tiny)]


def _bandwidth(name: str) -> list[str]:
    """decode.py's option of the memory's bandwidth, if it is known; it measures that of a CPU itself."""
    return next((["--bandwidth", str(known)] for part, known in BANDWIDTHS.items() if part in name), [])


def _training(python: list[str], output: Path, device: str, tiny: bool) -> list[Step]:
    """The quickstart, and the training of a pretrained pre-Buffer, where ``neo pretrained make --prepare`` has been."""
    neo = [*python, "-c", "from neo_components.cli.main import main; main()"]  # nothing installs the command there
    folder = output / "quickstart"
    quickstart = [*neo, "quickstart", "--device", device, "-o", str(folder), *(["--scale", "0.02"] if tiny else [])]
    run = output / "pretrained"
    make = [*neo, "pretrained", "make", str(run), "--packages", str(run / "packages"), "--device", device]
    make += ["--minutes", "0.01" if tiny else str(PRETRAINED_MINUTES)]
    prepared = run / "small_llm" / "config.json"
    return [Step(3, "quickstart", quickstart, folder=folder), Step(3, "pretrained", make, needs=prepared)]


@dataclass
class Ended:
    """How a step ended: ``passed``, ``failed`` or ``cut off``, after how many seconds, with which exit status."""

    status: str
    seconds: float
    returncode: int


def execute(step: Step, limit: float, log: Path, say: Callable[[str], Any] = print) -> Ended:
    """Runs a step for at most ``limit`` seconds; what it prints goes to ``say`` and, line by line, to ``log``.

    It is asked to end :data:`GRACE` seconds before the limit (SIGTERM) and killed at the limit, with all its children.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=os.environ | step.extra, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        reader = threading.Thread(target=_copy, args=(process.stdout, file, say), daemon=True)
        reader.start()
        cut = _wait(process, max(limit - GRACE, limit / 2), limit - (time.monotonic() - began))
        _kill(process)  # children that outlive it
        process.wait()
        reader.join(5)
    seconds = time.monotonic() - began
    status = "cut off" if cut else "passed" if process.returncode == 0 else "failed"
    return Ended(status, seconds, process.returncode)


def _copy(source: IO[str], file: IO[str], say: Callable[[str], Any]) -> None:
    for line in source:
        say(line.rstrip("\n"))
        file.write(line)
        file.flush()


def _wait(process: subprocess.Popen[str], ask: float, limit: float) -> bool:
    """Whether the process had to be asked to end."""
    try:
        process.wait(ask)
        return False
    except subprocess.TimeoutExpired:
        process.terminate()  # the main process alone: data workers that end first would be a fault of its run
    try:
        process.wait(max(0.0, limit - ask))
    except subprocess.TimeoutExpired:
        process.kill()
    return True


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)

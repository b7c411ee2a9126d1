"""A run that is killed at any moment goes on as if nothing had happened: the same samples and losses, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from killed_run import EVERY, RANKS, STEPS
from llm_builders import text_llm
from shard_builders import mixed_samples, write


def start(world: Path, folder: Path, delay: float = 0.0) -> subprocess.Popen[bytes]:
    """The run with its ranks and workers in a group of their own, to be killed together."""
    folder.mkdir(parents=True, exist_ok=True)
    script = str(Path(__file__).with_name("killed_run.py"))
    command = [sys.executable, "-W", "ignore", script, str(world), str(folder), str(delay)]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)


def recorded(folder: Path) -> list[list[dict[str, Any]]]:
    """What each rank did, in order; a line that was cut by the kill is left out."""
    return [
        [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        for file in (folder / f"rank{rank}.jsonl" for rank in range(RANKS))
        if file.is_file()
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("killed")
    text_llm(base / "llm")
    write(base / "pictures", mixed_samples(150, "p"), max_per_shard=40)
    write(base / "text", mixed_samples(50, "t", images=False), max_per_shard=40)
    return base


@pytest.fixture(scope="module")
def whole(world: Path) -> list[list[dict[str, Any]]]:
    """The run that nobody disturbed."""
    process = start(world, world / "whole")
    assert process.wait(240) == 0, (world / "whole" / "log.txt").read_text()
    ranks = recorded(world / "whole")
    assert [len(rank) for rank in ranks] == [STEPS] * RANKS
    assert ranks[0] != ranks[1]
    return ranks


def kill_after(process: subprocess.Popen[bytes], folder: Path, steps: int, wait: float) -> None:
    """Kills the whole group with SIGKILL, some time after the first rank noted so many steps."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        ranks = recorded(folder)
        if ranks and len(ranks[0]) >= steps:
            break
        time.sleep(0.002)
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL


def check(world: Path, whole: list[list[dict[str, Any]]], kills: int, seed: int) -> None:
    """Kills and resumes so many times, then compares everything that was ever trained on with the undisturbed run."""
    chance = random.Random(seed)
    folder = world / f"killed-{seed}"
    folder.mkdir()
    done = 0
    for left in range(kills, 0, -1):
        process = start(world, folder, delay=0.05)
        done += chance.randint(0, max(1, (STEPS - EVERY - done) // left))
        kill_after(process, folder, done, chance.uniform(0, 0.3))
        before = recorded(folder)
        done = len(before[0]) if before else 0
    process = start(world, folder)
    assert process.wait(240) == 0, (folder / "log.txt").read_text()
    for rank, undisturbed in zip(recorded(folder), whole, strict=True):
        by_step = {line["step"]: line for line in undisturbed}
        assert {line["step"] for line in rank} == set(by_step)  # nothing was left out
        assert len(rank) >= STEPS
        for line in rank:  # also what was done again behind a checkpoint
            assert line == by_step[line["step"]]


@pytest.mark.parametrize("seed", [1])
def test_killed_runs_go_on_exactly(world: Path, whole: list[list[dict[str, Any]]], seed: int) -> None:
    check(world, whole, kills=2, seed=seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10, 20))
def test_killed_at_twenty_random_moments(world: Path, whole: list[list[dict[str, Any]]], seed: int) -> None:
    check(world, whole, kills=2, seed=seed)

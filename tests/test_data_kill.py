"""A run that is killed at any moment continues as if nothing had happened: the same samples and losses, bit for bit."""

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

from neo_components.training.checkpoints import newest_checkpoint, read_checkpoint


def start(world: Path, folder: Path, **options: Any) -> subprocess.Popen[bytes]:
    """The run with its ranks and workers in a group of their own, to be killed together."""
    folder.mkdir(parents=True, exist_ok=True)
    script = str(Path(__file__).with_name("killed_run.py"))
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-W", "ignore", script, str(world), str(folder), *arguments]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    assert process.wait(280) == 0, (folder / "log.txt").read_text()


def recorded(folder: Path) -> list[list[dict[str, Any]]]:
    """What each rank did, in order; a line that was cut by the kill is left out."""
    return [
        [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        for file in (folder / f"rank{rank}.jsonl" for rank in range(RANKS))
        if file.is_file()
    ]


def ends(folder: Path) -> list[dict[str, Any]]:
    """Checksums of weights, optimizer, schedule and position in the data of each rank."""
    return [json.loads((folder / f"end{rank}.json").read_text()) for rank in range(RANKS)]


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
    finish(start(world, world / "whole"), world / "whole")
    ranks = recorded(world / "whole")
    assert [len(rank) for rank in ranks] == [STEPS] * RANKS
    assert ranks[0] != ranks[1]
    return ranks


def stop_after(process: subprocess.Popen[bytes], folder: Path, steps: int, wait: float, number: int) -> None:
    """Sends a signal to the whole group, some time after the first rank noted so many steps."""
    end = time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None:
        ranks = recorded(folder)
        if ranks and len(ranks[0]) >= steps:
            break
        time.sleep(0.002)
    time.sleep(wait)
    os.killpg(process.pid, number)
    # SIGTERM ends a run that has not begun to train at once, and any other one when all is saved.
    assert process.wait(120) in {signal.SIGKILL: (-signal.SIGKILL,), signal.SIGTERM: (143, -signal.SIGTERM)}[number]


def check(world: Path, whole: list[list[dict[str, Any]]], stops: int, seed: int, number: int) -> None:
    """Stops and resumes so many times, then compares everything that was ever trained on with the undisturbed run."""
    chance = random.Random(seed)
    folder = world / f"stopped-{seed}"
    folder.mkdir()
    # Only where every rank is a separate process from the beginning can each of them be asked to end.
    strategy = "ddp" if number == signal.SIGTERM else "ddp_fork"
    done = 0
    for left in range(stops, 0, -1):
        process = start(world, folder, delay=0.05, strategy=strategy)
        done += chance.randint(0, max(1, (STEPS - EVERY - done) // left))
        stop_after(process, folder, done, chance.uniform(0, 0.3), number)
        before = recorded(folder)
        done = len(before[0]) if before else 0
        if number == signal.SIGTERM and done:
            assert len({len(rank) for rank in before}) == 1  # all ranks ended after the same step
            newest = newest_checkpoint(folder / "checkpoints")
            assert read_checkpoint(newest)["global_step"] == before[0][-1]["step"]  # no step was lost
    finish(start(world, folder), folder)
    for rank, undisturbed in zip(recorded(folder), whole, strict=True):
        by_step = {line["step"]: line for line in undisturbed}
        assert {line["step"] for line in rank} == set(by_step)  # nothing was left out
        assert len(rank) >= STEPS
        for line in rank:  # also what was done again behind a checkpoint
            assert line == by_step[line["step"]]
    assert ends(folder) == ends(world / "whole")


@pytest.mark.parametrize(("seed", "number"), [(1, signal.SIGKILL), (2, signal.SIGTERM)])
def test_stopped_runs_continue_exactly(world: Path, whole: list[list[dict[str, Any]]], seed: int, number: int) -> None:
    """Keys, losses, learning rate and random numbers of each step; at the end weights, optimizer and data."""
    check(world, whole, stops=1, seed=seed, number=number)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("seed", range(10, 20))
def test_stopped_at_twenty_random_moments(
    world: Path, whole: list[list[dict[str, Any]]], seed: int, number: int
) -> None:
    check(world, whole, stops=2, seed=seed + 10 * number, number=number)


def test_other_ranks_and_workers_repeat_nothing(world: Path) -> None:
    """Real processes: 2 ranks of 2 workers, then 1 of 1, then 2 of 1; each image once before any comes again."""
    folder = world / "changed"
    steps: list[list[str]] = []
    for ranks, workers, until in ((2, 2, 6), (1, 1, 15), (2, 1, 48)):
        finish(start(world, folder, ranks=ranks, workers=workers, steps=until), folder)
        lines = recorded(folder)[:ranks]
        for step in range(len(steps) + 1, until + 1):
            keys = [line["keys"] for rank in lines for line in rank if line["step"] == step]
            assert len(keys) == ranks
            steps.append([key for rows in keys for row in rows for key in row if key.startswith("p")])
    seen: set[str] = set()
    for step in steps:
        again = seen.intersection(step)
        seen |= set(step)
        if len(seen) == 150:
            break
        assert not again and len(set(step)) == len(step)
    assert len(seen) == 150  # the epoch ended, in the last step looked at
    assert step is not steps[-1] and steps.index(step) > 15

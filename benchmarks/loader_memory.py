"""What a worker of the data loader costs the machine; run by ``benchmarks/data.py``.

It reports three figures. ``one more``: how much the memory of the whole tree of processes grows with each worker, from
their proportional sizes (PSS: a page that n processes share counts 1/n in each), which is what one more worker takes
from the machine. ``private`` (USS): pages of the largest worker that no other process has. ``resident`` (RSS): all
pages of that worker, also the code of libraries and what it shares with the process that it was forked from; the sum
of these over the workers counts the same memory many times.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

WORKERS = (0, 1, 2, 4)
BATCHES = 12
TARGET = 400
"""MB that one more worker may cost."""


def print_memory(folders: dict[int, tuple[Path, int]]) -> None:
    """Prints a line for each side.

    Args:
        folders: by side: folder of shards, tokens of a packed sequence.

    Raises:
        AssertionError: if one more worker costs more than the target.
    """
    print(f"{'memory':>6s} {'workers':>26s} {'one more':>12s} {'private':>9s} {'resident':>9s}   MB; all processes'")
    print("  side " + "".join(f"{workers:7d}" for workers in WORKERS) + "  PSS for that many workers, then of a worker")
    slopes = []
    for side, (shards, seq_len) in folders.items():
        totals, private, resident = [], 0.0, 0.0
        for workers in WORKERS:
            command = [sys.executable, __file__, str(side), str(shards), str(seq_len), str(workers)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            totals.append(found["pss"])
            private, resident = max(private, found["private"]), max(resident, found["resident"])
        # Without any worker the main process itself does the work, so growth counts from the first worker on.
        slopes.append(float(np.polyfit(WORKERS[1:], totals[1:], 1)[0]))
        text = "".join(f"{total:7.0f}" for total in totals)
        print(f"{side:6d} {text} {slopes[-1]:11.0f} {private:9.0f} {resident:9.0f}")
    assert max(slopes) < TARGET, f"one more worker costs {max(slopes):.0f} MB, over {TARGET}"


def memory_of(process: int | str) -> dict[str, float]:
    """MB by name, of ``smaps_rollup``."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) / 1000 for line in lines if line.endswith("kB")}


def measure(side: int, shards: Path, seq_len: int, workers: int) -> dict[str, float]:
    """Memory while a loader runs."""
    import multiprocessing

    import torch
    from data_setting import ours

    torch.set_num_threads(1)
    loader = iter(ours(shards, side, seq_len, workers).train_dataloader())
    for _ in range(BATCHES):
        batch = next(loader)
    time.sleep(5)  # workers read ahead as far as they may
    children = [child.pid for child in multiprocessing.active_children() if child.pid]
    found = [memory_of(child) for child in children]
    private = [one["Private_Clean"] + one["Private_Dirty"] for one in found]
    del batch
    return {
        "pss": sum(one["Pss"] for one in [*found, memory_of("self")]),
        "private": max(private, default=0.0),
        "resident": max((one["Rss"] for one in found), default=0.0),
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))

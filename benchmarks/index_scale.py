"""How long it takes to open a folder of shards, and the memory that takes: the index is simulated, shards are sparse.

    python benchmarks/index_scale.py [--samples 100_000 300_000 1_000_000] [--per-shard 10_000]

Each sample has a conversation and one image. Every process of a run opens the folder once; workers share its arrays.
Both grow in proportion, so the last column tells what the 345 million samples of NEO's pre-training (arXiv 2510.14979,
Table 2) would take in one folder.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from neo_components.data.shard_folder import ShardFolder
from neo_components.data.shards import FORMAT_VERSION

NEO = 345_000_000
SIZE = 20_480
"""Bytes of a sample in its shard."""


def simulate(folder: Path, samples: int, per_shard: int) -> None:
    """A folder whose shards hold nothing but the header of their last sample."""
    rows = []
    for number in range(samples):
        start = number % per_shard * SIZE
        members = [[start + 512, 400], [start + 1536, 18_000]]
        facts = {"turns": 2, "characters": 180, "images": [[480, 640]], "members": members}
        rows.append({"key": f"{number // per_shard:06d}{number % per_shard:08d}", "shard": number // per_shard, **facts})
    shards = []
    for shard in range(-(-samples // per_shard)):
        last = min((shard + 1) * per_shard, samples) - 1
        with (folder / f"shard-{shard:06d}.tar").open("wb") as file:
            file.seek(rows[last]["members"][0][0] - 512)
            file.write(tarfile.TarInfo(f"{rows[last]['key']}.json").tobuf(tarfile.USTAR_FORMAT))
            file.truncate(per_shard * SIZE)
        shards.append({"name": f"shard-{shard:06d}.tar", "bytes": per_shard * SIZE})
    index = {"format_version": FORMAT_VERSION, "shards": shards, "samples": rows}
    (folder / "index.json").write_text(json.dumps(index, separators=(",", ":")))


def opened(folder: str) -> None:
    """Opens a folder in this process and prints what it took."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = ShardFolder(folder)
    seconds = time.process_time() - start
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kept = next(int(line.split()[1]) for line in lines if line.startswith("Anonymous"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": seconds, "peak": peak / 1000, "kept": kept / 1000, "samples": len(found)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--per-shard", type=int, default=10_000)
    parser.add_argument("--open", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        return opened(options.open)
    print(f"{'samples':>12s} {'index MB':>9s} {'seconds':>9s} {'peak MB':>9s} {'kept MB':>9s}   345 million: hours, peak GB")
    empty = 0.0
    for samples in [100, *options.samples]:
        with tempfile.TemporaryDirectory() as name:
            simulate(Path(name), samples, options.per_shard)
            size = (Path(name) / "index.json").stat().st_size / 1e6
            command = [sys.executable, __file__, "--open", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        assert found["samples"] == samples
        if samples == 100:  # what a process takes without any samples
            empty = found["kept"]
            continue
        times = NEO / samples
        print(
            f"{samples:12,d} {size:9.0f} {found['seconds']:9.2f} {found['peak']:9.0f} {found['kept'] - empty:9.0f}"
            f"   {found['seconds'] * times / 3600:10.2f} {found['peak'] * times / 1000:10.0f}"
        )


if __name__ == "__main__":
    main()

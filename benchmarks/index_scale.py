"""How long it takes to open a folder of shards, and the memory that takes: the index is simulated, shards are sparse.

    python benchmarks/index_scale.py [--samples 100_000 300_000 1_000_000] [--per-shard 10_000]

Each sample has a conversation and one image. Every process of a run opens the folder once; workers share its arrays.
Both grow in proportion, so the last columns report what the 345 million samples of NEO's pre-training (arXiv
2510.14979, Table 2) would take in one folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from neo_components.data.shards.folder import ShardFolder
from neo_components.data.shards.format import FORMAT_VERSION

NEO = 345_000_000
SIZE = 20_480
"""Bytes of a sample in its shard."""


def simulate(folder: Path, samples: int, per_shard: int) -> None:
    """A folder whose shards hold nothing but the header of their last sample."""
    entries = []
    for number in range(samples):
        start = number % per_shard * SIZE
        members = [[start + 512, 400], [start + 1536, 18_000]]
        facts = {"turns": 2, "characters": 180, "images": [[480, 640]], "members": members}
        entries.append(
            {"key": f"{number // per_shard:06d}{number % per_shard:08d}", "shard": number // per_shard, **facts}
        )
    shards = []
    for shard in range(-(-samples // per_shard)):
        last = min((shard + 1) * per_shard, samples) - 1
        with (folder / f"shard-{shard:06d}.tar").open("wb") as file:
            file.seek(entries[last]["members"][0][0] - 512)
            file.write(tarfile.TarInfo(f"{entries[last]['key']}.json").tobuf(tarfile.USTAR_FORMAT))
            file.truncate(per_shard * SIZE)
        shards.append({"name": f"shard-{shard:06d}.tar", "bytes": per_shard * SIZE})
    index = {"format_version": FORMAT_VERSION, "shards": shards, "samples": entries}
    (folder / "index.json").write_text(json.dumps(index, separators=(",", ":")))


def opened(folder: str) -> None:
    """Opens a folder in this process and prints what it took, in seconds of the processor and MB."""
    start = time.process_time()
    found = ShardFolder(folder)
    found.read, found.shard_sizes, found.signature()
    seconds = time.process_time() - start
    facts = {line.split(":")[0]: line.split() for line in Path("/proc/self/status").read_text().splitlines()}
    peak, own = (int(facts[name][1]) / 1000 for name in ("VmHWM", "RssAnon"))
    print(json.dumps({"seconds": seconds, "peak": peak, "own": own, "samples": len(found)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--per-shard", type=int, default=10_000)
    parser.add_argument("--open", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        return opened(options.open)
    print(f"{'samples':>12s} {'opened':>8s} {'index MB':>9s} {'seconds':>9s} {'peak MB':>9s} {'own MB':>8s}", end="   ")
    print(f"{NEO / 1e6:.0f} million: hours, peak GB, own GB")
    empty: dict[str, float] = {}
    for samples in [100, *options.samples]:
        with tempfile.TemporaryDirectory() as name:
            simulate(Path(name), samples, options.per_shard)
            size = (Path(name) / "index.json").stat().st_size / 1e6
            for time_of in ("first", "again"):
                command = [sys.executable, __file__, "--open", name]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                assert found["samples"] == samples
                if samples == 100:  # what a process takes without any samples
                    empty = found
                    continue
                seconds, peak, own = (found[fact] - empty[fact] for fact in ("seconds", "peak", "own"))
                times = NEO / samples
                print(f"{samples:12,d} {time_of:>8s} {size:9.0f} {seconds:9.2f} {peak:9.0f} {own:8.0f}", end="   ")
                print(f"{seconds * times / 3600:10.2f} {peak * times / 1000:8.0f} {own * times / 1000:8.0f}")


if __name__ == "__main__":
    main()

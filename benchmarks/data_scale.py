"""Plans a run over 345 million samples in 35 thousand shards for 128 ranks of 8 workers, from lengths alone.

    python benchmarks/data_scale.py [--samples 345_000_000] [--shards 35_000] [--ranks 128] [--workers 8] [--minutes 2]

First come smaller runs: how evenly visual tokens lie on the ranks at each step. Then full size, that of NEO's
pre-training (arXiv 2510.14979, Table 2). Lengths are drawn at random: a long tail, three of ten samples are text alone.
The script reports the time and memory of planning (every worker plans for itself), the time to resume in the middle of
an epoch, and the size of a position in a checkpoint. At a thousandth of the scale all workers of all ranks plan a whole
epoch: they must agree, repeat no sample, and leave none out.
"""

from __future__ import annotations

import argparse
import io
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from neo_components.data.plan.pack_plan import PackPlan, Supply
from neo_components.data.plan.step_plan import StepPlan

SEQ_LEN = 16384


def lengths_file(path: Path, samples: int, mean: float, visual: bool, seed: int) -> None:
    """[3, samples] int32 as ``neo data index`` writes it, piece by piece."""
    table = np.lib.format.open_memmap(path, "w+", np.int32, (3, samples))
    step = 1 << 22
    for start in range(0, samples, step):
        random = np.random.default_rng([seed, start])
        count = min(step, samples - start)
        tokens = np.clip(np.exp(random.normal(mean, 1.0, count)), 24, 8192).astype(np.int32)
        table[0, start : start + count] = tokens
        if visual:
            table[1, start : start + count] = tokens * random.uniform(0.5, 0.95, count)
    table.flush()


def supplies(folder: Path, samples: int, shards: int) -> list[Supply]:
    """Images and text, 7 to 3, mapped from their files."""
    found = []
    for name, weight, mean, visual in (("images", 0.7, 6.3, True), ("text", 0.3, 5.6, False)):
        count, pieces = int(samples * weight), max(1, int(shards * weight))
        lengths_file(folder / f"{name}.npy", count, mean, visual, seed=int(visual))
        table = np.load(folder / f"{name}.npy", mmap_mode="r")
        sizes = np.full(pieces, count // pieces)
        sizes[: count % pieces] += 1
        found.append(Supply(name, table[0], table[1], sizes))
    return found


def plan(sources: list[Supply], ranks: int, position: dict | None = None) -> StepPlan:
    return StepPlan(PackPlan(sources, [7, 3], seq_len=SEQ_LEN, shuffle=10_000), ranks, 1, position)


def at_scale(sources: list[Supply], options: argparse.Namespace) -> None:
    start = time.perf_counter()
    steps = plan(sources, options.ranks)
    print(f"to the first step            {time.perf_counter() - start:10.2f} s")
    samples = tokens = count = 0
    fills, slowest = [], []
    start = time.perf_counter()
    while time.perf_counter() - start < 60 * options.minutes:
        step = steps.next_step()
        assert step is not None
        sequences = [sequence for mine in step for sequence in mine]
        samples += sum(len(sequence.members) for sequence in sequences)
        tokens += sum(sequence.tokens for sequence in sequences)
        visual = np.array([sum(sequence.visual for sequence in mine) for mine in step], float)
        slowest.append((visual.max(), visual.mean()))
        fills.append(sum(sequence.tokens for sequence in sequences) / (SEQ_LEN * len(sequences)))
        count += 1
    gone = time.perf_counter() - start
    total = sum(len(source.tokens) for source in sources)
    per_epoch = gone / samples * total
    print(f"planned                      {samples:10,d} samples, {count} steps, {gone / samples * 1e6:.1f} us a sample")
    print(f"planning an epoch            {per_epoch / 60:10.0f} min of each worker, over the whole epoch")
    print(f"    a step of the run        {gone / count * 1000:10.0f} ms of each worker")
    print(f"fill                         {np.mean(fills):10.4f}")
    top, mean = np.array(slowest).T
    over = 100 * (top / np.maximum(mean, 1) - 1)
    print(f"slowest rank's visual tokens {over.mean():9.1f} % over the mean of its step, on average;", end=" ")
    print(f"99 of 100 steps {np.quantile(over, 0.99):.1f} %, all {over.max():.1f} %")
    position = steps.state()
    buffer = io.BytesIO()
    torch.save(position, buffer)
    print(f"position in a checkpoint     {len(buffer.getvalue()) / 1000:10.0f} kB, for all ranks and workers together")
    start = time.perf_counter()
    again = plan(sources, options.ranks, position)
    seconds = time.perf_counter() - start
    assert again.next_step() == steps.next_step()
    print(f"resuming there               {seconds:10.2f} s, the next step is the same")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    own = {line.split(":")[0]: line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]}
    private = int(own["Anonymous"][1]) / 1000
    print(f"memory                       {private:10.0f} MB of its own; {peak:.0f} MB at most with the mapped lengths")


def long_tailed(count: int, shards: int = 1) -> list[Supply]:
    """Images of 64 to 4,096 visual tokens and, three of ten, text alone, both with long tails; so many shards each."""
    random = np.random.default_rng(0)
    images, texts = count * 7 // 10, count * 3 // 10
    visual = np.clip(np.exp(random.normal(np.log(400), 1.0, images)), 64, 4096).astype(np.int32)
    words = np.clip(np.exp(random.normal(np.log(80), 0.9, images)), 10, 4000).astype(np.int32)
    text = np.clip(np.exp(random.normal(np.log(300), 1.0, texts)), 20, 8192).astype(np.int32)
    return [
        Supply("images", visual + words + 2, visual, np.full(shards, images // shards)),
        Supply("text", text, np.zeros(texts, np.int32), np.full(shards, texts // shards)),
    ]


def balance(steps_of_rank: int) -> None:
    """How far the slowest rank's visual tokens are over the mean of its step, for some sizes of a run."""
    print("visual tokens of the slowest rank / mean of the step, long-tailed images and text")
    print(f"{'L':>6} {'ranks':>6} {'B':>3} {'steps':>6} {'mean':>7} {'99 %':>7} {'max':>7} {'fill':>7}  us/sample")
    sources = long_tailed(200_000)
    for seq_len in (4096, 16384):
        for ranks in (2, 8, 64):
            for size in (1, 4):
                start, samples = time.perf_counter(), 0
                count = max(32, min(2048 // (ranks * size) * 2, steps_of_rank))
                steps = StepPlan(PackPlan(sources, [7, 3], seq_len=seq_len, shuffle=10_000), ranks, size)
                over, fills = [], []
                for _ in range(count):
                    step = steps.next_step()
                    assert step is not None
                    visual = np.array([sum(sequence.visual for sequence in mine) for mine in step], float)
                    over.append(visual.max() / visual.mean() if visual.any() else 1.0)
                    planned = [sequence for mine in step for sequence in mine]
                    samples += sum(len(one.members) for one in planned)
                    fills.append(sum(one.tokens for one in planned) / (seq_len * len(planned)))
                gone = 1e6 * (time.perf_counter() - start) / samples
                print(
                    f"{seq_len:6} {ranks:6} {size:3} {count:6} {np.mean(over):7.4f} {np.quantile(over, 0.99):7.4f}",
                    end=" ",
                )
                print(f"{np.max(over):7.4f} {np.mean(fills):7.4f} {gone:10.1f}")


def proof(options: argparse.Namespace, folder: Path) -> None:
    """Every worker of every rank plans an epoch; what each would read is put together."""
    sources = supplies(folder, options.samples // 1000, max(2, options.shards // 1000))
    counts = [np.zeros(len(source.tokens), np.int64) for source in sources]
    epoch = len(sources[0].tokens)
    whole = plan(sources, options.ranks)
    expected = []
    while counts[0].sum() < epoch:
        step = whole.next_step()
        assert step is not None
        expected.append(step)
        for mine in step:
            for sequence in mine:
                for source, number, _ in sequence.members:
                    counts[source][number] += 1
    counts = [np.zeros(len(source.tokens), np.int64) for source in sources]
    start = time.perf_counter()
    for worker in range(options.workers):
        # All ranks have the same plan, so one plan of each worker determines what that worker reads on every rank.
        mine = plan(sources, options.ranks)
        for number in range(len(expected)):
            step = mine.next_step()
            assert step == expected[number], "two workers disagree"
            if number % options.workers == worker:
                for rank in step:
                    for sequence in rank:
                        for source, sample, _ in sequence.members:
                            counts[source][sample] += 1
    images = counts[0]
    print(f"at a thousandth: {len(expected)} steps of {options.ranks} ranks x {options.workers} workers,", end=" ")
    print(f"{images.sum() + counts[1].sum():,d} samples read, {time.perf_counter() - start:.0f} s")
    # The last block of steps may hold the first samples of the next epoch.
    print(f"    of {epoch:,d} images {int((images >= 1).sum()):,d} were read,", end=" ")
    print(f"{int((images > 1).sum()):,d} more than once, as the last step reaches into the next epoch")
    assert images.min() >= 1 or images.max() == 1
    assert images.max() <= 2 and int((images > 1).sum()) <= options.ranks * 200


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("samples", 345_000_000), ("shards", 35_000), ("ranks", 128), ("workers", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--minutes", type=float, default=2.0, help="how long to plan")
    options = parser.parse_args()
    balance(2048)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        sources = supplies(Path(folder), options.samples, options.shards)
        size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e9
        print(f"{options.samples:,d} samples in {options.shards:,d} shards", end=", ")
        print(f"{options.ranks} ranks x {options.workers} workers, torch {torch.__version__}")
        print(f"lengths on disk              {size:10.2f} GB (made in {time.perf_counter() - start:.0f} s)")
        at_scale(sources, options)
    with tempfile.TemporaryDirectory() as folder:
        proof(options, Path(folder))


if __name__ == "__main__":
    main()

"""The share of a training step that waits for data, with JPEG photographs read, resized and packed by the data module.

    python benchmarks/gpu_data.py --device cuda --output outputs/data       # the 2.2B shape, stage 1, 8192 tokens
    python benchmarks/gpu_data.py --tiny --output /tmp/data

Photographs are made on the spot (``benchmarks/data.py``), 1182 x 887 pixels, resized to 576 visual tokens each, which
makes about ten a step. A step is ``NEO.loss``, backward and AdamW, and ends when the device has done it; the time until
the next batch is there counts as waiting. A run that lets the host go ahead waits less, so the share is an upper bound.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data import conversation, photograph
from data_setting import TOKENIZER, ours
from train_step import STAGES, build, options_of

from neo_components import NEO, Batch
from neo_components.data import NEODataModule, load_tokenizer, write_shards
from neo_components.data.text.conversation import image_token_ids
from neo_components.training.groups import train_only

SHAPE = [
    "--hidden=2048", "--heads=16", "--pre=12", "--post=28", "--vocabulary=151936", "--tied", "--precision=bf16",
    "--compile",
]  # fmt: skip
"""NEO-2.2B, as options of train_step.py."""
FULL = {"side": 768, "seq_len": 8192, "photos": 48, "samples": 384, "warm_up": 3, "steps": 20}
TINY = {"side": 128, "seq_len": 512, "photos": 4, "samples": 24, "warm_up": 1, "steps": 3}
ENOUGH = 0.02
"""A share below this is no loss worth a change."""


def write_photographs(folder: Path, side: int, photos: int, samples: int) -> None:
    """Shards of samples with a photograph each; photographs come again, as making one takes longer than reading it."""
    with ProcessPoolExecutor(min(photos, len(os.sched_getaffinity(0)))) as pool:
        made = list(pool.map(partial(photograph, side), range(photos)))
    records = (
        {"key": f"s{n:05d}", "conversations": conversation(n), "images": [made[n % photos]]} for n in range(samples)
    )
    write_shards(records, folder)


def loader(model: NEO, shards: Path, size: dict[str, int], workers: int) -> tuple[NEODataModule, Iterator[Batch]]:
    """The data module of a run, with the model's own index rule, and its batches."""
    data = ours(shards, size["side"], size["seq_len"], workers)
    data.input_spec = model.input_spec
    data.prepare_data()
    return data, iter(data.train_dataloader())


def training_step(model: NEO, options: argparse.Namespace) -> Callable[[Batch], None]:
    """One step, until the device has done it."""
    weights = train_only(model, STAGES[1])
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    if options.compile:
        for stack in (model.pre_buffer, model.post_llm):
            stack.compile_blocks("aot_eager" if options.tiny else "inductor")

    def step(batch: Batch) -> None:
        batch = batch.to(options.device, non_blocking=True)
        with torch.autocast(options.device, torch.bfloat16):
            loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return step


def measure(batches: Iterator[Batch], step: Callable[[Batch], None], warm_up: int, steps: int) -> dict[str, Any]:
    """Seconds of waiting and of computing over ``steps`` steps, and what their batches held."""
    waited, computed, images, tokens = [], [], 0, 0
    for number in range(warm_up + steps):
        began = time.perf_counter()
        batch = next(batches)
        there = time.perf_counter()
        step(batch)
        if number >= warm_up:
            waited.append(there - began)
            computed.append(time.perf_counter() - there)
            images += len(batch.image_grids)
            tokens += int((batch.document_ids >= 0).sum())
    return {
        "share": sum(waited) / (sum(waited) + sum(computed)),
        "step_seconds": sum(computed) / steps,
        "wait_seconds": sum(waited) / steps,
        "longest_wait_seconds": max(waited),
        "images_per_step": images / steps,
        "tokens_per_step": tokens / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--workers", type=int, help="processes of the data module; default: half of the cores, 8 at most"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of data_wait.json and data_wait.txt")
    parser.add_argument("--tiny", action="store_true", help="a shape that a CPU steps in seconds, to rehearse")
    given = parser.parse_args()
    size = TINY if given.tiny else FULL
    options = options_of([*SHAPE, "--device", given.device, *(["--tiny"] if given.tiny else [])])
    workers = given.workers if given.workers is not None else min(8, max(1, len(os.sched_getaffinity(0)) // 2))
    special = image_token_ids(load_tokenizer(str(TOKENIZER)))
    names = ("image_token_id", "image_start_id", "image_end_id")
    model = build(options, **dict(zip(names, special, strict=True)))
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        write_photographs(Path(folder), size["side"], size["photos"], size["samples"])
        print(f"{size['samples']} samples made in {time.perf_counter() - began:.1f} s", flush=True)
        data, batches = loader(model, Path(folder), size, workers)
        found = measure(batches, training_step(model, options), size["warm_up"], size["steps"])
        del batches, data
    found |= {"workers": workers, "size": size, "enough": ENOUGH}
    device = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    text = (
        f"device: {device}, {workers} workers; {size['steps']} steps of {found['tokens_per_step']:.0f} tokens with "
        f"{found['images_per_step']:.1f} photographs\n"
        f"a step computes {1e3 * found['step_seconds']:.1f} ms and waits {1e3 * found['wait_seconds']:.1f} ms for data "
        f"(at most {1e3 * found['longest_wait_seconds']:.1f} ms): {found['share']:.2%} of its time"
    )
    print(text, flush=True)
    (given.output / "data_wait.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.output / "data_wait.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Memory of a training step, estimated and measured: bytes kept for the backward pass, and the peak.

    python benchmarks/activation_memory.py
    python benchmarks/activation_memory.py --device cuda

``kept`` is counted by hooks on every tensor that autograd saves, each storage once, weights and batch left out; the
estimate is that of ``neo_components.estimate``, which runs the same code on fake tensors. The gradients that the loss
holds are left out of both. ``peak`` is what forward and
backward take beyond what was there before: of a separate process on a CPU (Linux, glibc), of torch's allocator on a
GPU; its estimate is a rule for the working space on top of exact counts. Each line is a separate process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neo_components import NEO, Batch, PatchEmbedding, PostLLM, PreBuffer, pack
from neo_components.estimate.activations import kept_activations
from neo_components.estimate.memory import Plan, step_memory
from neo_components.estimate.tracing import SavedBytes, Setting
from neo_components.training.groups import train_only

sys.path.insert(0, str(Path(__file__).parent))

STAGES = {1: ["patch_embedding", "pre_buffer", "post_llm.hw"], 3: ["all"]}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    hidden: int
    pre: int
    post: int
    vocabulary: int
    documents: int
    length: int
    stage: int
    checkpointed: float
    bf16: bool
    device: str = "cpu"


SHAPES = [
    # hidden, pre, post, vocabulary, documents of a packed sequence, tokens of each
    (128, 3, 3, 2048, 64, 64),
    (256, 2, 6, 8192, 8, 256),
    (512, 4, 8, 32768, 8, 256),
    (512, 2, 4, 32768, 1, 2048),
]
GPU_SHAPES = [*SHAPES, (2048, 12, 28, 151936, 16, 512)]


def build(case: Case) -> tuple[NEO, Batch]:
    """Model and batch of a case."""
    from train_step import document

    torch.manual_seed(0)
    heads = case.hidden // 64 if case.hidden < 2048 else 16
    sizes = {
        "hidden_size": case.hidden, "num_heads": heads, "num_kv_heads": max(1, heads // 2),
        "head_width": case.hidden // heads, "feed_forward_size": 3 * case.hidden,
    }  # fmt: skip
    with torch.device(case.device):
        model = NEO(
            PatchEmbedding(case.hidden), PreBuffer(case.pre, **sizes), PostLLM(case.vocabulary, case.post, **sizes)
        )
    train_only(model, STAGES[case.stage])
    for stack in (model.pre_buffer, model.post_llm):
        stack.checkpointed_blocks = round(case.checkpointed * len(stack.layers))
    samples = [document(case.length, model.input_spec, n) for n in range(case.documents)]
    return model, pack(samples, model.input_spec).to(case.device)


def setting_of(case: Case) -> Setting:
    """Device and precision of a case."""
    return Setting(case.device, torch.bfloat16 if case.bf16 else None)


def kept(model: NEO, batch: Batch, case: Case) -> int:
    """Bytes that autograd saves in a forward pass."""
    apart = [*model.parameters(), *(value for value in vars(batch).values() if isinstance(value, Tensor))]
    with SavedBytes(apart) as saved, torch.autocast(case.device, torch.bfloat16, enabled=case.bf16):
        loss = model.loss(batch)
    del loss
    return saved.bytes


def peak(model: NEO, batch: Batch, case: Case) -> int:
    """Bytes that two steps without an optimizer take at most beyond what was there before the first."""
    before = _restart(case.device)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with torch.autocast(case.device, torch.bfloat16, enabled=case.bf16):
            loss = model.loss(batch)
        loss.backward()
        del loss
    return _highest(case.device) - before


def _restart(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _highest(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def estimates(model: NEO, batch: Batch, case: Case) -> tuple[int, int]:
    """Kept bytes and peak, as the library estimates them; ids are read on the CPU."""
    setting, ids = setting_of(case), batch.to("cpu")
    activations = kept_activations(model, ids, setting)
    memory = step_memory(model, ids, setting, Plan(), activations)
    always = sum(memory.kinds.get(kind, 0) for kind in ("weights", "optimizer states", "batch"))
    by_autograd = (
        activations.total(model.pre_buffer.checkpointed_blocks, model.post_llm.checkpointed_blocks) - activations.loss
    )
    return by_autograd, memory.peak - always


def run(case: Case, threads: int, pipe: Any) -> None:
    """Sends (estimated kept, kept, estimated peak, peak) of a case."""
    torch.set_num_threads(threads)
    model, batch = build(case)
    high = peak(model, batch, case)  # first: the others leave memory behind that a step would use again
    guess = estimates(model, batch, case)
    pipe.send((guess[0], kept(model, batch, case), guess[1], high))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    name = f"{platform.machine()} CPU" if options.device == "cpu" else torch.cuda.get_device_name(0)
    print(f"device: {name}, torch {torch.__version__}; MiB, and estimate over measured")
    print(f"{'hidden':>6s} {'blocks':>6s} {'tokens':>9s} {'stage':>5s} {'again':>5s} {'type':>8s} {'kept est.':>9s} "
          f"{'measured':>9s} {'ratio':>6s} {'peak est.':>9s} {'measured':>9s} {'ratio':>6s}")  # fmt: skip
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # of glibc: freed memory leaves the process
    spawn = multiprocessing.get_context("spawn")
    for shape in GPU_SHAPES if options.device == "cuda" else SHAPES:
        for stage, part, bf16 in [(s, r, b) for s in STAGES for r in (0.0, 0.5, 1.0) for b in (False, True)]:
            case = Case(*shape, stage, part, bf16, options.device)
            here, there = spawn.Pipe()
            process = spawn.Process(target=run, args=(case, options.threads, there))
            process.start()
            there.close()
            guess, count, guess_peak, high = here.recv()
            process.join()
            tokens = f"{case.documents} x {case.length}"
            print(f"{case.hidden:6d} {f'{case.pre}+{case.post}':>6s} {tokens:>9s} {stage:5d} {part:5.1f} "
                  f"{'bfloat16' if bf16 else 'float32':>8s} {guess / 2**20:9.1f} {count / 2**20:9.1f} "
                  f"{guess / count:6.3f} {guess_peak / 2**20:9.1f} {high / 2**20:9.1f} "
                  f"{guess_peak / high:6.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

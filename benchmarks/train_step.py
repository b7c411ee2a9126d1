"""One training step and that of a plain textbook NEO: time and peak memory, same weights, same batch, equal losses.

    python benchmarks/train_step.py --lengths 1024 4096 --stages 1 3
    python benchmarks/train_step.py --device cuda --precision bf16 --compile --lengths 8192 --documents 16 \\
        --hidden 2048 --heads 16 --pre 12 --post 28 --vocabulary 151936 --tied      # the 2.2B shape
    python benchmarks/train_step.py --tiny --compile --output /tmp/step      # every line of it in seconds, on a CPU

The other side is ``tests/reference_neo.py``: full logits, a dense mask over the packed sequence, rotary tables in every
block, convolutions over padded images. Each side runs in its own process on the same number of threads, and the two
alternate, so that other load on the machine affects both. A step is forward, backward and fused AdamW. Time is the
least of the repetitions; memory is the peak of the process during a step beyond what it held before its first
(gradients and moments are part of it, weights are not); on CUDA, what torch allocated. Losses that differ end the
program with an error.

On CUDA the model FLOP utilization is given too: what the step must compute (matrix products forward, the gradients of
trained weights and of what is between them, the head at target tokens, attention as the mask has it; nothing that is
recomputed) over its time and the device's peak, or ``--peak-tflops``.

``--output`` writes ``train_step.json`` and ``train_step.txt``, and has one more step profiled: the ten kernels (on a
CPU, operators) with the most time, compiled graphs and graph breaks, and the peak memory, weights included, beside the
estimate of ``neo inspect``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from step_flops import step_flops
from step_report import details, estimated_peak, graph_counts, largest_kernels, peak_tflops
from torch import Tensor

from neo_components import NEO, InputSpec, PatchEmbedding, PostLLM, PreBuffer, Sample, pack
from neo_components.training.groups import train_only
from neo_components.types import IGNORED

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

TOLERANCE = {"float32": 1e-4, "bf16": 2e-2}
"""Largest allowed difference of the two losses."""
STAGES = {1: ["patch_embedding", "pre_buffer", "post_llm.hw"], 3: ["all"]}
SIDES = ("neo_components", "reference")
TINY: dict[str, Any] = {
    "hidden": 64, "heads": 2, "pre": 1, "post": 2, "vocabulary": 512, "lengths": [256], "documents": 2, "repeat": 2,
}  # fmt: skip
"""What ``--tiny`` sets, to rehearse."""


def build(options: argparse.Namespace, **image_ids: int) -> NEO:
    """The model, the same on both sides; ``image_ids`` are the post-LLM's."""
    torch.manual_seed(0)
    width = options.hidden // options.heads
    sizes = {
        "hidden_size": options.hidden, "num_heads": options.heads, "num_kv_heads": options.heads // 2,
        "head_width": width, "feed_forward_size": 3 * options.hidden,
    }  # fmt: skip
    with torch.device(options.device):
        post = PostLLM(options.vocabulary, options.post, tie_embeddings=options.tied, **image_ids, **sizes)
        post.init_new_from_llm()
        return NEO(PatchEmbedding(options.hidden), PreBuffer(depth=options.pre, **sizes), post)


def document(length: int, spec: InputSpec, seed: int) -> Sample:
    """One image of a quarter of the tokens, a question, and an answer of a quarter."""
    generator = torch.Generator().manual_seed(seed)
    side = int((length // 4) ** 0.5)
    ids = torch.randint(0, spec.image_token_id, (length,), generator=generator)
    ids[4] = spec.image_start_id
    ids[5 : 5 + side * side] = spec.image_token_id
    ids[5 + side * side] = spec.image_end_id
    labels = torch.full((length,), IGNORED)
    labels[-(length // 4) :] = ids[-(length // 4) :]
    return Sample(ids, labels, [torch.randn(3, side * spec.factor, side * spec.factor, generator=generator)])


def memory(device: str) -> tuple[int, int]:
    """Peak and present bytes: of torch's allocations on CUDA, of this process on CPU (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    high, now = (int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
    return high, now


def restart_peak(device: str) -> None:
    """The peak counts from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def clock(options: argparse.Namespace) -> float:
    """Seconds; on CUDA after all work is done."""
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if options.cpu_time else time.perf_counter()


def step_of(side: str, model: NEO, samples: list[Sample], options: argparse.Namespace) -> Callable[[], Tensor]:
    """The computation of one side's loss."""
    batch = pack(samples, model.input_spec).to(options.device)
    if side == SIDES[0]:
        if options.compile:
            for stack in (model.pre_buffer, model.post_llm):
                stack.compile_blocks("aot_eager" if options.tiny else "inductor")
        return lambda: model.loss(batch)
    from reference_neo import ReferenceNEO, images_of

    plain = ReferenceNEO(model).to(options.device)
    images = [image.to(options.device) for image in images_of(samples)]
    options.trainable = [p for p in plain.parameters() if p.requires_grad]
    return lambda: plain.loss(batch, images)


def run_side(side: str, stage: int, length: int, options: argparse.Namespace, pipe: Connection) -> None:
    """First sends what is known of a step (:func:`facts_of`), then answers every message with (loss, seconds, peak
    bytes, compiled graphs) of one step, and the last one with what a profiled step reports."""
    torch.set_num_threads(options.threads)
    model = build(options)
    options.trainable = train_only(model, STAGES[stage])
    samples = [document(length // options.documents, model.input_spec, n) for n in range(options.documents)]
    facts = facts_of(side, model, samples, options)
    compute = step_of(side, model, samples, options)
    del model
    optimizer = torch.optim.AdamW(options.trainable, lr=1e-5, fused=True)

    def step() -> Tensor:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            loss = compute()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    restart_peak(options.device)
    before = memory(options.device)[1]
    pipe.send(facts | {"before": before if options.device == "cuda" else facts["weights"]})
    while pipe.recv():
        began = clock(options)
        loss = step().item()
        gone, most = clock(options) - began, memory(options.device)[0] - before
        pipe.send((loss, gone, most, graph_counts()["graphs"]))
    wanted = side == SIDES[0] and options.output is not None
    pipe.send({"kernels": largest_kernels(step, options.device)} | graph_counts() if wanted else {})


def facts_of(side: str, model: NEO, samples: list[Sample], options: argparse.Namespace) -> dict[str, float]:
    """FLOPs that a step must do, bytes of the weights, and the estimate of the peak; zeros where nobody asks."""
    asked = side == SIDES[0] and (options.device == "cuda" or options.output is not None)
    if not asked:
        return {"flops": 0.0, "weights": 0, "estimated_peak": 0}
    batch = pack(samples, model.input_spec)
    return {
        "flops": step_flops(model, samples),
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "estimated_peak": estimated_peak(model, batch, options.device, options.precision == "bf16"),
    }


def compare(stage: int, length: int, sides: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What was measured on each side: least and median seconds, bytes, FLOPs, and what the last step reported.

    Raises:
        SystemExit: if the losses differ.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes, processes, facts = {}, [], {}
    for side in sides:
        pipes[side], there = spawn.Pipe()
        processes.append(spawn.Process(target=run_side, args=(side, stage, length, options, there), daemon=True))
        processes[-1].start()
        there.close()
        facts[side] = pipes[side].recv()
    found: dict[str, list[tuple[float, float, float, int]]] = {side: [] for side in sides}
    for _ in range(options.repeat):
        for side in sides:
            pipes[side].send(True)
            found[side].append(pipes[side].recv())
    for side, process in zip(sides, processes, strict=True):
        pipes[side].send(False)
        facts[side] |= pipes[side].recv()
        process.join()
    losses = [[step[0] for step in found[side]] for side in sides]
    if any(abs(a - b) > TOLERANCE[options.precision] for step in zip(*losses, strict=True) for a in step for b in step):
        sys.exit(f"stage {stage}, {length} tokens: the losses differ: {dict(zip(sides, losses, strict=True))}")
    return {side: measured(found[side], facts[side]) for side in sides}


def measured(steps: list[tuple[float, float, float, int]], facts: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one side. The whole peak is what a step adds to weights and batch; on a CPU to the weights."""
    used = max(step[2] for step in steps)
    return facts | {
        "loss": steps[0][0],
        "seconds": min(step[1] for step in steps),
        "median_seconds": statistics.median(step[1] for step in steps[1:] or steps),
        "added_bytes": used,
        "peak": facts["before"] + used,
        "compiled_after_first_step": steps[-1][3] - steps[0][3],
    }


def reference_bytes(length: int, options: argparse.Namespace) -> int:
    """What the textbook keeps for the backward pass: scores before and after the softmax, and the logits."""
    return 4 * length * (length * options.heads * (options.pre + options.post) * 2 + 3 * options.vocabulary)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens per sequence")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3], choices=[1, 3])
    parser.add_argument("--documents", type=int, default=0, help="per sequence (default: one for each 256 tokens)")
    for name, value in (("hidden", 512), ("heads", 8), ("pre", 4), ("post", 8), ("vocabulary", 32768)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=list(TOLERANCE), help="bf16: by autocast")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of this library's side")
    parser.add_argument("--tied", action="store_true", help="the head is the word embedding, as in Qwen3-1.7B")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in bfloat16, dense; default: by its name")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="seconds of CPU, for a machine that is not idle")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory", type=float, default=12.0, help="GiB that the reference may take; beyond, left out")
    parser.add_argument("--output", type=Path, help="folder of train_step.json and train_step.txt")
    parser.add_argument("--tiny", action="store_true", help="a shape that a CPU steps in seconds, to rehearse")
    options = parser.parse_args(arguments)
    if options.tiny:
        vars(options).update(TINY)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return options


def main() -> None:
    options = options_of()
    device = f"{platform.machine()} CPU, {options.threads} threads"
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
    peak = peak_tflops(options.peak_tflops)
    lines, rows = [], []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    say(
        f"device: {device}, torch {torch.__version__}, {options.precision}{', compiled' if options.compile else ''}; "
        f"hidden {options.hidden}, {options.pre}+{options.post} blocks, vocabulary {options.vocabulary}; "
        f"{'seconds of CPU' if options.cpu_time else 'wall time'}, least of {options.repeat}"
    )
    say(f"{'stage':>5s} {'tokens':>7s} {'docs':>5s} {'s':>8s} {'ms/token':>9s} {'MiB':>8s} {'ref. s':>8s} "
        f"{'ref. MiB':>9s} {'faster':>7s} {'memory':>7s}")  # fmt: skip
    documents = options.documents
    for stage in options.stages:
        for length in options.lengths:
            options.documents = documents or length // 256
            row, text = one_row(stage, length, options, peak)
            say(text)
            if options.output is not None:
                say(details(row))
            rows.append(row)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        setting = {name: value for name, value in vars(options).items() if name != "output"}
        found = {"device": device, "torch": torch.__version__, "peak_tflops": peak, "setting": setting, "rows": rows}
        (options.output / "train_step.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.output / "train_step.txt").write_text("\n".join(lines) + "\n")


def one_row(stage: int, length: int, options: argparse.Namespace, peak: float | None) -> tuple[dict[str, Any], str]:
    """Measures one row of the table: its numbers, and the row."""
    needed = reference_bytes(length, options)
    sides = list(SIDES) if needed < options.memory * 2**30 else [SIDES[0]]
    found = compare(stage, length, sides, options)
    own = found[SIDES[0]]
    seconds, used = own["seconds"], own["added_bytes"]
    row = {"stage": stage, "tokens": length, "documents": options.documents} | own
    row["mfu"] = own["flops"] / seconds / peak / 1e12 if peak and options.device == "cuda" else None
    text = f"{stage:5d} {length:7d} {options.documents:5d} {seconds:8.2f} {1e3 * seconds / length:9.3f}"
    text += f" {used / 2**20:8.0f}"
    if len(sides) == 1:
        text += f"   left out: it keeps about {needed / 2**30:.0f} GiB (--memory)"
    else:
        row["reference"] = other = found[SIDES[1]]
        slow, large = other["seconds"], other["added_bytes"]
        text += f" {slow:8.2f} {large / 2**20:9.0f} {slow / seconds:6.2f}x {used / large:6.2f}x"
    return row, text + (f"   MFU {row['mfu']:.3f}" if row["mfu"] is not None else "")


if __name__ == "__main__":
    main()

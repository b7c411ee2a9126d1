"""One training step and that of a plain textbook NEO: time and peak memory, same weights, same batch, equal losses.

    python benchmarks/train_step.py --lengths 1024 4096 --stages 1 3
    python benchmarks/train_step.py --device cuda --precision bf16 --compile --lengths 8192 --documents 16 \\
        --hidden 2048 --heads 16 --pre 12 --post 28 --vocabulary 151936      # the 2.2B shape

The other side is ``tests/reference_neo.py``: full logits, a dense mask over the packed sequence, rotary tables in every
block, convolutions over padded images. Each side runs in its own process on the same number of threads, and the two
alternate, so that other load on the machine affects both. A step is forward, backward and AdamW. Time is the
least of the repetitions; memory is the peak of the process during a step beyond what it held before its first
(gradients and moments are part of it, weights are not); on CUDA, what torch allocated. Losses that differ end the
program with an error.

On CUDA the model FLOP utilization is given too: what the step must compute (matrix products forward, the gradients of
trained weights and of what is between them, the head at target tokens, attention as the mask has it; nothing that is
recomputed) over its time and ``--peak-tflops``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from neo_components import NEO, Batch, InputSpec, PatchEmbedding, PostLLM, PreBuffer, Sample, pack
from neo_components.components.masks import dense_mask
from neo_components.training.groups import train_only
from neo_components.types import IGNORED

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

TOLERANCE = {"float32": 1e-4, "bf16": 2e-2}
"""Largest allowed difference of the two losses."""
STAGES = {1: ["patch_embedding", "pre_buffer", "post_llm.hw"], 3: ["all"]}
SIDES = ("neo_components", "reference")


def build(options: argparse.Namespace) -> NEO:
    """The model, the same on both sides."""
    torch.manual_seed(0)
    width = options.hidden // options.heads
    sizes = {
        "hidden_size": options.hidden, "num_heads": options.heads, "num_kv_heads": options.heads // 2,
        "head_width": width, "feed_forward_size": 3 * options.hidden,
    }  # fmt: skip
    post = PostLLM(vocab_size=options.vocabulary, depth=options.post, **sizes)
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


def linear_flops(model: NEO, batch: Batch) -> float:
    """FLOPs of the matrix products with weights in a step that trains the patch embedding, as in stages 1 and 3:
    forward, the gradient of the input (which all but the first need), and that of the weight where it is trained."""
    tokens, patches, embedding = batch.token_ids.numel(), len(batch.patches), model.patch_embedding
    counts = {
        embedding.patch_proj: patches,
        embedding.token_proj: patches // embedding.group,
        model.post_llm.lm_head: int((batch.labels != IGNORED).sum()),
    }
    total = 0.0
    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            passes = 1 + (part is not embedding.patch_proj) + part.weight.requires_grad
            total += passes * 2.0 * counts.get(part, tokens) * part.weight.numel()
    return total


def attention_flops(model: NEO, batch: Batch) -> float:
    """FLOPs of all blocks' attention over the pairs of query and key that the mask shows, forward and backward."""
    pairs = int(dense_mask(batch.document_ids, batch.image_ids).sum())
    stacks = [stack.hparams for stack in (model.pre_buffer, model.post_llm)]
    # Queries times keys are 2E wide, weights times values E; each product has two gradients.
    return sum(3 * 2.0 * pairs * h.num_heads * 3 * h.head_width * h.depth for h in stacks)


def step_flops(model: NEO, samples: list[Sample]) -> float:
    """FLOPs that a step must do."""
    batch = pack(samples, model.input_spec)
    return linear_flops(model, batch) + attention_flops(model, batch)


def step_of(side: str, model: NEO, samples: list[Sample], options: argparse.Namespace) -> Callable[[], Tensor]:
    """The computation of one side's loss."""
    batch = pack(samples, model.input_spec).to(options.device)
    if side == SIDES[0]:
        if options.compile:
            for stack in (model.pre_buffer, model.post_llm):
                stack.compile_blocks()
        return lambda: model.loss(batch)
    from reference_neo import ReferenceNEO, images_of

    plain = ReferenceNEO(model).to(options.device)
    images = [image.to(options.device) for image in images_of(samples)]
    options.trainable = [p for p in plain.parameters() if p.requires_grad]
    return lambda: plain.loss(batch, images)


def run_side(side: str, stage: int, length: int, options: argparse.Namespace, pipe: Connection) -> None:
    """Answers every message with (loss, seconds, peak bytes) of one step; first with the FLOPs of a step."""
    torch.set_num_threads(options.threads)
    model = build(options).to(options.device)
    options.trainable = train_only(model, STAGES[stage])
    samples = [document(length // options.documents, model.input_spec, n) for n in range(options.documents)]
    flops = step_flops(model, samples) if options.device == "cuda" else 0.0
    compute = step_of(side, model, samples, options)
    del model
    optimizer = torch.optim.AdamW(options.trainable, lr=1e-5)
    restart_peak(options.device)
    before = memory(options.device)[1]
    pipe.send(flops)
    while pipe.recv():
        began = clock(options)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            loss = compute()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pipe.send((loss.item(), clock(options) - began, memory(options.device)[0] - before))


def compare(
    stage: int, length: int, sides: list[str], options: argparse.Namespace
) -> dict[str, tuple[float, float, float]]:
    """Least seconds, peak bytes and FLOPs of a step of each side.

    Raises:
        SystemExit: if the losses differ.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes, processes, flops = {}, [], {}
    for side in sides:
        pipes[side], there = spawn.Pipe()
        processes.append(spawn.Process(target=run_side, args=(side, stage, length, options, there), daemon=True))
        processes[-1].start()
        there.close()
        flops[side] = pipes[side].recv()
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
    for _ in range(options.repeat):
        for side in sides:
            pipes[side].send(True)
            found[side].append(pipes[side].recv())
    for side, process in zip(sides, processes, strict=True):
        pipes[side].send(False)
        process.join()
    losses = [[step[0] for step in found[side]] for side in sides]
    if any(abs(a - b) > TOLERANCE[options.precision] for step in zip(*losses, strict=True) for a in step for b in step):
        sys.exit(f"stage {stage}, {length} tokens: the losses differ: {dict(zip(sides, losses, strict=True))}")
    return {side: (min(s[1] for s in steps), max(s[2] for s in steps), flops[side]) for side, steps in found.items()}


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
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="of the GPU (default: H100 SXM, bfloat16, dense)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="seconds of CPU, for a machine that is not idle")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory", type=float, default=12.0, help="GiB that the reference may take; beyond, left out")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return options


def main() -> None:
    options = options_of()
    device = f"{platform.machine()} CPU, {options.threads} threads"
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
    print(
        f"device: {device}, torch {torch.__version__}, {options.precision}{', compiled' if options.compile else ''}; "
        f"hidden {options.hidden}, {options.pre}+{options.post} blocks, vocabulary {options.vocabulary}; "
        f"{'seconds of CPU' if options.cpu_time else 'wall time'}, least of {options.repeat}"
    )
    print(f"{'stage':>5s} {'tokens':>7s} {'docs':>5s} {'s':>8s} {'ms/token':>9s} {'MiB':>8s} {'ref. s':>8s} "
          f"{'ref. MiB':>9s} {'faster':>7s} {'memory':>7s}")  # fmt: skip
    documents = options.documents
    for stage in options.stages:
        for length in options.lengths:
            options.documents = documents or length // 256
            print(line(stage, length, options), flush=True)


def line(stage: int, length: int, options: argparse.Namespace) -> str:
    """Measures one row of the table."""
    needed = reference_bytes(length, options)
    sides = list(SIDES) if needed < options.memory * 2**30 else [SIDES[0]]
    found = compare(stage, length, sides, options)
    seconds, used, flops = found[SIDES[0]]
    text = f"{stage:5d} {length:7d} {options.documents:5d} {seconds:8.2f} {1e3 * seconds / length:9.3f}"
    text += f" {used / 2**20:8.0f}"
    if len(sides) == 1:
        text += f"   left out: it keeps about {needed / 2**30:.0f} GiB (--memory)"
    else:
        slow, large, _ = found[SIDES[1]]
        text += f" {slow:8.2f} {large / 2**20:9.0f} {slow / seconds:6.2f}x {used / large:6.2f}x"
    return text + (f"   MFU {flops / seconds / options.peak_tflops / 1e12:.3f}" if options.device == "cuda" else "")


if __name__ == "__main__":
    main()

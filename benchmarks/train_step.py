"""One training step beside a plain textbook NEO: time and peak memory, same weights, same batch, equal losses.

    python benchmarks/train_step.py --lengths 1024 4096 --stages 1 3

The other side is ``tests/reference_neo.py``: full logits, a dense mask over the whole row, rotary tables in every
block, convolutions over padded images. Each side runs in a process of its own on the same number of threads, and the
two take turns, so that what else the machine does falls on both. A step is forward, backward and AdamW. Time is the
least of the repetitions; memory is the peak of the process during a step beyond what it held before its first
(gradients and moments are part of it, weights are not). Losses that differ by more than 1e-4 end the program with an
error.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from neo_components import NEO, InputSpec, PatchEmbedding, PostLLM, PreBuffer, Sample, pack
from neo_components.training.groups import train_only
from neo_components.types import IGNORED

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

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
    post.init_hw_from_t()
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


def peak() -> tuple[int, int]:
    """Peak and present size of this process in bytes (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    high, now = (int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
    return high, now


def run_side(side: str, stage: int, length: int, options: argparse.Namespace, pipe: Connection) -> None:
    """Answers every message with (loss, seconds, peak bytes) of one step."""
    torch.set_num_threads(options.threads)
    model = build(options)
    trainable = train_only(model, STAGES[stage])
    samples = [document(length // options.documents, model.input_spec, n) for n in range(options.documents)]
    batch = pack(samples, model.input_spec)

    def ours() -> Tensor:
        return model.loss(batch)

    compute = ours
    if side == "reference":
        from reference_neo import ReferenceNEO, images_of

        plain, images = ReferenceNEO(model), images_of(samples)
        trainable = [p for p in plain.parameters() if p.requires_grad]
        del model

        def theirs() -> Tensor:
            return plain.loss(batch, images)

        compute = theirs
    optimizer = torch.optim.AdamW(trainable, lr=1e-5)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = peak()[1]
    pipe.send("ready")
    clock = time.process_time if options.cpu_time else time.perf_counter
    while pipe.recv():
        began = clock()
        loss = compute()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pipe.send((loss.item(), clock() - began, peak()[0] - before))


def compare(stage: int, length: int, sides: list[str], options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Least seconds and peak bytes of each side.

    Raises:
        SystemExit: if the losses differ.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for side in sides:
        pipes[side], there = spawn.Pipe()
        processes.append(spawn.Process(target=run_side, args=(side, stage, length, options, there), daemon=True))
        processes[-1].start()
        there.close()
        pipes[side].recv()
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
    for _ in range(options.repeat):
        for side in sides:
            pipes[side].send(True)
            found[side].append(pipes[side].recv())
    for side, process in zip(sides, processes, strict=True):
        pipes[side].send(False)
        process.join()
    losses = [[step[0] for step in found[side]] for side in sides]
    if any(abs(a - b) > 1e-4 for step in zip(*losses, strict=True) for a in step for b in step):
        sys.exit(f"stage {stage}, {length} tokens: the losses differ: {dict(zip(sides, losses, strict=True))}")
    return {side: (min(s[1] for s in steps), max(s[2] for s in steps)) for side, steps in found.items()}


def reference_bytes(length: int, options: argparse.Namespace) -> int:
    """What the textbook keeps for the backward pass: scores before and after the softmax, and the logits."""
    return 4 * length * (length * options.heads * (options.pre + options.post) * 2 + 3 * options.vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens of a row")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3], choices=[1, 3])
    parser.add_argument("--documents", type=int, default=0, help="per row (default: one for each 256 tokens)")
    for name, value in (("hidden", 512), ("heads", 8), ("pre", 4), ("post", 8), ("vocabulary", 32768)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="seconds of CPU, for a machine that is not idle")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory", type=float, default=12.0, help="GiB that the reference may take; beyond, left out")
    options = parser.parse_args()
    print(
        f"device: {platform.machine()} CPU, {options.threads} threads, torch {torch.__version__}, float32; hidden "
        f"{options.hidden}, {options.pre}+{options.post} blocks, vocabulary {options.vocabulary}; "
        f"{'seconds of CPU' if options.cpu_time else 'wall time'}, least of {options.repeat}"
    )
    print(f"{'stage':>5s} {'tokens':>7s} {'s':>8s} {'ms/token':>9s} {'MiB':>8s} {'ref. s':>8s} {'ref. MiB':>9s} "
          f"{'faster':>7s} {'memory':>7s}")  # fmt: skip
    documents = options.documents
    for stage in options.stages:
        for length in options.lengths:
            options.documents = documents or length // 256
            fits = reference_bytes(length, options) < options.memory * 2**30
            found = compare(stage, length, list(SIDES) if fits else [SIDES[0]], options)
            seconds, memory = found[SIDES[0]]
            line = f"{stage:5d} {length:7d} {seconds:8.2f} {1e3 * seconds / length:9.3f} {memory / 2**20:8.0f}"
            if fits:
                slow, large = found[SIDES[1]]
                line += f" {slow:8.2f} {large / 2**20:9.0f} {slow / seconds:6.2f}x {memory / large:6.2f}x"
            else:
                line += f"   left out: it keeps about {reference_bytes(length, options) / 2**30:.0f} GiB"
            print(line, flush=True)


if __name__ == "__main__":
    main()

"""Decoding speed: tokens per second, and its share of what the memory's bandwidth allows.

    python benchmarks/decode.py
    python benchmarks/decode.py --device cuda --dtype bfloat16 --hidden 2048 --heads 16 --pre 12 --post 28 \\
        --vocabulary 151936 --prompt 1024 --new 256      # the 2.2B shape, which is the default on CUDA

A step must read all weights that a token passes and the cache of every document, once. The bound is the bandwidth over
these bytes: of the weights of blocks, final norm and head, and of the keys and values so far (not of the cache's full
room). ``--bandwidth`` states it in GB/s (10^9 bytes); on CUDA it is that of one H100 SXM if not given, on CPU it is
measured by a copy of memory.

The prompts are read first, which is not part of the time; the first steps (compilation, capture) are not either but are
given as ``ready s``. Ways to take a step: ``plain`` launches every kernel, ``graph`` replays them as a CUDA graph,
``compiled`` compiles them, and on CUDA replays them too. All must give the same tokens in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer, Sample, pack
from neo_components.model.decoding import Choice, Decoder
from neo_components.model.fixed_steps import prepared_step
from neo_components.model.generation import later_positions, start

WARM = 4
"""Steps before the clock starts: one that compiles, one that is checked, one that is captured, one more."""
SHAPES = {
    "cpu": {"hidden": 512, "heads": 8, "pre": 4, "post": 8, "vocabulary": 32768, "prompt": 256, "new": 32},
    "cuda": {"hidden": 2048, "heads": 16, "pre": 12, "post": 28, "vocabulary": 151936, "prompt": 1024, "new": 256},
    "tiny": {"hidden": 64, "heads": 2, "pre": 1, "post": 1, "vocabulary": 100, "prompt": 16, "new": 12},
}


@dataclass
class Row:
    """One measured line.

    Attributes:
        way: how steps were taken.
        batch: documents.
        tokens_per_second: of all documents together.
        ready_seconds: until steps ran at full speed.
        step_bytes: what a step must read.
        bytes_per_token: the same for each token.
        bound: tokens per second that the bandwidth allows.
        bound_share: the share of it.
        same_tokens: of all that were made, the share that equals those of the first way.
    """

    way: str
    batch: int
    tokens_per_second: float
    ready_seconds: float
    step_bytes: float
    bytes_per_token: float
    bound: float
    bound_share: float
    same_tokens: float


def build(options: argparse.Namespace) -> NEO:
    """A model of random weights, made on its device in its type."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with torch.device(options.device):
            sizes = {
                "hidden_size": options.hidden, "num_heads": options.heads, "num_kv_heads": options.heads // 2,
                "head_width": options.hidden // options.heads, "feed_forward_size": 3 * options.hidden,
            }  # fmt: skip
            post = PostLLM(vocab_size=options.vocabulary, depth=options.post, tie_embeddings=True, **sizes)
            model = NEO(PatchEmbedding(options.hidden), PreBuffer(depth=options.pre, **sizes), post)
    finally:
        torch.set_default_dtype(before)
    return model.to(options.device).eval()


def weight_bytes(model: NEO) -> int:
    """Of all weights that a new token passes."""
    parts: list[nn.Module] = [model.pre_buffer.layers, model.post_llm.layers, model.post_llm.norm]
    tensors = [parameter for part in parts for parameter in part.parameters()] + [model.post_llm.head_weight]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def cache_bytes(decoder: Decoder, tokens: float) -> float:
    """Of the keys and values of ``tokens`` tokens of every document."""
    kept = [tensor for layer in decoder.cache.layers for tensor in (layer.k, layer.v)]
    return tokens * sum(x.shape[0] * x.shape[1] * x.shape[3] * x.element_size() for x in kept)


def clock(device: str) -> float:
    """Seconds; on CUDA after all work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def copy_bandwidth() -> float:
    """Bytes per second of reading and writing memory on CPU, the best of five copies of 256 MB."""
    source = torch.ones(64 * 10**6)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - began)
    return 2 * source.numel() * source.element_size() / min(seconds[1:])


@torch.no_grad()
def measure(model: NEO, way: str, options: argparse.Namespace, expected: Tensor | None) -> tuple[Row, Tensor]:
    """One way to take steps; the row and the tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.input_spec.image_token_id - 3, (options.batch, options.prompt), generator=generator)
    prompts = pack([Sample(row) for row in ids], model.input_spec).to(options.device)
    later = later_positions(model, prompts, options.new)
    decoder = start(model, prompts, later, Choice(), (), fixed=way != "plain")
    steps = options.new - 1 - WARM
    with prepared_step(decoder, way != "plain", way == "compiled") as step:
        began = clock(options.device)
        for _ in range(WARM):
            step()
        ready = clock(options.device)
        for _ in range(steps):
            step()
        seconds = clock(options.device) - ready
    tokens = decoder.tokens[:, : options.new].cpu()
    read = weight_bytes(model) + cache_bytes(decoder, options.prompt + WARM + (steps + 1) / 2)
    rate, bound = options.batch * steps / seconds, options.batch * options.bandwidth * 1e9 / read
    same = 1.0 if expected is None else float((tokens == expected).float().mean())
    return Row(way, options.batch, rate, ready - began, read, read / options.batch, bound, rate / bound, same), tokens


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; sizes that are not given are those of :data:`SHAPES`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    for name in SHAPES["cpu"]:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="documents that are continued together")
    parser.add_argument(
        "--ways", nargs="+", choices=["compiled", "graph", "plain"],
        help="how steps are taken (default: plain on CPU, all on CUDA)",
    )  # fmt: skip
    parser.add_argument("--bandwidth", type=float, help="GB/s (default: 3350 on CUDA; on CPU a copy is measured)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="a model of no use, to rehearse the program")
    parser.add_argument("--output", type=Path, help="folder for decode.json")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    for name, value in SHAPES["tiny" if options.tiny else options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.new < WARM + 3:
        parser.error(f"--new must be at least {WARM + 3}, got {options.new}: {WARM} steps come before the clock starts")
    options.ways = options.ways or (["compiled", "graph", "plain"] if options.device == "cuda" else ["plain"])
    if "graph" in options.ways and options.device == "cpu":
        parser.error("--ways graph: a CUDA graph needs --device cuda")
    options.measured_bandwidth = options.bandwidth is None and options.device == "cpu"
    torch.set_num_threads(options.threads)
    if options.bandwidth is None:
        options.bandwidth = copy_bandwidth() / 1e9 if options.device == "cpu" else 3350.0
    return options


def main() -> None:
    options = options_of()
    model = build(options)
    cpu = f"{platform.machine()} CPU, {options.threads} threads"
    device = torch.cuda.get_device_name() if options.device == "cuda" else cpu
    found = {"device": device, "torch": torch.__version__, "dtype": options.dtype, "bandwidth_gb_s": options.bandwidth}
    found |= {name: getattr(options, name) for name in SHAPES["cpu"]}
    found |= {"parameters": sum(parameter.numel() for parameter in model.parameters()), "rows": []}
    print(
        f"device: {device}, torch {torch.__version__}, {options.dtype}, {options.bandwidth:.1f} GB/s"
        f"{' (measured)' if options.measured_bandwidth else ''}; {found['parameters'] / 1e9:.2f}B parameters, hidden "
        f"{options.hidden}, {options.pre}+{options.post} blocks, vocabulary {options.vocabulary}, "
        f"{options.prompt} tokens each, {options.new} new"
    )
    print(f"{'way':>9s} {'batch':>6s} {'tokens/s':>9s} {'MB/token':>9s} {'bound':>9s} {'share':>6s} {'ready s':>8s} "
          f"{'same':>5s}")  # fmt: skip
    for batch in options.batch:
        options_here = argparse.Namespace(**{**vars(options), "batch": batch})
        expected = None
        for way in options.ways:
            row, tokens = measure(model, way, options_here, expected)
            expected = tokens if expected is None else expected
            found["rows"].append(asdict(row))
            print(
                f"{way:>9s} {batch:6d} {row.tokens_per_second:9.1f} {row.bytes_per_token / 1e6:9.1f} {row.bound:9.1f} "
                f"{row.bound_share:6.3f} {row.ready_seconds:8.1f} {row.same_tokens:5.3f}",
                flush=True,
            )
            if options.output is not None:
                options.output.mkdir(parents=True, exist_ok=True)
                (options.output / "decode.json").write_text(json.dumps(found, indent=1) + "\n")
            if options.dtype == "float32" and row.same_tokens < 1.0:
                sys.exit(f"batch {batch}: {way} and {options.ways[0]} gave other tokens")


if __name__ == "__main__":
    main()

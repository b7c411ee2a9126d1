"""The loss curve of FP8 linear layers beside bfloat16, and beside float32 for scale.

    python benchmarks/fp8_loss.py --output fp8.json             # emulated: any device, the same rounding, slow
    python benchmarks/fp8_loss.py --fp8 linears --output fp8.json   # on a GPU of compute capability 8.9 or more

Three equal models see the same documents: counting sequences, each behind an image whose brightness is the step. Needs
torchao.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer, Sample, pack
from neo_components.recipe.stage import StageConfig
from neo_components.training.fp8 import use_fp8
from neo_components.training.groups import train_only
from neo_components.training.optimizers import build_optimizer
from neo_components.types import Batch

VOCABULARY = 512


def build(hidden: int, depth: int, device: str) -> NEO:
    """A small model, the same each time."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": hidden, "num_heads": hidden // 32, "num_kv_heads": hidden // 64, "head_width": 32,
        "feed_forward_size": 3 * hidden,
    }  # fmt: skip
    embedding = PatchEmbedding(hidden, width=64, patch_size=8)
    return NEO(embedding, PreBuffer(depth // 2, **sizes), PostLLM(VOCABULARY, depth, **sizes)).to(device)


def document(model: NEO, generator: torch.Generator) -> Sample:
    """An image, and a sequence that counts by its brightness."""
    spec = model.input_spec
    first, step = torch.randint(1, 480, (2,), generator=generator).tolist()
    step = step % 16 + 1
    image = torch.full((spec.channels, 2 * spec.factor, 2 * spec.factor), step / 8 - 1)
    image += 0.1 * torch.randn(image.shape, generator=generator)
    words = (first + step * torch.arange(24)) % 480
    before = [spec.image_start_id, *[spec.image_token_id] * 4, spec.image_end_id]
    labels = torch.cat([torch.full((len(before) + 1,), -100), words[1:]])
    return Sample(torch.cat([torch.tensor(before), words]), labels, [image])


def batches(model: NEO, steps: int, documents: int) -> list[Batch]:
    """The same documents for every model."""
    generator = torch.Generator().manual_seed(1)
    return [
        pack([document(model, generator) for _ in range(documents)], model.input_spec, loss_reduction="token")
        for _ in range(steps)
    ]


def losses(way: str, a: argparse.Namespace) -> list[float]:
    """The training loss of each step.

    Args:
        way: ``float32``, ``bfloat16`` (autocast) or ``float8`` (autocast, and ``stage.fp8`` as ``fp8`` says).
        a: the command's arguments.
    """
    model = build(a.hidden, a.depth, a.device)
    stage = StageConfig(train=("all",), steps=a.steps, lr=a.lr, fp8=a.fp8 if way == "float8" else "none")
    train_only(model, ["all"])
    converted = use_fp8(model, stage)
    optimizer = build_optimizer(model, stage)
    found, began = [], time.monotonic()
    for batch in batches(model, a.steps, a.documents):
        optimizer.zero_grad()
        with torch.autocast(a.device, torch.bfloat16, enabled=way != "float32"):
            loss = model.loss(batch.to(a.device))
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    print(f"{way}: {converted} layers in FP8, {time.monotonic() - began:.0f} s, last losses {found[-3:]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fp8", choices=("emulated", "linears"), default="emulated")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--documents", type=int, default=8, help="of 30 tokens, per step")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON with every loss")
    a = parser.parse_args()
    name = torch.cuda.get_device_name() if a.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    curves = {way: losses(way, a) for way in ("float32", "bfloat16", "float8")}
    print(
        f"\n{name}, torch {torch.__version__}, FP8 {a.fp8}\n\n| step | " + " | ".join(curves) + " |\n|---|---|---|---|"
    )
    for step in sorted({*range(0, a.steps, max(1, a.steps // 10)), a.steps - 1}):
        print(f"| {step + 1} | " + " | ".join(f"{curve[step]:.4f}" for curve in curves.values()) + " |")
    if a.output:
        a.output.write_text(json.dumps({"device": name, "torch": torch.__version__, "fp8": a.fp8, "losses": curves}))


if __name__ == "__main__":
    main()

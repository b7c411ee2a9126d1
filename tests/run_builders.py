"""A small world for runs of a recipe: a language model, shards of coloured squares, recipe files."""

from __future__ import annotations

import io
import random
from pathlib import Path

import lightning
from PIL import Image, ImageDraw

from neo_components import NEO, load_recipe
from neo_components.data import write_shards
from neo_components.quickstart.text_llm import train_text_llm
from neo_components.recipe import build

COLORS = ("red", "blue", "green", "black")


def picture(color: str, seed: int) -> bytes:
    image = Image.new("RGB", (64, 64), "white")
    x, y = random.Random(seed).sample(range(4, 36), 2)
    ImageDraw.Draw(image).rectangle((x, y, x + 20, y + 20), fill=color)
    data = io.BytesIO()
    image.save(data, "png")
    return data.getvalue()


def small_world(root: Path) -> Path:
    """A text-only language model and shards of coloured squares."""
    text = [
        [{"from": "human", "value": "what color?"}, {"from": "gpt", "value": color}]
        for color in COLORS
        for _ in range(8)
    ]
    train_text_llm(text, root / "llm", hidden_size=32, depth=2, heads=2, kv_heads=1, head_width=16, feed_forward=48,
                   vocab_size=300, steps=5, title=None)  # fmt: skip
    for name, count, shown in (("train", 48, True), ("text", 16, False), ("validation", 8, True)):
        samples = [
            {
                "key": f"{name}{n:03d}",
                "conversations": [
                    {"from": "human", "value": "<image>\n" * shown + "what color?"},
                    {"from": "gpt", "value": COLORS[n % 4]},
                ],
                "images": [picture(COLORS[n % 4], n)] * shown,
                "kind": "color",
            }
            for n in range(count)
        ]
        write_shards(samples, root / name)
    return root


MUON = ", optimizer: muon, muon_lr: 0.01"


def recipe_file(root: Path, name: str, model: str, stage: str) -> Path:
    path = root / f"{name}.yaml"
    path.write_text(
        f"""
seed: 3
output: {root}/{name}
model: {model}
stage: {{steps: 6, validate_every: 3, checkpoint_every: 3, log_every: 1, predictions: 4, {stage}}}
data:
  tokenizer: {root}/llm
  train: [{{shards: {root}/train, weight: 0.7}}, {{shards: {root}/text, weight: 0.3}}]
  validation: [{{shards: {root}/validation}}]
  seq_len: 256
  min_pixels: 4096
  max_pixels: 4096
  workers: 0
trainer: {{accelerator: cpu}}
"""
    )
    return path


def pretraining(
    root: Path, name: str, train: str = "[patch_embedding, pre_buffer, post_llm.hw]", more: str = ", lr: 1.0e-3"
) -> Path:
    model = f"{{patch_embedding: {{width: 16}}, pre_buffer: {{depth: 1}}, post_llm: {{from_pretrained: {root}/llm}}}}"
    return recipe_file(root, name, model, f"name: {name}, train: {train}{more}")


def started(path: Path) -> NEO:
    """The model that a recipe starts from, with the same random weights as in the run."""
    recipe = load_recipe(path)
    lightning.seed_everything(recipe.seed, workers=True, verbose=False)
    return build(recipe.model)

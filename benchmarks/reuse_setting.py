"""What the arms of benchmarks/reuse.py are trained with: language models, images, schedules.

Each kind of language model has its own recipe and schedule; all arms of a language model share them.

- ``small``: the quickstart's second language model (Qwen3 of width 192), trained in a minute on the texts of all tasks,
  never on an image. Its vocabulary, a BPE of 2,048 tokens, is that of the tasks. Trained with Muon.
- ``smollm2``, ``gemma``: real language models, by folder, with adapters, trained with AdamW (recipe reuse/real_llm).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import reuse_tasks

from neo_components.data.shards.folder import read_shards
from neo_components.quickstart.text_llm import train_text_llm

PIXELS = 128**2
"""Of every image: 4 x 4 visual tokens."""
SMALL = "small"
LLMS = (SMALL, "smollm2", "gemma")
SIZES: dict[str, Any] = {
    "hidden_size": 192, "heads": 6, "kv_heads": 3, "feed_forward": 512, "vocab_size": 2048,
}  # fmt: skip
RECIPES = {SMALL: "quickstart/attach", "smollm2": "reuse/real_llm", "gemma": "reuse/real_llm"}
STEPS = {SMALL: 100, "smollm2": 60, "gemma": 60}
"""Of an arm."""
LONGER = 2
"""Times as long arms of new weights train that set a goal."""
COMMON = [
    "stage.min_lr_ratio=1.0", "stage.warmup_steps=10", "stage.checkpoint_every=0", "stage.predictions=0",
    "data.workers=0", "data.seq_len=1024", "trainer.limit_val_batches=4",
]  # fmt: skip
"""The rate is constant after the warm-up, so that arms of other lengths have the same curve as far as they go."""
SCHEDULES = {
    SMALL: ["stage.optimizer=muon", "stage.lr=1.0e-3", "stage.muon_lr=0.01"],
    "smollm2": [],
    "gemma": [],
}
"""What else an arm changes in the recipe."""
TRAIN = {
    SMALL: {"tuned": "[all]", "frozen": "[bridge, post_llm]"},
    "smollm2": {"tuned": "[patch_embedding, pre_buffer, bridge, post_llm.hw]", "frozen": "[bridge, post_llm.hw]"},
    "gemma": {"tuned": "[patch_embedding, pre_buffer, bridge, post_llm.hw]", "frozen": "[bridge, post_llm.hw]"},
}
"""What trains; of the blocks of real language models adapters too (LoRA)."""


def make_small(root: Path, steps: int = 200) -> Path:
    """Trains the small language model, if it is not there yet.

    Args:
        root: folder of the benchmark, with its tasks.
        steps: of 2,048 tokens.

    Returns:
        Its folder.
    """
    folder = root / "llm_small"
    if not folder.exists():
        part = folder.with_name("llm_small.part")
        train_text_llm(texts(root), part, steps=steps, seed=1, title="small language model", **SIZES)
        part.rename(folder)
    return folder


def texts(root: Path) -> list[list[dict[str, str]]]:
    """The conversations of all tasks' training pairs, without their pictures: whole, and each pair alone."""
    found = []
    for task in reuse_tasks.TASKS:
        for sample in read_shards(reuse_tasks.train_folder(root, task)):
            pairs = reuse_tasks.pairs_of(sample)
            for some in [pairs, *([pair] for pair in pairs)]:
                found.append([
                    {"from": role, "value": value}
                    for pair in some
                    for role, value in zip(("human", "gpt"), pair, strict=True)
                ])  # fmt: skip
    return found

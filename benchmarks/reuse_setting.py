"""What benchmarks/reuse.py compares on: two tasks, three small language models, and pre-Buffers trained on the first.

Everything is made once, in a folder, and kept: a second call reuses it.

- Tasks: ``easy_vqa`` (one shape; which, which color, yes/no), and ``scenes`` (``neo data synth``: several shapes;
  position, relation, nearest, count).
- Language models, all trained on the questions and captions of both tasks, never on an image: ``a``, Qwen3; ``b``,
  Qwen3 of another width; ``c``, Llama of a third width and head width with a tokenizer of the other kind.
- Sources: pre-Buffers for each task and seed, trained with ``a`` in the three stages of the quickstart, and exported
  after each (the paper's PB1, PB2, PB3). One more, ``captions``, is trained on the captions of the scenes alone, for
  the same number of steps in the first stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from neo_components.components.pre_buffer import AssetInfo
from neo_components.data import write_shards
from neo_components.data.convert.synth import scenes
from neo_components.model.attach import export_pre_buffer, provenance_of
from neo_components.model.chat import Chat
from neo_components.quickstart.easy_vqa import split_images, text_conversations, write_easy_vqa
from neo_components.quickstart.text_llm import train_text_llm
from neo_components.recipe import load_recipe
from neo_components.training.run import train

TASKS = ("easy_vqa", "scenes")
PIXELS = 96**2
"""Of every image: 3 x 3 visual tokens."""
HELD_OUT = 400
SCENES = {"questions": 24_000, "captions": 12_000}
LLMS: dict[str, dict[str, Any]] = {
    "a": {"hidden_size": 96, "heads": 3, "kv_heads": 3, "feed_forward": 288, "vocab_size": 420},
    "b": {"hidden_size": 128, "heads": 4, "kv_heads": 2, "feed_forward": 384, "vocab_size": 420},
    "c": {
        "hidden_size": 144, "heads": 3, "kv_heads": 3, "head_width": 48, "feed_forward": 400, "vocab_size": 500,
        "family": "llama", "pieces": "spaces",
    },
}  # fmt: skip
STAGES = ("pretrain", "midtrain", "sft")
STEPS = {"easy_vqa": (250, 150, 400), "scenes": (800, 400, 1200), "captions": (2400,)}
"""Of the stages of each source."""


def shards(root: Path, task: str) -> tuple[Path, Path]:
    """Training and validation data of a task."""
    return root / task / "train_all", root / task / "validation"


def make(
    root: Path,
    sources: Iterable[tuple[str, int]],
    steps: dict[str, tuple[int, ...]] = STEPS,
    llm_steps: int = 400,
) -> None:
    """Makes what is not there yet.

    Args:
        root: folder of all of it.
        sources: (name, seed) of those that are wanted.
        steps: of the stages of each.
        llm_steps: of each language model.
    """
    if not (root / "easy_vqa").exists():
        write_easy_vqa(root / "easy_vqa", validation_images=HELD_OUT)
    if not (root / "scenes").exists():
        _write_scenes(root / "scenes")
    texts = text_conversations(split_images(HELD_OUT, 0)[0]) + list(_scene_texts())
    for seed, (name, sizes) in enumerate(LLMS.items()):
        if not (root / f"llm_{name}").exists():
            train_text_llm(texts, root / f"llm_{name}", steps=llm_steps, seed=seed, title=f"LLM {name}", **sizes)
    for source, seed in sources:
        _make_source(root, source, seed, steps[source])


def asset(root: Path, source: str, seed: int, stage: int | None = None) -> Path:
    """The pre-Buffer of a source after a stage (1 to 3), by default its last."""
    return root / f"source_{source}_{seed}" / f"pb{stage or len(STEPS[source])}"


def _write_scenes(folder: Path) -> None:
    """Questions and captions to train on, half captions in ``train_all``; validation has questions only."""
    asked = list(scenes(SCENES["questions"], seed=0))
    captions = list(scenes(SCENES["captions"], seed=1, captions=True))
    write_shards(captions, folder / "train_open")
    write_shards(asked, folder / "train_all")
    write_shards(scenes(1600, seed=2), folder / "validation")
    texts = [_blind(sample) for sample in [*asked[:6000], *captions[:2000]]]
    write_shards(texts, folder / "train_text")


def _blind(sample: dict[str, Any]) -> dict[str, Any]:
    first, *rest = sample["conversations"]
    turns = [first | {"value": first["value"].removeprefix("<image>\n")}, *rest]
    return sample | {"conversations": turns, "images": []}


def _scene_texts() -> Iterator[list[dict[str, str]]]:
    for captions in (False, True):
        for sample in scenes(6000, seed=3, captions=captions):
            yield _blind(sample)["conversations"]


def _make_source(root: Path, source: str, seed: int, steps: tuple[int, ...]) -> None:
    """Pre-training on captions (of easy-VQA: open questions) and text, then mid-training and SFT on all questions."""
    task = "scenes" if source == "captions" else source
    for number, (stage, count) in enumerate(zip(STAGES, steps, strict=False), 1):
        if asset(root, source, seed, number).exists():
            continue
        output = asset(root, source, seed).parent / stage
        before = asset(root, source, seed).parent / STAGES[number - 2] / "neo"
        model = [f"model.from_pretrained={before}"]
        if number == 1:
            model = [f"model.post_llm.from_pretrained={root / 'llm_a'}", "model.pre_buffer.depth=2"]
            model += ["model.pre_buffer.init_std=0.1", "model.patch_embedding.width=192"]
        data_of = {
            "pretrain": ("train_open", "train_text"),
            "midtrain": ("train_all", "train_open"),
            "sft": ("train_all",),
        }
        weights = (0.7, 0.3) if len(data_of[stage]) == 2 else (1.0,)
        data = [
            f"{{shards: {root / task / name}, weight: {weight}}}"
            for name, weight in zip(data_of[stage], weights, strict=True)
        ]
        recipe = load_recipe(f"quickstart/{stage}", [
            f"seed={seed}", f"variables.root={root}", f"output={output}", *model, *common(root, "a", task),
            "data.text_validation=[]", f"stage.steps={count}", f"stage.validate_every={count}",
            f"stage.checkpoint_every={count}",
            f"data.train=[{', '.join(data)}]",
        ])  # fmt: skip
        result = train(recipe)
        info = AssetInfo(Chat.from_pretrained(result.folder).image_config(), provenance_of(result.folder))
        export_pre_buffer(result.model, asset(root, source, seed, number), root / "llm_a", info=info)
        metrics = {name: round(value, 3) for name, value in result.metrics.items() if name.startswith("val/")}
        print(f"source {source}, seed {seed}, after {stage}: {metrics}", flush=True)


def common(root: Path, llm: str, task: str) -> list[str]:
    """Overrides of every recipe here: images, packed sequences and tokenizer."""
    return [
        f"data.tokenizer={root / f'llm_{llm}'}", f"data.validation=[{{shards: {shards(root, task)[1]}}}]",
        f"data.min_pixels={PIXELS}", f"data.max_pixels={PIXELS}", "data.seq_len=2048", "data.workers=0",
        "trainer.limit_val_batches=4",
    ]  # fmt: skip

"""The quickstart: easy-VQA from shards to a report, with the shipped recipes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import typer

from neo_components.components.post_llm import PostLLM
from neo_components.components.pre_buffer import AssetInfo
from neo_components.data import load_tokenizer
from neo_components.devices import AUTO, describe, find_training_device, trainer_overrides, training_precision
from neo_components.evaluation import Question, Report, evaluate, questions_from_shards, without_images
from neo_components.model.attach import export_pre_buffer, provenance_of
from neo_components.model.chat import Chat
from neo_components.quickstart.easy_vqa import baselines, split_images, text_conversations, write_easy_vqa
from neo_components.quickstart.findings import Findings
from neo_components.quickstart.report import ask_more, draw_figures, write_report
from neo_components.quickstart.text_llm import train_text_llm
from neo_components.recipe import Recipe, load_recipe
from neo_components.training.callbacks.perplexity import language_model_alone
from neo_components.training.run import train

STAGES = ("pretrain", "midtrain", "sft")
VALIDATION_IMAGES = 400
LLM_STEPS = 250
ANSWER_TOKENS = 8
"""Maximum length of an answer; the longest correct one ("rectangle") has fewer tokens."""
MADE = ("shards", "llm", "llm_b", *STAGES, "neo", "pre_buffer", "attach", "attach_random", "figures")
"""Folders that a run creates."""
MARK = ".quickstart"
"""Name of a file that marks the folder of a quickstart."""
GPU_WORKERS = 8
"""Most data workers beside a GPU, which takes a step in less time than one worker needs to prepare it."""


def run(root: Path, scale: float = 1.0, seed: int = 0, device: str = AUTO, dtype: str = AUTO) -> Findings:
    """Runs the quickstart.

    Args:
        root: output folder.
        scale: fraction of the training steps and test questions, in (0, 1]; scores are meaningful at 1 only.
        seed: random seed.
        device: for all steps: ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` (``devices.find_training_device``).
        dtype: precision of the training: ``auto``, ``bfloat16`` (mixed) or ``float32``
            (``devices.training_precision``). Weights and evaluations are float32.

    Raises:
        ValueError: if ``scale`` is out of range, or the device is not there or does not train in that precision.
        FileExistsError: if the output folder has folders of the same names that are not from an earlier run.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale must be over 0 and at most 1, got {scale}")
    where = find_training_device(device)
    precision = training_precision(dtype, where)
    _clear(root)
    found = Findings(seed, scale, where, precision, baselines=baselines())
    typer.echo(f"device {describe(where)}, training precision {precision}, evaluation 32-true")
    with found.step("data", "write easy-VQA as shards"):
        write_easy_vqa(root / "shards", validation_images=VALIDATION_IMAGES, seed=seed)
    with found.step("llm", "train two small language models on text"):
        _train_llms(root, found)
    with found.step("training", "pre-training, mid-training, SFT"):
        for name in STAGES:
            found.stages[name] = train(_recipe(name, root, found))
        shutil.copytree(root / "sft" / "neo", root / "neo", dirs_exist_ok=True)
    with found.step("evaluation", "score the test split"):
        _evaluate(root, found)
    with found.step("reuse", "export the pre-Buffer and attach it to the second language model"):
        _reuse(root, found)
    with found.step("report", "write the report"):
        draw_figures(root / "figures", found, Chat.from_pretrained(root / "neo", device=where))
    write_report(root, found)
    typer.echo(f"report: {root / 'report.md'}\nask: {ask_more(root)}")
    return found


def _clear(root: Path) -> None:
    """Removes the folders of an earlier run, and nothing else."""
    there = [name for name in MADE if (root / name).exists()]
    if there and not (root / MARK).is_file():
        raise FileExistsError(
            f"{root} holds {', '.join(there)}, not made by an earlier quickstart, and nothing is overwritten; "
            "choose another folder with --output, or remove them"
        )
    for name in there:
        shutil.rmtree(root / name)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARK).touch()


def _train_llms(root: Path, found: Findings) -> None:
    """Two small models that replace pretrained LLMs; the second is wider and has another tokenizer."""
    conversations = text_conversations(split_images(VALIDATION_IMAGES, found.seed)[0], found.seed)
    steps = _scaled(LLM_STEPS, found.scale)
    options: dict[str, Any] = {"steps": steps, "device": found.device}
    train_text_llm(conversations, root / "llm", seed=found.seed, title="LLM", **options)
    train_text_llm(
        conversations, root / "llm_b", hidden_size=192, heads=6, kv_heads=3, feed_forward=512, vocab_size=330,
        seed=found.seed + 1, title="second LLM", **options,
    )  # fmt: skip


def _recipe(name: str, root: Path, found: Findings) -> Recipe:
    """A quickstart recipe with outputs in ``root``, scaled, on the run's device."""
    changes = [f"variables.root={root}", f"seed={found.seed}", f"trainer.precision={found.precision}"]
    changes += trainer_overrides(found.device)
    if found.device.type != "cpu":
        changes.append(f"data.workers={max(1, min(GPU_WORKERS, (os.cpu_count() or 1) - 1))}")
    recipe = load_recipe(f"quickstart/{name}", changes)
    if found.scale == 1:
        return recipe
    steps = _scaled(recipe.stage.steps, found.scale)
    changes += [
        f"stage.steps={steps}",
        f"stage.warmup_steps={min(recipe.stage.warmup_steps, steps)}",
        f"stage.validate_every={steps}",
        f"stage.checkpoint_every={steps}",
        f"stage.predictions={_scaled(recipe.stage.predictions, found.scale)}",
        "trainer.limit_val_batches=1",
    ]
    return load_recipe(f"quickstart/{name}", changes)


def _scaled(number: int, scale: float) -> int:
    return max(2, round(number * scale))


def _evaluate(root: Path, found: Findings) -> None:
    """Scores the model on the test split, also with shuffled images, and the language model without images."""
    questions = list(questions_from_shards(root / "shards" / "test"))
    if found.scale < 1:
        questions = questions[:: max(1, round(1 / found.scale))]
    found.questions = questions
    chat = Chat.from_pretrained(root / "neo", device=found.device)
    found.reports["neo"] = _ask(chat, questions, "test split")
    found.reports["shuffled"] = _ask(chat, questions, "shuffled images", shuffle_images_seed=found.seed)
    blind = text_only(root / "llm").to(found.device)
    found.reports["blind"] = _ask(blind, without_images(questions), "text-only LLM")


def _ask(chat: Chat, questions: list[Question], title: str, **options: Any) -> Report:
    limits: dict[str, Any] = {"min_pixels": chat.min_pixels, "max_pixels": chat.max_pixels}
    with torch.inference_mode():
        return evaluate(
            chat.model, chat.tokenizer, questions, max_new_tokens=ANSWER_TOKENS, progress=title, **limits, **options
        )


def text_only(folder: Path) -> Chat:
    """The language model alone, as a NEO with an empty pre-Buffer, for text only."""
    return Chat(language_model_alone(PostLLM.from_pretrained(folder)), load_tokenizer(str(folder)))


def _reuse(root: Path, found: Findings) -> None:
    """Exports the pre-Buffer, attaches it to the second LLM, and compares it with a random pre-Buffer."""
    folder = root / "neo"
    chat = Chat.from_pretrained(folder, device=found.device)
    info = AssetInfo(chat.image_config(), provenance_of(folder))
    export_pre_buffer(chat.model, root / "pre_buffer", folder, info=info)
    for arm, name in (("reused", "attach"), ("random", "attach_random")):
        result = train(_recipe(name, root, found))
        chat = Chat.from_pretrained(result.folder, device=found.device)
        found.reports[arm] = _ask(chat, found.questions, f"test split, {arm}")

"""The quickstart's report: ``report.json`` for programs, ``report.md`` with figures for readers."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from neo_components.components.masks import dense_mask
from neo_components.data.packing import pack
from neo_components.devices import describe
from neo_components.evaluation import Question, Report
from neo_components.model.chat import Chat
from neo_components.quickstart.easy_vqa import KINDS
from neo_components.quickstart.findings import Findings
from neo_components.quickstart.versions import versions
from neo_components.storage.weights import read_json, write_text
from neo_components.types import NO_IMAGE, Sample
from neo_components.viewers import draw_answers, draw_attention, draw_curves, draw_mask

COLUMNS = ("overall", *KINDS)
PUBLISHED = 0.938
"""Test accuracy of the model of easy-VQA's author (victorzhou.com, easy-VQA)."""
GROUNDED = 25
"""If shuffled images cost at least this many points of accuracy, the report states that the model uses the image."""


def write_report(root: Path, found: Findings) -> Path:
    """Writes ``report.json`` and ``report.md``, which shows the figures of :func:`draw_figures`.

    Args:
        root: output folder of the quickstart.
        found: results of the steps.

    Returns:
        ``report.md``.
    """
    results = results_of(found)
    write_text(root / "report.json", json.dumps(results, indent=2) + "\n")
    write_text(root / "report.md", _text(results, found, root))
    return root / "report.md"


def ask_more(root: Path) -> str:
    """The command that asks the trained model."""
    return f'neo chat {shlex.quote(str(root / "neo"))} --image X.png "what color is the shape?"'


def results_of(found: Findings) -> dict[str, Any]:
    """The contents of ``report.json``; accuracies are fractions."""
    minutes = {name: round(value, 2) for name, value in found.minutes.items()}
    return {
        "accuracy": _scores(found.reports["neo"]),
        "accuracy_blind": _scores(found.reports["blind"]),
        "accuracy_shuffled": _scores(found.reports["shuffled"]),
        "accuracy_majority": round(found.baselines["majority"], 4),
        "accuracy_lookup": round(found.baselines["lookup"], 4),
        "reuse": {arm: round(found.reports[arm].accuracy["overall"], 4) for arm in ("reused", "random")},
        "questions": found.reports["neo"].counts,
        "validation": [
            {"stage": name, "step": step, "minutes": round(seconds / 60, 2), "accuracy": round(score, 4)}
            for name, step, seconds, score in validation_curve(found)
        ],
        "minutes": {"total": round(sum(found.minutes.values()), 2), **minutes},
        "device": describe(found.device),
        "precision": found.precision,
        "versions": versions(),
        "seed": found.seed,
        "scale": found.scale,
    }


def _scores(report: Report) -> dict[str, float]:
    return {kind: round(report.accuracy[kind], 4) for kind in COLUMNS if kind in report.accuracy}


def validation_curve(found: Findings) -> list[tuple[str, int, float, float]]:
    """(stage, step, seconds of training so far, exact match) of each validation of the three stages."""
    curve, before = [], 0.0
    for name, run in found.stages.items():
        curve += [(name, step, before + seconds, score) for step, seconds, score in run.scores]
        before += run.seconds
    return curve


def draw_figures(folder: Path, found: Findings, chat: Chat) -> None:
    """Draws losses, accuracy, eight answers, an attention map and the mask.

    Args:
        folder: created if needed.
        found: results of the steps.
        chat: the trained model.
    """
    folder.mkdir(exist_ok=True)
    losses, before = {}, 0
    for name, run in found.stages.items():
        losses[name] = ([before + step for step, _, _ in run.losses], [loss for _, _, loss in run.losses])
        before += run.losses[-1][0]
    draw_curves(losses, folder / "loss.png", "step", "training loss, nats per token", log=True)
    curve = validation_curve(found)
    accuracy = ([seconds / 60 for _, _, seconds, _ in curve], [score for *_, score in curve])
    draw_curves({"validation": accuracy}, folder / "accuracy.png", "minutes of training", "exact match")
    answers = found.reports["neo"].predictions
    shown = _eight(found.questions)
    rows = [
        (q.image, q.question, q.answers[0], answers[n].prediction, answers[n].right)
        for n, q in shown
        if q.image is not None
    ]
    draw_answers(rows, folder / "answers.png", "easy-VQA test images")
    question = shown[0][1]
    sample = chat.prompt(question.question, [question.image])
    weights = answer_attention(chat, sample)
    draw_attention(sample.images[0], weights, folder / "attention.png", question.question)
    _draw_mask(folder, chat, sample, chat.prompt(shown[1][1].question, [shown[1][1].image]))


def _eight(questions: list[Question]) -> list[tuple[int, Question]]:
    """Eight questions about different images, spread over the split and over kinds, with their indices."""
    chosen: list[tuple[int, Question]] = []
    used = set()
    step = max(1, len(questions) // 8)
    for number in range(8):
        wanted = KINDS[number % len(KINDS)]
        indices = [*range(number * step, len(questions)), *range(number * step)]
        free = [index for index in indices if questions[index].image not in used]
        index = next((i for i in free if questions[i].kind == wanted), free[0] if free else None)
        if index is not None:
            used.add(questions[index].image)
            chosen.append((index, questions[index]))
    return chosen


def answer_attention(chat: Chat, sample: Sample) -> torch.Tensor:
    """Attention from the last prompt token to each visual token: [rows, columns], mean over the heads of all post-LLM
    blocks."""
    model = chat.model
    batch = pack([sample], model.input_spec).to(model.post_llm.word_embedding.weight.device)
    maps = model.attention_maps(batch)[len(model.pre_buffer.layers) :]
    weights = torch.stack([layer[0, :, -1] for layer in maps]).mean((0, 1))
    factor = model.input_spec.factor
    _, height, width = sample.images[0].shape
    return weights[batch.image_ids[0] != NO_IMAGE].view(height // factor, width // factor).float()


def _draw_mask(folder: Path, chat: Chat, *samples: Sample) -> None:
    """The attention mask of a packed sequence of two questions."""
    batch = pack(samples, chat.model.input_spec)
    mask = dense_mask(
        batch.document_ids, batch.image_ids, *chat.model.post_llm.layer_rules[0], token_kinds=batch.token_kinds
    )[0]
    runs: list[tuple[str, int]] = []
    for document, image in zip(batch.document_ids[0].tolist(), batch.image_ids[0].tolist(), strict=True):
        label = f"text {document + 1}" if image == NO_IMAGE else f"image {image + 1}"
        count = runs.pop()[1] if runs and runs[-1][0] == label else 0
        runs.append((label, count + 1))
    draw_mask(mask, folder / "mask.png", runs, "Attention mask of two packed questions")


def _text(results: Mapping[str, Any], found: Findings, root: Path) -> str:
    """The text of ``report.md``."""
    names = ("accuracy", "accuracy_shuffled", "accuracy_blind")
    titles = ("this model", "this model, images shuffled", "text-only LLM (no images)")
    rows = [f"| {title} | {_cells(results[name])} |" for title, name in zip(titles, names, strict=True)]
    rows += [
        f"| most frequent answer to each question | {results['accuracy_lookup']:.3f} | | | |",
        f"| most frequent answer | {results['accuracy_majority']:.3f} | | | |",
        f"| model of the data set's author | {PUBLISHED:.3f} | | | |",
    ]
    reuse, minutes = results["reuse"], results["minutes"]
    fall = 100 * (results["accuracy"]["overall"] - results["accuracy_shuffled"]["overall"])
    grounded = ": the model uses the image" if fall >= GROUNDED else ""
    partial = "" if found.scale == 1 else f"**Trial run at scale {found.scale}: the scores are not meaningful.**\n\n"
    curve = [
        f"| {point['stage']} | {point['step']} | {point['minutes']:.1f} | {point['accuracy']:.3f} |"
        for point in results["validation"]
    ]
    steps = "\n".join(f"| {name} | {value:.1f} |" for name, value in minutes.items())
    return f"""# Quickstart report

{partial}easy-VQA, {results["questions"]["overall"]:,} test questions, answered by free generation, exact match.

| | overall | shape | color | yes/no |
|---|---|---|---|---|
{chr(10).join(rows)}

With the images shuffled among the questions, accuracy falls by {fall:.1f} points{grounded}.

![answers](figures/answers.png)

## Reuse of the pre-Buffer

The exported pre-Buffer, attached to a second language model of another width and tokenizer and tuned for
{_steps(root)} steps, answers {reuse["reused"]:.3f} of the test questions; the same model with a pre-Buffer of random
weights, the same data and the same steps, {reuse["random"]:.3f}.

## Training

Accuracy on {256 if found.scale == 1 else "some"} validation questions against minutes of training:

| stage | step | minutes | exact match |
|---|---|---|---|
{chr(10).join(curve)}

![accuracy](figures/accuracy.png)

![loss](figures/loss.png)

## Inside

Attention from the start of the answer to the image, and the attention mask of two packed questions.

![attention](figures/attention.png)

![mask](figures/mask.png)

## Minutes

| step | minutes |
|---|---|
{steps}

Device {results["device"]}, training precision {results["precision"]}.
Seed {results["seed"]}. {", ".join(f"{name} {value}" for name, value in results["versions"].items())}.

## Ask more

```
{ask_more(root)}
```
"""


def _cells(scores: Mapping[str, float]) -> str:
    return " | ".join(f"{scores[kind]:.3f}" if kind in scores else "" for kind in COLUMNS)


def _steps(root: Path) -> int:
    return int(read_json(root / "attach" / "neo" / "provenance.json")["stages"][-1]["steps"])

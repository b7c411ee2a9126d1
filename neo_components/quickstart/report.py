"""The quickstart's report: ``report.json`` for programs, ``report.md`` with pictures for people."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from neo_components.components.masks import dense_mask
from neo_components.data.packing import pack
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
"""Test accuracy that easy-VQA's author reports for his own model (victorzhou.com, easy-VQA)."""
LOOKS = 25
"""From so many points of accuracy lost with the wrong images on, the report says that the model looks."""


def write_report(root: Path, found: Findings) -> Path:
    """Writes ``report.json`` and ``report.md``, which shows the pictures of :func:`draw_figures`.

    Args:
        root: folder of the quickstart.
        found: what the steps found.

    Returns:
        ``report.md``.
    """
    figures = figures_of(found)
    write_text(root / "report.json", json.dumps(figures, indent=2) + "\n")
    write_text(root / "report.md", _text(figures, found, root))
    return root / "report.md"


def ask_more(root: Path) -> str:
    """The command that asks the trained model."""
    return f'neo chat {shlex.quote(str(root / "neo"))} --image X.png "what color is the shape?"'


def figures_of(found: Findings) -> dict[str, Any]:
    """The figures, as ``report.json`` holds them; accuracies are fractions."""
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
        "versions": versions(),
        "seed": found.seed,
        "scale": found.scale,
    }


def _scores(report: Report) -> dict[str, float]:
    return {kind: round(report.accuracy[kind], 4) for kind in COLUMNS if kind in report.accuracy}


def validation_curve(found: Findings) -> list[tuple[str, int, float, float]]:
    """(stage, step, seconds of training up to here, exact match) of each validation of the three stages."""
    curve, before = [], 0.0
    for name, run in found.stages.items():
        curve += [(name, step, before + seconds, score) for step, seconds, score in run.scores]
        before += run.seconds
    return curve


def draw_figures(folder: Path, found: Findings, chat: Chat) -> None:
    """Draws losses, accuracy, eight answers, an attention map and the mask.

    Args:
        folder: made if absent.
        found: what the steps found.
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
    rows: list[Any] = [(q.image, q.question, q.answers[0], answers[n].prediction, answers[n].right) for n, q in shown]
    draw_answers(rows, folder / "answers.png", "easy-VQA test images")
    question = shown[0][1]
    sample = chat.prompt(question.question, [question.image])
    weights = answer_attention(chat, sample)
    draw_attention(sample.images[0], weights, folder / "attention.png", question.question)
    _draw_mask(folder, chat, sample, chat.prompt(shown[1][1].question, [shown[1][1].image]))


def _eight(questions: list[Question]) -> list[tuple[int, Question]]:
    """Eight questions about different images, spread over the split, with their places; the kinds take turns."""
    chosen: list[tuple[int, Question]] = []
    seen: set[Any] = set()
    step = max(1, len(questions) // 8)
    for number in range(8):
        wanted = KINDS[number % len(KINDS)]
        places = [*range(number * step, len(questions)), *range(number * step)]
        free = [place for place in places if questions[place].image not in seen]
        place = next((p for p in free if questions[p].kind == wanted), free[0] if free else None)
        if place is not None:
            seen.add(questions[place].image)
            chosen.append((place, questions[place]))
    return chosen


def answer_attention(chat: Chat, sample: Sample) -> torch.Tensor:
    """Attention from the place where the answer begins to each visual token: [rows, columns], mean over the heads of
    all post-LLM blocks."""
    model = chat.model
    batch = pack([sample], model.input_spec)
    maps = model.attention_maps(batch)[len(model.pre_buffer.layers) :]
    weights = torch.stack([layer[0, :, -1] for layer in maps]).mean((0, 1))
    factor = model.input_spec.factor
    _, height, width = sample.images[0].shape
    return weights[batch.image_ids[0] != NO_IMAGE].view(height // factor, width // factor).float()


def _draw_mask(folder: Path, chat: Chat, *samples: Sample) -> None:
    """Who sees whom in a row of two packed questions."""
    batch = pack(samples, chat.model.input_spec)
    mask = dense_mask(batch.document_ids, batch.image_ids, chat.model.post_llm.rule)[0]
    runs: list[tuple[str, int]] = []
    for document, image in zip(batch.document_ids[0].tolist(), batch.image_ids[0].tolist(), strict=True):
        label = f"text {document + 1}" if image == NO_IMAGE else f"image {image + 1}"
        count = runs.pop()[1] if runs and runs[-1][0] == label else 0
        runs.append((label, count + 1))
    draw_mask(mask, folder / "mask.png", runs, "Who sees whom: two questions packed into one row")


def _text(figures: Mapping[str, Any], found: Findings, root: Path) -> str:
    """The report for people."""
    names = ("accuracy", "accuracy_shuffled", "accuracy_blind")
    titles = ("this model", "this model, images shuffled", "text-only LLM (blind)")
    rows = [f"| {title} | {_cells(figures[name])} |" for title, name in zip(titles, names, strict=True)]
    rows += [
        f"| best answer by question alone | {figures['accuracy_lookup']:.3f} | | | |",
        f"| majority answer | {figures['accuracy_majority']:.3f} | | | |",
        f"| the data set author's model | {PUBLISHED:.3f} | | | |",
    ]
    reuse, minutes = figures["reuse"], figures["minutes"]
    fall = 100 * (figures["accuracy"]["overall"] - figures["accuracy_shuffled"]["overall"])
    looks = ": the model looks" if fall >= LOOKS else ""
    partial = "" if found.scale == 1 else f"**Tried out at scale {found.scale}: the scores mean nothing.**\n\n"
    curve = [
        f"| {point['stage']} | {point['step']} | {point['minutes']:.1f} | {point['accuracy']:.3f} |"
        for point in figures["validation"]
    ]
    steps = "\n".join(f"| {name} | {value:.1f} |" for name, value in minutes.items())
    return f"""# Quickstart report

{partial}easy-VQA, {figures["questions"]["overall"]:,} test questions, answered by free generation, exact match.

| | overall | shape | color | yes/no |
|---|---|---|---|---|
{chr(10).join(rows)}

With the images shuffled among the questions, accuracy falls by {fall:.1f} points{looks}.

![answers](pictures/answers.png)

## Reuse of the pre-Buffer

The exported pre-Buffer, attached to a second language model of another width and tokenizer and tuned for
{_steps(root)} steps, answers {reuse["reused"]:.3f} of the test questions; the same model with a pre-Buffer of random
weights, the same data and the same steps, {reuse["random"]:.3f}.

## Training

Accuracy on {256 if found.scale == 1 else "some"} validation questions against minutes of training:

| stage | step | minutes | exact match |
|---|---|---|---|
{chr(10).join(curve)}

![accuracy](pictures/accuracy.png)

![loss](pictures/loss.png)

## Inside

Where the model looks as it begins its answer, and who sees whom in a packed row.

![attention](pictures/attention.png)

![mask](pictures/mask.png)

## Minutes

| step | minutes |
|---|---|
{steps}

Seed {figures["seed"]}. {", ".join(f"{name} {value}" for name, value in figures["versions"].items())}.

## Ask more

```
{ask_more(root)}
```
"""


def _cells(scores: Mapping[str, float]) -> str:
    return " | ".join(f"{scores[kind]:.3f}" if kind in scores else "" for kind in COLUMNS)


def _steps(root: Path) -> int:
    return int(read_json(root / "attach" / "neo" / "provenance.json")["stages"][-1]["steps"])

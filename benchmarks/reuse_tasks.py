"""The target tasks of benchmarks/reuse.py: training pairs and test questions on pictures that no source has seen.

A task is a folder with the shards ``train_100``, ``train_1000``, ``train_2000`` (question-answer pairs; a smaller one is
the beginning of a larger one) and ``test`` (300 questions, one in a sample), and ``card.json`` with its counts. Training
and test have no picture in common: pictures are told apart by their bytes.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from neo_components.data import write_shards
from neo_components.data.shards.folder import read_shards
from neo_components.data.text.turns import IMAGE_TAG
from neo_components.evaluation.questions import questions_from_shards
from neo_components.quickstart.easy_vqa import question_kind, read_easy_vqa

PAIRS = (100, 1000, 2000)
"""Question-answer pairs of the training sets."""
QUESTIONS = 300
"""Test questions of a task."""
PER_PICTURE = {"train": 3, "test": 2}
"""Most questions about one picture."""
HELD_OUT: dict[str, tuple[str, ...]] = {
    "icons": ("icons",),
    "fonts": ("lettering",),
    "scenes": ("scenes",),
    "charts": ("charts",),
}
"""Folders of ``held_out`` of the pretraining mix (``neo data pretrain-mix``) that each task comes from."""
TASKS = ("icons", "fonts", "scenes", "easy_vqa", "charts")
Sample = dict[str, Any]


def train_folder(root: Path, task: str, pairs: int = PAIRS[-1]) -> Path:
    """Shards of a task's training pairs."""
    return root / "tasks" / task / f"train_{pairs}"


def test_folder(root: Path, task: str) -> Path:
    """Shards of a task's test questions."""
    return root / "tasks" / task / "test"


def card_of(root: Path, task: str) -> dict[str, Any]:
    """Counts of a task: pictures, questions, kinds of questions, and ``blind``, the exact match without pictures."""
    found: dict[str, Any] = json.loads((root / "tasks" / task / "card.json").read_text(encoding="utf-8"))
    return found


def make_task(root: Path, task: str, mix: Path) -> None:
    """Makes a task that is not there yet.

    Args:
        root: folder of the benchmark.
        task: one of :data:`TASKS`.
        mix: folder that ``neo data pretrain-mix`` wrote.

    Raises:
        FileNotFoundError: if the mix holds nothing out for this task.
        ValueError: if there are too few pictures.
    """
    if (root / "tasks" / task / "card.json").exists():
        return
    samples = easy_vqa() if task == "easy_vqa" else held_out(mix, HELD_OUT[task])
    write_task(root / "tasks" / task, divide(samples))


def held_out(mix: Path, names: Sequence[str]) -> Iterator[Sample]:
    """The held-out samples of some sources of the pretraining mix."""
    for name in names:
        folder = mix / "held_out" / name
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there: give --mix the folder that neo data pretrain-mix wrote")
        for sample in read_shards(folder):
            yield sample | {"key": f"{name}-{sample['key']}"}


def easy_vqa() -> Iterator[Sample]:
    """The test split of easy-VQA; questions about a picture in random order, so that each kind comes first at times."""
    rng = random.Random("easy-VQA")
    for image in read_easy_vqa("test"):
        turns = rng.sample(image.questions, len(image.questions))
        kinds = [question_kind(answer) for _, answer in turns]
        picture = [image.path.read_bytes()]
        yield {"key": f"{image.number:04d}", "images": picture, "conversations": to_turns(turns), "kind": kinds}


def to_turns(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Pairs of question and answer as a conversation about one picture."""
    turns = []
    for number, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": f"{IMAGE_TAG}\n{question}" if number == 0 else question})
        turns.append({"from": "gpt", "value": answer})
    return turns


def pairs_of(sample: Sample) -> list[tuple[str, str]]:
    """Pairs of question and answer of a conversation."""
    turns = [turn["value"] for turn in sample["conversations"]]
    return [(q.removeprefix(f"{IMAGE_TAG}\n"), a) for q, a in zip(turns[::2], turns[1::2], strict=True)]


def divide(samples: Iterable[Sample], questions: int = QUESTIONS, pairs: int = PAIRS[-1]) -> dict[str, list[Sample]]:
    """Test questions and training pairs, by picture.

    Args:
        samples: conversations about one picture each.
        questions: number of test questions.
        pairs: number of training pairs.

    Raises:
        ValueError: if there are too few pictures.
    """
    by_picture: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_picture[hashlib.sha256(sample["images"][0]).hexdigest()].append(sample)
    groups = [by_picture[name] for name in sorted(by_picture)]
    random.Random(0).shuffle(groups)
    parts: dict[str, list[Sample]] = {"test": [], "train": []}
    wanted = {"test": questions, "train": pairs}
    for name, part in parts.items():
        while wanted[name] > 0:
            if not groups:
                raise ValueError(f"too few pictures: {wanted[name]} more pairs of {name} are wanted")
            for sample in groups.pop():
                kept = pairs_of(sample)[: min(PER_PICTURE[name], wanted[name])]
                wanted[name] -= len(kept)
                if kept:
                    part.append(sample | {"conversations": to_turns(kept)} | _kinds(sample, len(kept)))
    return parts


def _kinds(sample: Sample, count: int) -> dict[str, Any]:
    kind = sample.get("kind")
    return {"kind": kind[:count]} if isinstance(kind, list) else {}


def write_task(folder: Path, parts: dict[str, list[Sample]], sizes: Sequence[int] = PAIRS) -> None:
    """Writes test questions one by one, the training sets, and the card."""
    write_shards(_single(parts["test"]), folder / "test")
    for size in sizes:
        write_shards(_first(parts["train"], size), folder / f"train_{size}")
    questions = list(questions_from_shards(folder / "test"))
    card = {
        "train pictures": len(parts["train"]),
        "test pictures": len(parts["test"]),
        "questions": len(questions),
        "kinds": Counter(question.kind for question in questions),
        "blind": blind([(q.question, q.answers[0]) for q in questions], parts["train"]),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _single(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        kinds = sample.get("kind", "other")
        for number, pair in enumerate(pairs_of(sample)):
            kind = kinds if isinstance(kinds, str) else kinds[number]
            yield sample | {"key": f"{sample['key']}-{number}", "conversations": to_turns([pair]), "kind": kind}


def _first(samples: Iterable[Sample], pairs: int) -> Iterator[Sample]:
    for sample in samples:
        kept = pairs_of(sample)[:pairs]
        pairs -= len(kept)
        if kept:
            yield sample | {"conversations": to_turns(kept)} | _kinds(sample, len(kept))


def blind(questions: Sequence[tuple[str, str]], train: Iterable[Sample]) -> float:
    """Exact match of the most frequent training answer to each question, of all answers where a question is new."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in train:
        for question, answer in pairs_of(sample):
            seen[question][answer] += 1
    most: Callable[[Counter[str]], str] = lambda counts: counts.most_common(1)[0][0]  # noqa: E731
    overall = most(sum(seen.values(), Counter()))
    return sum(answer == (most(seen[q]) if q in seen else overall) for q, answer in questions) / len(questions)

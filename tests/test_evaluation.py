"""Exact match against the reference scores, questions from shards, and the runner on a real model."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import randomize
from PIL import Image

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer, Sample
from neo_components.data import load_tokenizer, write_shards
from neo_components.data.text.templates import stop_token_ids
from neo_components.evaluation import (
    ExactMatch,
    Question,
    evaluate,
    exact_match,
    questions_from_shards,
    runner,
    shuffle_images,
    without_images,
)
from neo_components.model.chat import Chat
from neo_components.quickstart.text_llm import train_text_llm
from neo_components.registry import METRICS
from neo_components.storage.progress import progress

FACTS = {"what is up?": "sky", "what is down?": "earth", "is it day?": "no", "is it night?": "yes"}
PIXELS = {"min_pixels": 16 * 16, "max_pixels": 16 * 16}


@pytest.fixture(scope="module")
def golden(data_folder: Path) -> dict[str, Any]:
    return json.loads((data_folder / "metrics" / "exact_match.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that knows four facts by heart."""
    folder = tmp_path_factory.mktemp("llm")
    facts = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in FACTS.items()]
    sizes = {"hidden_size": 32, "depth": 1, "heads": 2, "kv_heads": 1, "head_width": 16, "feed_forward": 64}
    train_text_llm(facts, folder, **sizes, vocab_size=300, steps=80, learning_rate=1e-2, title=None)
    return folder


@pytest.fixture(scope="module")
def model(llm_folder: Path) -> NEO:
    """A NEO whose post-LLM is that language model; text passes its pre-Buffer unchanged."""
    llm = PostLLM.from_pretrained(llm_folder)
    h = llm.hparams
    pre_buffer = PreBuffer(0, h.hidden_size, h.num_heads, h.num_kv_heads, h.head_width, h.feed_forward_size)
    patch_embedding = PatchEmbedding(h.hidden_size, width=8, patch_size=4)
    randomize(patch_embedding)
    return NEO(patch_embedding, pre_buffer, llm)


@pytest.fixture(scope="module")
def tokenizer(llm_folder: Path) -> Any:
    return load_tokenizer(str(llm_folder))


def picture(colour: str, size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def facts() -> list[Question]:
    return [Question(f"q{n}", q, [a], "open" if n < 2 else "yes_no") for n, (q, a) in enumerate(FACTS.items())]


class Watched:
    """The real model, with a list of what it was asked."""

    def __init__(self, model: NEO) -> None:
        self.model, self.asked = model, list[list[Sample]]()

    @property
    def input_spec(self) -> Any:
        return self.model.input_spec

    def generate(self, samples: Sequence[Sample], *arguments: Any, **options: Any) -> Any:
        self.asked.append(list(samples))
        return self.model.generate(samples, *arguments, **options)


# --- metric


def test_each_golden_case(golden: dict[str, Any]) -> None:
    assert len(golden["cases"]) == 32
    for case in golden["cases"]:
        assert exact_match(case["prediction"], case["targets"]) == case["expected"]["score"], case["id"]


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_golden_aggregate_in_batches(golden: dict[str, Any], batch: int) -> None:
    metric = ExactMatch()
    cases = golden["cases"]
    for start in range(0, len(cases), batch):
        some = cases[start : start + batch]
        metric.update([c["prediction"] for c in some], [c["targets"] for c in some])
    assert float(metric.compute()) == pytest.approx(golden["aggregates"][0]["expected"]["score"])


def test_accuracy_by_kind_and_over_two_processes() -> None:
    first, second = ExactMatch(["color", "shape", "count"]), ExactMatch(["color", "shape", "count"])
    first.update(["Red ", "green"], ["red", ["blue", "grey"]], ["color", "color"])
    second.update(["circle"], [["square", "circle"]], ["shape"])
    first.merge_state(second)
    scores = first.compute()
    assert scores["overall"] == pytest.approx(2 / 3)
    assert (scores["color"], scores["shape"]) == (0.5, 1.0)
    assert scores["count"].isnan()
    assert all(reduction.__name__ == "dim_zero_sum" for reduction in first._reductions.values())


def test_metric_without_samples_warns_and_gives_nan() -> None:
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert ExactMatch().compute().isnan()


def test_metric_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ValueError, match="no target to compare the prediction 'x'"):
        exact_match("x", [])
    with pytest.raises(ValueError, match="overall"):
        ExactMatch(["overall"])
    metric = ExactMatch(["color"])
    with pytest.raises(ValueError, match=r"unknown kinds \['shape'\]"):
        metric.update(["a"], ["a"], ["shape"])
    with pytest.raises(ValueError, match="give the kind of each question"):
        metric.update(["a"], ["a"])
    with pytest.raises(ValueError, match="equally long, got 1, 2 and 1"):
        metric.update(["a"], ["a", "b"], ["color"])


# --- questions


def test_questions_of_shards(tmp_path: Path) -> None:
    pair = [{"from": "human", "value": "<image>\na?"}, {"from": "gpt", "value": "b"}]
    more = [*pair, {"from": "human", "value": "c?"}, {"from": "gpt", "value": "d"}]
    red = picture("red")
    samples = [
        {"key": "one", "conversations": pair, "images": [red], "kind": "letter"},
        {"key": "two", "conversations": more, "images": [red], "kind": ["x", "y"]},
        {"key": "text", "conversations": [{"from": "human", "value": "e?"}, {"from": "gpt", "value": "f"}]},
    ]
    write_shards(samples, tmp_path / "shards")
    questions = list(questions_from_shards(tmp_path / "shards"))
    assert questions == [
        Question("one", "a?", ["b"], "letter", red),
        Question("two-0", "a?", ["b"], "x", red),
        Question("two-1", "c?", ["d"], "y", red),
        Question("text", "e?", ["f"], "other", None),
    ]
    assert [question.prompt for question in questions] == ["<image>\na?", "<image>\na?", "<image>\nc?", "e?"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": [{"from": "human", "value": "a?"}]}, r"sample s: .* got the turns \['human'\]"),
        ({"images": [picture("red"), picture("blue")]}, "sample s: has 2 images"),
        ({"kind": ["x", "y"]}, "sample s: 'kind' must be"),
    ],
)
def test_sample_that_is_no_question(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    pair = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]
    write_shards([{"key": "s", "conversations": pair, "images": []} | change], tmp_path / "shards")
    with pytest.raises(ValueError, match=message):
        list(questions_from_shards(tmp_path / "shards"))


def test_shuffled_images_are_permuted_without_fixed_points() -> None:
    images = [picture("red", (16, n)) for n in range(1, 8)]
    questions = [Question(f"{n}", "?", ["x"], image=images[n % 7]) for n in range(21)] + [Question("text", "?", ["x"])]
    for seed in range(20):
        shuffled = shuffle_images(questions, seed)
        moved = dict(zip((q.image for q in questions), (q.image for q in shuffled), strict=True))
        assert moved.pop(None) is None
        assert set(moved) == set(moved.values()) == set(images)
        assert all(before != after for before, after in moved.items())
    assert shuffle_images(questions, 3) == shuffle_images(questions, 3) != shuffle_images(questions, 4)
    with pytest.raises(ValueError, match="at least two different images, the questions have 1"):
        shuffle_images(questions[:1], 0)


def test_blind_questions_have_no_image_and_no_tag() -> None:
    blind = without_images([Question("a", "<image>\nwhat?", ["x"], image=b"1"), Question("b", "why?", ["y"])])
    assert [(q.prompt, q.image) for q in blind] == [("what?", None), ("why?", None)]


# --- runner


def test_text_questions_are_scored_exactly(model: NEO, tokenizer: Any) -> None:
    questions = facts()
    questions[1] = Question("q1", questions[1].question, ["water", "ground"], "open")
    report = evaluate(model, tokenizer, questions, batch_size=3, max_new_tokens=8, progress=None)
    assert [answer.prediction for answer in report.predictions] == list(FACTS.values())
    assert [answer.right for answer in report.predictions] == [True, False, True, True]
    assert report.accuracy == {"overall": 0.75, "open": 0.5, "yes_no": 1.0}
    assert report.counts == {"overall": 4, "open": 2, "yes_no": 2}
    assert [answer.key for answer in report.predictions] == ["q0", "q1", "q2", "q3"]


def test_batch_size_does_not_matter(model: NEO, tokenizer: Any) -> None:
    images = [picture(colour, size) for colour, size in (("red", (16, 16)), ("blue", (32, 8)), ("white", (8, 32)))]
    questions = [Question(f"{n}", q * (1 + n % 3), ["no"], image=images[n % 3]) for n, q in enumerate(FACTS)]
    reports = [
        evaluate(model, tokenizer, questions, batch_size=size, max_new_tokens=4, progress=None, **PIXELS)
        for size in (1, 3, 8)
    ]
    assert reports[0] == reports[1] == reports[2]


def test_batches_hold_similar_lengths_and_share_decoded_images(model: NEO, tokenizer: Any) -> None:
    images = [picture("red"), picture("blue")]
    questions = [Question(f"{n}", "why? " * (1 + n * 5 % 7), ["no"], image=images[n % 2]) for n in range(7)]
    watched = Watched(model)
    evaluate(watched, tokenizer, questions, batch_size=3, max_new_tokens=1, progress=None, **PIXELS)
    assert [len(batch) for batch in watched.asked] == [3, 3, 1]
    samples = [sample for batch in watched.asked for sample in batch]
    lengths = [len(sample.token_ids) for sample in samples]
    assert lengths == sorted(lengths)
    assert len({id(sample.images[0]) for sample in samples}) == 2
    spec = model.input_spec
    assert all(int((sample.token_ids == spec.image_token_id).sum()) == 4 for sample in samples)
    for sample in samples:
        expected = "red" if int(sample.key) % 2 == 0 else "blue"
        red, _, blue = sample.images[0][:, 0, 0].tolist()
        assert (red > blue) == (expected == "red")


def test_images_are_freed_when_they_fill_the_memory(
    model: NEO, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "IMAGE_MEMORY", 1)
    questions = [Question(f"{n}", "why? " * (4 - n), ["no"], image=picture("red", (16, 16 + n))) for n in range(4)]
    watched = Watched(model)
    evaluate(watched, tokenizer, questions, batch_size=2, max_new_tokens=1, progress=None, **PIXELS)
    assert [[sample.key for sample in batch] for batch in watched.asked] == [["1", "0"], ["3", "2"]]


def test_shuffling_asks_about_the_other_image(model: NEO, tokenizer: Any) -> None:
    questions = [Question(c, "why?", ["no"], image=picture(c)) for c in ("red", "blue")]
    watched = Watched(model)
    report = evaluate(watched, tokenizer, questions, max_new_tokens=1, shuffle_images_seed=0, progress=None, **PIXELS)
    shown = {sample.key: sample.images[0][:, 0, 0] for sample in watched.asked[0]}
    assert shown["blue"][0] > shown["blue"][2]
    assert shown["red"][0] < shown["red"][2]
    assert [answer.key for answer in report.predictions] == ["red", "blue"]


def test_stop_tokens(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)) == ["<|im_end|>"]


def test_bad_questions_are_named(model: NEO, tokenizer: Any) -> None:
    def ask(*questions: Question, **options: Any) -> None:
        evaluate(model, tokenizer, questions, progress=None, **options)

    with pytest.raises(ValueError, match="no questions"):
        ask()
    with pytest.raises(ValueError, match="question 'k' has no reference answer"):
        ask(Question("k", "why?", []))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        ask(*facts(), batch_size=0)
    with pytest.raises(ValueError, match="question 'k': not a readable image"):
        ask(Question("k", "why?", ["x"], image=b"no image"))
    with pytest.raises(ValueError, match="2 <image> tags for 1 images"):
        ask(Question("k", "<image> or <image>?", ["x"], image=picture("red")))


def test_page_of_the_docs_runs(
    model: NEO, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Chat(model, tokenizer, **PIXELS).save_pretrained("outputs/quickstart/neo")
    samples = [
        {
            "key": f"{n}",
            "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}],
            "images": [image],
        }
        for n, ((q, a), image) in enumerate(
            zip(FACTS.items(), map(picture, ("red", "blue", "red", "tan")), strict=True)
        )
    ]
    write_shards(samples, "outputs/quickstart/shards/test")
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.S)), names)
    assert names["report"].counts == names["shuffled"].counts == {"overall": 4, "other": 4}
    assert names["blind"].accuracy["overall"] == 1.0
    assert names["metric"].compute()["overall"] == 0.5
    assert "{'overall': tensor(0.5000), 'color': tensor(1.), 'shape': tensor(0.)}" in capsys.readouterr().out
    METRICS.remove("contains")


# --- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(title: str | None) -> None:
        with progress(title, total=3) as bar:
            for step in range(3):
                bar.advance(note=f"loss {step}")

    work("counting")
    assert re.fullmatch(r"counting: 3/3 \(100 %\), \d+ s, loss 2\n", capsys.readouterr().err)
    work(None)
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    work("counting")
    assert "3/3" in terminal.getvalue() and "loss 2" in terminal.getvalue() and "━" in terminal.getvalue()


def test_evaluation_shows_its_progress(model: NEO, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(model, tokenizer, facts(), max_new_tokens=8, progress="asking")
    assert re.search(r"asking: 4/4 \(100 %\), \d+ s, score 1.000\n$", capsys.readouterr().err)


def test_model_is_moved_and_left_as_it_was(model: NEO, tokenizer: Any) -> None:
    model.train()
    evaluate(model, tokenizer, facts()[:1], max_new_tokens=2, device="cpu", progress=None)
    assert model.training
    assert all(parameter.device == torch.device("cpu") for parameter in model.parameters())

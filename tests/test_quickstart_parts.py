"""The quickstart's parts: the text-only language model with its tokenizer, and easy-VQA as shards."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from neo_components import PostLLM
from neo_components.data import encode_conversation, encode_prompt, load_tokenizer, read_shards
from neo_components.data.pictures.easy_vqa import question_kind, read_easy_vqa
from neo_components.data.text.turns import check_conversation
from neo_components.evaluation import questions_from_shards
from neo_components.quickstart.easy_vqa import (
    EasyVQAPart,
    baselines,
    split_images,
    text_conversations,
    write_easy_vqa,
)
from neo_components.quickstart.text_llm import TextLLM, to_chatml, train_text_llm, train_tokenizer

TINY: dict[str, Any] = {
    "hidden_size": 32, "depth": 2, "heads": 4, "kv_heads": 2, "head_width": 16, "feed_forward": 64, "vocab_size": 320,
    "steps": 30, "tokens_per_step": 512, "learning_rate": 1e-2, "title": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def conversations() -> list[list[dict[str, str]]]:
    return text_conversations(split_images(3950, seed=0)[0])


@pytest.fixture(scope="module")
def llm(conversations: list[list[dict[str, str]]], tmp_path_factory: pytest.TempPathFactory) -> TextLLM:
    return train_text_llm(conversations, tmp_path_factory.mktemp("llm"), **TINY)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EasyVQAPart]:
    return write_easy_vqa(tmp_path_factory.mktemp("easy_vqa"), questions_per_sample=3, mirror=False)


# --- the language model


def test_text_llm_learns(llm: TextLLM) -> None:
    assert len(llm.losses) == 30
    assert llm.losses[0] == pytest.approx(torch.tensor(float(llm.vocab_size)).log().item(), abs=1.0)
    assert llm.losses[-1] < llm.losses[0] / 2
    assert llm.vocab_size <= 320


def test_text_llm_is_an_ordinary_hugging_face_folder(llm: TextLLM) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llm.folder), AutoTokenizer.from_pretrained(llm.folder)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert sum(p.numel() for p in model.parameters()) == llm.parameters
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert len(tokenizer) == model.config.vocab_size == llm.vocab_size
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    strange = 'naïve 図形 "x" \t\n  $5'
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange
    assert {path.name for path in llm.folder.iterdir()} >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_library_reads_the_text_llm_as_any_other(llm: TextLLM) -> None:
    from transformers import AutoModelForCausalLM

    ids = encode_prompt([{"from": "human", "value": "is there a circle?"}], load_tokenizer(str(llm.folder)))[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(llm.folder)(ids).logits
        got = PostLLM.from_pretrained(llm.folder).text_logits(ids)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_trained_text_is_the_text_that_is_asked(llm: TextLLM, conversations: list[list[dict[str, str]]]) -> None:
    tokenizer = load_tokenizer(str(llm.folder))
    for conversation in (conversations[0], conversations[-1]):
        ids, _ = encode_conversation(conversation, tokenizer)
        assert ids.tolist() == tokenizer(to_chatml(conversation))["input_ids"]


@pytest.mark.parametrize("tied", [True, False])
def test_training_depends_on_its_seed_alone(
    conversations: list[list[dict[str, str]]], tmp_path: Path, tied: bool
) -> None:
    settings = TINY | {"steps": 3, "tie_word_embeddings": tied}
    before = torch.get_rng_state()
    first = train_text_llm(conversations[:50], tmp_path / "a", seed=1, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    again = train_text_llm(conversations[:50], tmp_path / "b", seed=1, **settings)
    other = train_text_llm(conversations[:50], tmp_path / "c", seed=2, **settings)
    assert first.losses == again.losses != other.losses
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert PostLLM.from_pretrained(tmp_path / "a").hparams.tie_embeddings is tied


def test_text_llm_refuses_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no conversation"):
        train_text_llm([], tmp_path, **TINY)
    with pytest.raises(ValueError, match=r"vocab_size is 258, .* at least 259"):
        train_tokenizer(["a"], 258)
    with pytest.raises(ValueError, match="unknown role 'user'"):
        to_chatml([{"from": "user", "value": "hi"}])


# --- easy-VQA


def test_splits_of_easy_vqa(shards: dict[str, EasyVQAPart]) -> None:
    counts = {name: (part.images, part.questions) for name, part in shards.items()}
    assert counts["test"] == (1000, 9673)
    assert shards["test"].kinds == {"shape": 1257, "color": 1280, "yes_no": 7136}
    assert counts["validation"][0] == 400
    assert counts["train_all"][0] == 3600
    assert counts["train_all"][1] + counts["validation"][1] == 38575
    assert shards["train_text"].questions == shards["train_all"].questions
    assert shards["train_text"].images == 0
    assert shards["train_text"].kinds == shards["train_all"].kinds
    assert (shards["validation_text"].images, shards["validation_text"].kinds) == (0, shards["validation"].kinds)
    open_kinds = {kind: shards["train_all"].kinds[kind] for kind in ("shape", "color")}
    assert shards["train_open"].kinds == open_kinds


def test_shards_hold_each_question_once_with_its_own_image(shards: dict[str, EasyVQAPart]) -> None:
    train = split_images(400, seed=0)[0]
    expected = sorted((q, a, image.path.read_bytes()) for image in train for q, a in image.questions)
    found = questions_from_shards(shards["train_all"].folder)
    assert sorted((question.question, question.answers[0], question.image) for question in found) == expected
    text = questions_from_shards(shards["train_text"].folder)
    assert sorted((question.question, question.answers[0]) for question in text) == [row[:2] for row in expected]


def test_training_images_are_there_plain_and_mirrored(tmp_path: Path) -> None:
    parts = write_easy_vqa(tmp_path, validation_images=3990)
    samples = {sample["key"]: sample for sample in read_shards(parts["train_open"].folder)}
    assert parts["train_open"].samples == len(samples) > 0
    for key, sample in samples.items():
        if key.endswith("m"):
            plain = samples[key.removesuffix("m")]
            assert sample["conversations"] == plain["conversations"]
            pixels, mirrored = (np.asarray(Image.open(io.BytesIO(s["images"][0]))) for s in (plain, sample))
            assert np.array_equal(pixels[:, ::-1], mirrored)
    assert sum(key.endswith("m") for key in samples) * 2 == len(samples)


def test_samples_can_be_trained_on(shards: dict[str, EasyVQAPart]) -> None:
    sizes = []
    for part in (shards["train_all"], shards["validation"]):
        for sample in read_shards(part.folder):
            check_conversation(sample["conversations"], len(sample["images"]))
            answers = [turn["value"] for turn in sample["conversations"][1::2]]
            assert sample["kind"] == [question_kind(answer) for answer in answers]
            sizes.append(len(answers))
    assert max(sizes) == 3
    assert set(sizes[-shards["validation"].samples :]) == {1}


def test_held_out_images_follow_the_seed() -> None:
    train, held_out = split_images(400, seed=0)
    assert (len(train), len(held_out)) == (3600, 400)
    assert not {image.path for image in train} & {image.path for image in held_out}
    assert split_images(400, seed=0)[1] == held_out != split_images(400, seed=1)[1]
    with pytest.raises(ValueError, match="validation_images is 4000; allowed: 0 to 3999"):
        split_images(4000, seed=0)
    with pytest.raises(ValueError, match="no split 'dev'"):
        read_easy_vqa("dev")


def test_text_conversations_ask_alone_and_together() -> None:
    images = split_images(3990, seed=0)[0]
    conversations = text_conversations(images, questions_per_sample=4)
    questions = sum(len(image.questions) for image in images)
    turns = [len(conversation) // 2 for conversation in conversations]
    assert turns.count(1) >= questions
    assert sum(turns) == 2 * questions
    assert max(turns) == 4
    assert not any("<image>" in turn["value"] for conversation in conversations for turn in conversation)


def test_baselines() -> None:
    scores = baselines()
    assert scores["lookup"] == pytest.approx(0.6700, abs=5e-5)
    assert scores["majority"] == pytest.approx(0.3733, abs=5e-5)


def test_every_answer_has_its_kind() -> None:
    answers = {answer for image in read_easy_vqa("test") for _, answer in image.questions}
    kinds = {kind: {a for a in answers if question_kind(a) == kind} for kind in ("shape", "color", "yes_no")}
    assert kinds["shape"] == {"circle", "rectangle", "triangle"}
    assert kinds["color"] == {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
    assert kinds["yes_no"] == {"yes", "no"}


def test_write_refuses_an_empty_sample(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one question, got 0"):
        write_easy_vqa(tmp_path, questions_per_sample=0)

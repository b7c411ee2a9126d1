"""Conversations: ids and labels equal to the reference, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_builders import IMAGE_IDS, TOKENIZER, turns

from neo_components.data import encode_conversation, encode_prompt, image_token_ids, load_tokenizer
from neo_components.data.text.turns import IMAGE_TOKENS, ConversationError, check_conversation
from neo_components.types import IGNORED

CASES: list[dict[str, Any]] = json.loads(
    (Path(TOKENIZER).parent / "train_conversations.json").read_text(encoding="utf-8")
)
REFUSED_WHEN_STRICT = {
    "more_tags_than_images": "image_tags",
    "unknown_role_skipped": "role",
    "empty_answer": "no_answer",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TOKENIZER)


def words(tokenizer: Any, ids: torch.Tensor) -> str:
    return str(tokenizer.decode(ids.tolist()))


@pytest.mark.parametrize("folder", ["tokenizer", "base_tokenizer"])
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_training_equals_reference(folder: str, case: dict[str, Any]) -> None:
    # The base tokenizer has no image tokens; those that load_tokenizer adds get the reference's ids.
    tokenizer = load_tokenizer(str(Path(TOKENIZER).parent / folder))
    before = copy.deepcopy(case["conversations"])
    token_ids, labels = encode_conversation(case["conversations"], tokenizer, image_tokens=case["num_image_tokens"])
    assert token_ids.dtype == labels.dtype == torch.int64
    assert token_ids.tolist() == case["input_ids"]
    assert labels.tolist() == case["labels"]
    assert case["conversations"] == before


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_strict_refuses_only_the_odd_cases(tokenizer: Any, case: dict[str, Any]) -> None:
    arguments = (case["conversations"], tokenizer, case["num_image_tokens"])
    if reason := REFUSED_WHEN_STRICT.get(case["name"]):
        with pytest.raises(ConversationError) as found:
            encode_conversation(*arguments, strict=True)
        assert found.value.reason == reason
    else:
        assert encode_conversation(*arguments, strict=True)[0].tolist() == case["input_ids"]


def test_prompts_equal_reference(tokenizer: Any) -> None:
    cases = json.loads((Path(TOKENIZER).parent / "inference_prompts.json").read_text(encoding="utf-8"))
    assert len(cases) == 5
    for case in cases:
        history = [turn for question, answer in case["history"] for turn in turns(question, answer)]
        asked = {"from": "human", "value": case["question"]}
        conversation = [{"from": "system", "value": case["system_message"]}, *history, asked]
        token_ids = encode_prompt(conversation, tokenizer, case["num_image_tokens"])
        assert token_ids.tolist() == case["input_ids"]
        assert words(tokenizer, token_ids) == case["prompt"]


def test_whole_samples_equal_reference(tokenizer: Any, data_folder: Path) -> None:
    cases = json.loads((data_folder / "preprocessing" / "samples.json").read_text(encoding="utf-8"))
    for case in cases:
        counts = [rows * columns // 4 for rows, columns in case["grid_hw"]]
        token_ids, labels = encode_conversation(case["conversations"], tokenizer, counts, strict=True)
        assert token_ids.tolist() == case["input_ids"]
        assert labels.tolist() == case["labels"]


def test_a_prompt_is_the_beginning_of_its_training(tokenizer: Any) -> None:
    conversation = turns("<image>\nWhat?", "\n\n Red. ")
    token_ids, labels = encode_conversation(conversation, tokenizer, [3])
    prompt = encode_prompt(conversation[:1], tokenizer, [3])
    assert token_ids[: len(prompt)].tolist() == prompt.tolist()
    assert (labels[: len(prompt)] == IGNORED).all()
    assert labels[len(prompt) :].tolist() == token_ids[len(prompt) :].tolist()


def test_single_image_without_tag_comes_first(tokenizer: Any) -> None:
    conversation = [{"from": "system", "value": "Be kind."}, *turns("Color?")]
    tagged = [{"from": "system", "value": "Be kind."}, *turns("<image>\nColor?")]
    ids = encode_conversation(conversation, tokenizer, [2])[0]
    assert ids.tolist() == encode_conversation(tagged, tokenizer, [2])[0].tolist()
    assert (
        encode_prompt(conversation[:2], tokenizer, [2]).tolist() == encode_prompt(tagged[:2], tokenizer, [2]).tolist()
    )
    assert conversation[1]["value"] == "Color?"


@pytest.mark.parametrize(
    ("conversation", "images", "reason", "message"),
    [
        (turns("no tag"), 2, "image_tags", "0 <image> tags for 2 images"),
        (turns("<image>"), 2, "image_tags", "1 <image> tags for 2 images"),
        (turns("<image><image>"), 1, "image_tags", "2 <image> tags for 1 images"),
        (turns("<image>"), 0, "image_tags", "1 <image> tags for 0 images"),
        (turns()[:1], 0, "no_answer", "no answer"),
        (turns(answer=" \n"), 0, "no_answer", "no answer"),
        ([], 0, "no_answer", "no answer"),
        ([turns()[0], {**turns()[1], "is_input": True}], 0, "no_answer", "no answer"),
        ([*turns(), {"from": "tool", "value": "x"}], 0, "role", "turn 2 is from 'tool'"),
        (turns("a </img> b"), 0, "reserved", "reserved"),
        (turns("a <IMG_CONTEXT> b"), 0, "reserved", "reserved"),
        ("text", 0, "turns", "list of turns, got str"),
        (None, 0, "turns", "list of turns, got NoneType"),
        ([{"from": "human"}], 0, "turns", "turn 0"),
        ([{"from": "human", "value": 5}], 0, "turns", "turn 0"),
        (["Hi"], 0, "turns", "turn 0"),
    ],
)
def test_what_is_refused(tokenizer: Any, conversation: Any, images: int, reason: str, message: str) -> None:
    with pytest.raises(ConversationError, match=message) as found:
        encode_conversation(conversation, tokenizer, [2] * images, strict=True)
    assert found.value.reason == reason
    with pytest.raises(ConversationError, match=message):
        check_conversation(conversation, images)


def test_fewer_tags_and_visual_tokens_in_text_are_always_refused(tokenizer: Any) -> None:
    with pytest.raises(ConversationError, match="1 <image> tags for 2 images"):
        encode_conversation(turns("<image>"), tokenizer, [2, 2])
    with pytest.raises(ConversationError, match="reserved"):
        encode_conversation(turns("<image> <IMG_CONTEXT>"), tokenizer, [2])
    with pytest.raises(ValueError, match="at least one visual token"):
        encode_conversation(turns("<image>"), tokenizer, [0])


def test_prompts_are_strict(tokenizer: Any) -> None:
    with pytest.raises(ConversationError, match="last turn of a prompt must be from 'human'"):
        encode_prompt(turns(), tokenizer)
    with pytest.raises(ConversationError, match="2 <image> tags for 1 images"):
        encode_prompt(turns("<image><image>")[:1], tokenizer, [4])
    with pytest.raises(ConversationError, match="'robot'"):
        encode_prompt([{"from": "robot", "value": ""}, *turns()[:1]], tokenizer)


def test_length_limit(tokenizer: Any) -> None:
    conversation = turns("<image>\nWhat is it?", "A red apple.")
    whole, labels = encode_conversation(conversation, tokenizer, [4], strict=True)
    first = int((labels != IGNORED).nonzero()[0])
    cut, cut_labels = encode_conversation(conversation, tokenizer, [4], max_length=first + 1, strict=True)
    assert cut.tolist() == whole[: first + 1].tolist()
    assert (cut_labels != IGNORED).sum() == 1
    with pytest.raises(ConversationError, match="no target is left") as found:
        encode_conversation(conversation, tokenizer, [4], max_length=first, strict=True)
    assert found.value.reason == "too_long"
    assert (encode_conversation(conversation, tokenizer, [4], max_length=first)[1] == IGNORED).all()
    inside = whole.tolist().index(IMAGE_IDS[0]) + 2
    for strict in (False, True):
        with pytest.raises(ConversationError, match="cuts an image"):
            encode_conversation(conversation, tokenizer, [4], max_length=inside, strict=strict)
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        encode_conversation(conversation, tokenizer, [4], max_length=0)


def test_ids_of_the_model_replace_those_of_the_tokenizer(tokenizer: Any) -> None:
    conversation = turns("<image>\nWhat is it?")
    own = encode_conversation(conversation, tokenizer, [4])[0].tolist()
    models = (390, 600, 389)  # two of the tokenizer's, swapped, and one of its own
    theirs = encode_conversation(conversation, tokenizer, [4], image_ids=models)[0].tolist()
    assert theirs == [dict(zip(IMAGE_IDS, models, strict=True)).get(i, i) for i in own]
    assert encode_prompt(conversation[:1], tokenizer, [4], image_ids=models).tolist() == theirs[: own.index(385, 2) + 5]
    with pytest.raises(ValueError, match=r"use ids \[385\]"):
        encode_conversation(conversation, tokenizer, [4], image_ids=(385, 600, 601))


def test_load_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
    with pytest.raises(ValueError, match="load it with load_tokenizer"):
        image_token_ids(bare)
    bare.save_pretrained(tmp_path / "bare")
    loaded = load_tokenizer(str(tmp_path / "bare"))
    assert image_token_ids(loaded) == (2, 3, 4)
    assert loaded.convert_ids_to_tokens([2, 3, 4]) == list(IMAGE_TOKENS)
    assert "<|im_start|> or <|im_end|>" in caplog.text
    assert image_token_ids(load_tokenizer(TOKENIZER)) == IMAGE_IDS
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path / "missing"))

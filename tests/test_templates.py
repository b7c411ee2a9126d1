"""Chat templates: the targets are the answers with what ends them, and a prompt is the beginning of a training text."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_templates import STYLES, Style, tokenizer_of
from shard_builders import TOKENIZER, turns

from neo_components.data import encode_conversation, encode_prompt, load_tokenizer
from neo_components.data.text.templates import CHATML, stop_token_ids, template_of
from neo_components.data.text.turns import IMAGE_TOKEN, IMAGE_TOKENS, ConversationError
from neo_components.types import IGNORED

ANSWERS = ["Red.", "two words, and 1 + 1 = 2", "Ünïcödé 🙂 答え", "line\nbreak\n\ninside", "red"]
BLANKS = [" leading", "\nleading", "\n\n Red. ", "trailing \n", "  "]


def loaded(style: Style, folder: Path) -> Any:
    """The style's tokenizer after a way through the disk, as a user has it."""
    tokenizer_of(style).save_pretrained(folder)
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module", params=STYLES)
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Style, Any]:
    style = STYLES[request.param]
    return request.param, style, loaded(style, tmp_path_factory.mktemp("tokenizer"))


def targets(tokenizer: Any, ids: Any, labels: Any) -> list[str]:
    """The text of each stretch of labels."""
    stretches: list[list[int]] = []
    for place, label in enumerate(labels.tolist()):
        if label != IGNORED:
            assert label == int(ids[place])
            if place == 0 or int(labels[place - 1]) == IGNORED:
                stretches.append([])
            stretches[-1].append(label)
    return [str(tokenizer.decode(stretch)) for stretch in stretches]


def talk(answers: list[str]) -> list[dict[str, str]]:
    return [turn for n, answer in enumerate(answers) for turn in turns(f"question {n}: is it red or blue?", answer)]


def test_the_targets_are_the_answers_and_their_ends(case: tuple[str, Style, Any]) -> None:
    _, style, tokenizer = case
    ids, labels = encode_conversation(talk(ANSWERS), tokenizer, strict=True)
    # A space that the template puts before an answer is the model's to write.
    assert [text.removeprefix(" ") for text in targets(tokenizer, ids, labels)] == [a + style.end for a in ANSWERS]
    read = tokenizer.decode(ids[labels == IGNORED].tolist())
    assert read.count("is it red or blue?") == len(ANSWERS)
    assert not any(answer in read for answer in ANSWERS[:-1])
    middle = [*turns("one", "two"), turns("three")[0], {**turns(answer="four")[1], "is_input": True}]
    ids, labels = encode_conversation(middle, tokenizer, strict=True)
    assert [text.removeprefix(" ") for text in targets(tokenizer, ids, labels)] == ["two" + style.end]


def test_outer_whitespace_is_a_target_as_far_as_the_template_writes_them(case: tuple[str, Style, Any]) -> None:
    name, style, tokenizer = case
    trims = name in ("llama3", "gemma", "llama2")
    for answer in BLANKS:
        ids, labels = encode_conversation(turns(answer=answer), tokenizer)
        written = answer.strip() if trims else answer.lstrip("\n") if name == "qwen3" else answer
        [text] = targets(tokenizer, ids, labels)
        before = " " if name in ("mistral", "llama2", "no header in the prompt") else ""
        # Tokenizers of the sentence kind decode a first space to nothing.
        whole = before + written + style.end
        assert text == whole if style.kind == "bytes" else text in (whole, whole.removeprefix(" "))


def test_ids_are_those_of_transformers(case: tuple[str, Style, Any]) -> None:
    """Of the conversation as a whole, for answers that begin with a word."""
    _, _, tokenizer = case
    conversation = talk(ANSWERS)
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in conversation]
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    assert encode_conversation(conversation, tokenizer)[0].tolist() == expected


@pytest.mark.parametrize("answers", [ANSWERS, *[[answer, answer] for answer in BLANKS]], ids=repr)
def test_a_prompt_is_the_beginning_of_its_training(case: tuple[str, Style, Any], answers: list[str]) -> None:
    name, _, tokenizer = case
    conversation = talk(answers)
    ids, labels = encode_conversation(conversation, tokenizer)
    target_at = [n for n in range(1, len(ids)) if labels[n] != IGNORED and labels[n - 1] == IGNORED]
    assert len(target_at) == len(answers)
    # Qwen3 writes the answer under way with an empty thought, and takes it away when the conversation goes on.
    asked = range(1 if name != "qwen3" else len(answers), len(answers) + 1)
    for number in asked:
        prompt = encode_prompt(conversation[: 2 * number - 1], tokenizer)
        assert prompt.tolist() == ids[: target_at[number - 1]].tolist()
    if name == "qwen3":
        assert tokenizer.decode(prompt.tolist()).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_images_stand_where_their_tags_were(case: tuple[str, Style, Any]) -> None:
    _, style, tokenizer = case
    conversation = [*turns("<image>\nfirst, <image> second", "Red."), *turns("a third <image>", "Blue.")]
    ids, labels = encode_conversation(conversation, tokenizer, [2, 3, 1], strict=True)
    text = tokenizer.decode(ids.tolist())
    pictures = [f"<img>{IMAGE_TOKEN * n}</img>" for n in (2, 3, 1)]
    assert text.count(IMAGE_TOKEN) == 6
    for picture, after in zip(pictures, ("first", "second", ""), strict=True):
        assert text.replace(" ", "").replace("\n", "").count(picture + after) == 1
    assert [t.removeprefix(" ") for t in targets(tokenizer, ids, labels)] == ["Red." + style.end, "Blue." + style.end]
    prompt = encode_prompt(conversation[:3], tokenizer, [2, 3, 1])
    assert ids[: len(prompt)].tolist() == prompt.tolist() or STYLES["qwen3"] is style


def test_system_turns(case: tuple[str, Style, Any]) -> None:
    """Written where the template has a place for them, refused where it has none; never left out."""
    _, style, tokenizer = case
    conversation = [{"from": "system", "value": "Be kind."}, *turns("Why?", "Because.")]
    if style.system:
        ids, labels = encode_conversation(conversation, tokenizer, strict=True)
        assert tokenizer.decode(ids[labels == IGNORED].tolist()).count("Be kind.") == 1
        assert targets(tokenizer, ids, labels)[0].removeprefix(" ") == "Because." + style.end
    else:
        with pytest.raises(
            ConversationError, match=r"refuses the turns system, user, assistant: .*first user turn"
        ) as e:
            encode_conversation(conversation, tokenizer)
        assert e.value.reason == "template"


def test_generation_stops_at_the_templates_end(case: tuple[str, Style, Any]) -> None:
    name, style, tokenizer = case
    stops = set(tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)))
    assert stops == ({style.eos} if name == "words for an end" else {style.eos, style.end.strip()})


def test_the_beginning_of_text_stands_where_the_template_writes_it(case: tuple[str, Style, Any]) -> None:
    _, style, tokenizer = case
    ids = encode_conversation(talk(ANSWERS[:2]), tokenizer)[0].tolist()
    writes = style.template.count("bos_token")
    each_turn = "'[INST] ' + m['content'].strip()" in style.template
    assert ids.count(tokenizer.bos_token_id) == (2 if each_turn else writes)
    assert (ids[0] == tokenizer.bos_token_id) is bool(writes)


FAULTY = {
    "drops answers": ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves an answer out"),
    "changes answers": ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "leaves an answer out"),
    "shortens answers": (
        "{% for m in messages %}{{ m.role + m.content[:40] + '\\n' }}{% endfor %}",
        "does not write the answer",
    ),
    "writes answers twice": (
        "{% for m in messages %}{{ m.content + m.content }}{% endfor %}",
        "writes it twice",
    ),
    "no Jinja": ("{% for m in messages %}", "refuses the turns user, assistant: "),
    "refuses everything": ("{{ raise_exception('no') }}", "refuses the turns user, assistant: no"),
    "blocks elsewhere": (
        "{% for m in messages %}{% if m.role == 'user' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        "has generation blocks that do not hold the answers",
    ),
    "too few blocks": (
        "{% for m in messages %}{% if loop.first %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}{% if m.role == 'assistant' and loop.last %}{% generation %}.{% endgeneration %}"
        "{% endif %}{% endfor %}",
        "has 2 generation blocks for 1 answers",
    ),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_template_whose_answers_cannot_be_found_is_an_error(name: str, tmp_path: Path) -> None:
    """Told when the tokenizer is loaded, or with the conversation that shows it; the way out works."""
    template, message = FAULTY[name]
    tokenizer_of(replace(STYLES["qwen2.5"], template=template)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        encode_conversation(turns("Why?", "x" * 50), load_tokenizer(str(tmp_path)))
    assert "chat_template='chatml'" in str(error.value)
    tokenizer = load_tokenizer(str(tmp_path), chat_template="chatml")
    assert targets(tokenizer, *encode_conversation(turns("Why?", "So."), tokenizer)) == ["So.<|im_end|>\n"]


def test_a_template_that_leaves_out_the_system_turn(tmp_path: Path) -> None:
    template = "{% for m in messages if m.role != 'system' %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    tokenizer = loaded(replace(STYLES["qwen2.5"], template=template), tmp_path)
    assert targets(tokenizer, *encode_conversation(turns("Why?", "So."), tokenizer)) == [" So."]
    with pytest.raises(ConversationError, match="leaves out the system turn") as error:
        encode_conversation([{"from": "system", "value": "e"}, *turns()], tokenizer)
    assert error.value.reason == "template"


def test_an_answer_that_the_template_rewrites_is_refused(tmp_path: Path) -> None:
    tokenizer = loaded(STYLES["qwen3"], tmp_path)
    with pytest.raises(ConversationError, match=r"text before an answer differently|does not write the answer"):
        encode_conversation(turns(answer="<think>\nhm\n</think>\n\nSo."), tokenizer)


def test_a_template_without_an_end_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    tokenizer = loaded(replace(STYLES["qwen2.5"], template=template), tmp_path)
    assert "does not learn to stop" in caplog.text
    assert targets(tokenizer, *encode_conversation(talk(["one", "two"]), tokenizer)) == [" one", " two"]


def test_words_that_look_like_marks_are_words(case: tuple[str, Style, Any]) -> None:
    _, style, tokenizer = case
    conversation = [*turns("answer0zq turn1zq", "answer0zq"), *turns("answer1zq", "answer1zqzq answer0zqzq")]
    ids, labels = encode_conversation(conversation, tokenizer, strict=True)
    found = [text.removeprefix(" ") for text in targets(tokenizer, ids, labels)]
    assert found == ["answer0zq" + style.end, "answer1zqzq answer0zqzq" + style.end]


def test_dates_do_not_change(tmp_path: Path) -> None:
    template = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}" + STYLES["qwen2.5"].template
    tokenizer = loaded(replace(STYLES["qwen2.5"], template=template), tmp_path)
    assert tokenizer.decode(encode_prompt(turns()[:1], tokenizer).tolist()).startswith("Today: 26 Jul 2024\n")


# --- which template


def test_plain_chatml_is_recognised(tmp_path: Path) -> None:
    """Its answers end with a line break, as the released models were trained on them; also under another spelling."""
    other = (
        "{%- for message in messages -%}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor -%}"
    )
    other = other.replace("<|im_end|>\n", "<|im_end|>{{ '\\n' }}").replace("}}\n{{", "}}{{ '\\n' }}{{")
    for number, template in enumerate((CHATML, other)):
        tokenizer = loaded(replace(STYLES["qwen2.5"], template=template), tmp_path / str(number))
        assert template_of(tokenizer).plain
        assert targets(tokenizer, *encode_conversation(turns("Why?", "So."), tokenizer)) == ["So.<|im_end|>\n"]
    assert not any(template_of(tokenizer_of(style)).plain for style in STYLES.values())


@pytest.mark.parametrize("adds", [False, True])
def test_without_a_template_it_is_chatml_with_the_tokenizers_own_beginning(adds: bool, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    bare = tokenizer_of(STYLES["gemma"])
    bare.chat_template = None
    if adds:
        first = [("<bos>", bare.bos_token_id)]
        bare.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=first)
    bare.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    ids, labels = encode_conversation(talk(["one", "two"]), tokenizer)
    assert ids.tolist().count(tokenizer.bos_token_id) == adds
    assert (int(ids[0]) == tokenizer.bos_token_id) is adds
    assert [text.rstrip("\n") for text in targets(tokenizer, ids, labels)] == ["one<|im_end|>", "two<|im_end|>"]
    # What it was taught with goes along when it is saved.
    tokenizer.save_pretrained(tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again"))
    assert encode_conversation(talk(["one", "two"]), again)[0].tolist() == ids.tolist()
    assert set(IMAGE_TOKENS) <= set(again.get_vocab())


def test_the_choice_of_a_template(tmp_path: Path) -> None:
    tokenizer_of(STYLES["llama3"]).save_pretrained(tmp_path / "llama3")
    own = load_tokenizer(str(tmp_path / "llama3"))
    assert "<|eot_id|>" in own.decode(encode_conversation(turns(), own)[0].tolist())
    file = tmp_path / "mine.jinja"
    file.write_text(STYLES["words for an end"].template)
    mine = load_tokenizer(str(tmp_path / "llama3"), chat_template=str(file))
    assert "### end" in mine.decode(encode_conversation(turns(), mine)[0].tolist())
    mine.save_pretrained(tmp_path / "mine")
    assert load_tokenizer(str(tmp_path / "mine")).chat_template == mine.chat_template
    with pytest.raises(FileNotFoundError, match=r"there is no chat template 'none\.jinja'; give auto, chatml or"):
        load_tokenizer(str(tmp_path / "llama3"), chat_template="none.jinja")
    with pytest.raises(
        ValueError, match=r"chat_template must be auto, chatml or a path that ends with \.jinja, got 'x'"
    ):
        load_tokenizer(str(tmp_path / "llama3"), chat_template="x")


def test_a_released_model_is_asked_in_chatml(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever template its tokenizer carries: it was trained in ChatML."""
    shutil.copytree(TOKENIZER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(STYLES["qwen3"].template)
    assert not template_of(load_tokenizer(str(tmp_path))).plain
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "neo_chat"}))
    with caplog.at_level(logging.WARNING):
        assert template_of(load_tokenizer(str(tmp_path))).plain
    assert not caplog.records


def test_python_of_the_page(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "quickstart").symlink_to(world)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "conversations.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "docs/conversations.md", "exec"), {})
    assert capsys.readouterr().out == "red<|im_end|>\n\n"

"""The text side of an exported folder: tokenizer, chat template and generation settings."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from neo_components.data.text.conversation import encode_prompt
from neo_components.data.text.templates import CHATML, TODAY, stop_token_ids
from neo_components.data.text.turns import IMAGE_TAG
from neo_components.storage.weights import write_text

IMAGES = (
    """\
{%- set plain = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set text = namespace(value=message.content, begun=false) -%}
  {%- if message.content is not string and message.content is iterable -%}
    {%- set text.value = '' -%}
    {%- for item in message.content -%}
      {%- if item.type == 'image' -%}
        {%- set text.value = text.value + ('IMAGE_TAG' if text.begun else 'IMAGE_TAG\\n') -%}
      {%- elif item.type == 'text' -%}
        {%- set text.begun = true -%}
        {%- set text.value = text.value + item.text -%}
      {%- else -%}
        {{- raise_exception('content may be image or text, not ' ~ item.type) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set plain.messages = plain.messages + [dict(message, content=text.value)] -%}
{%- endfor -%}
{%- set messages = plain.messages -%}
"""
).replace("IMAGE_TAG", IMAGE_TAG)
"""Makes text of lists of content: images before all text are a line each, as ``Chat`` writes them, others stay where
they are. The template of the language model follows."""

QUESTION = "What is it?"


def chat_template(tokenizer: Any, images: bool) -> str:
    """The Jinja template that writes prompts as the library does, :func:`~neo_components.data.encode_prompt`.

    Args:
        tokenizer: whose template it is, if it has one; ChatML otherwise.
        images: messages may hold images.

    Raises:
        ValueError: if neither its own template nor ChatML leads to the same tokens.
    """
    wanted = encode_prompt([{"from": "human", "value": QUESTION}], tokenizer).tolist()
    for base in filter(None, (tokenizer.chat_template, CHATML)):
        # The day that the library writes where a template asks for today's.
        base = re.sub(r"strftime_now\((['\"])(.*?)\1\)", lambda found: repr(TODAY.strftime(found[2])), base)
        template = (IMAGES if images else "") + base
        text = _prompt(tokenizer, template)
        begun = tokenizer(text, add_special_tokens=False).input_ids
        # Some templates write more before an answer than where one is to be given (an empty thought).
        rest = tokenizer.decode(wanted[len(begun) :]) if wanted[: len(begun)] == begun else ""
        if tokenizer(text + rest, add_special_tokens=False).input_ids == wanted:
            return template + (f"{{%- if add_generation_prompt -%}}{{{{- {rest!r} -}}}}{{%- endif -%}}" if rest else "")
    raise ValueError(
        f"the tokenizer's chat template writes {_prompt(tokenizer, base)!r}, but the model is asked in other tokens, "
        f"{tokenizer.decode(wanted)!r}; load the tokenizer with a template that ends where answers begin"
    )


def _prompt(tokenizer: Any, template: str) -> str:
    """A question as a template writes it."""
    asked = [{"role": "user", "content": QUESTION}]
    return tokenizer.apply_chat_template(asked, chat_template=template, tokenize=False, add_generation_prompt=True)


def write_text_side(tokenizer: Any, folder: Path, chat_template: str, max_new_tokens: int = 256) -> None:
    """Writes tokenizer, chat template and generation_config.json: greedy, up to the tokens that end an answer.

    Args:
        tokenizer: Hugging Face tokenizer; it is not changed.
        folder: where.
        chat_template: Jinja template.
        max_new_tokens: longest answer where a user of the folder does not say.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # where generate wants it
    stops = stop_token_ids(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(stops[0])
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    settings = {
        "do_sample": False, "eos_token_id": stops, "max_new_tokens": max_new_tokens,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    write_json(folder / "generation_config.json", settings)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object as config files look."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

"""The chat template of an exported model: writes what the library itself writes, and takes pictures in messages."""

from __future__ import annotations

from typing import Any

from neo_components.data.conversation import IMAGE_TAG

PICTURES = (
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
"""Turns lists of content into text: pictures before all text are a line each, as ``Chat`` puts them, others stand where
they are. The template of the language model follows."""

CHATML = """\
{%- for message in messages -%}
  {%- if message.content or message.role != 'system' -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""As ``data.encode_prompt`` writes it."""


def chat_template(tokenizer: Any) -> str:
    """The template for a tokenizer: ChatML, as the model was trained."""
    return PICTURES + CHATML

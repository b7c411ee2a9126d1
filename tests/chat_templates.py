"""Chat templates in the styles that are in use, and small tokenizers of the kinds that they come with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

TEXTS = [
    "user assistant system model instruct what color is the shape? it is red. no, blue! two words",
    "The quick brown fox says: 1 + 1 = 2, isn't it? answer question turn end one and only",
]


@dataclass(frozen=True)
class Style:
    """A template with what a test has to know about it.

    Args:
        template: Jinja.
        special: its special tokens.
        end: what ends an answer and is a target with it.
        eos: the tokenizer's end of text.
        system: whether it takes a system turn.
        kind: of tokenizer: ``bytes``, ``sentence`` (a space before the text) or ``legacy`` (before each part of it).
    """

    template: str
    special: tuple[str, ...]
    end: str
    eos: str
    system: bool = True
    kind: str = "bytes"


ROLES_ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}{% endfor %}"
)
QWEN_THINKING = """
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set content = m.content %}{%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>' + m.role + '\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + m.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

STYLES = {
    "qwen2.5": Style(
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        end="<|im_end|>",
        eos="<|im_end|>",
    ),
    "qwen3": Style(
        QWEN_THINKING,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        "<|im_end|>",
        "<|im_end|>",
    ),
    "llama3": Style(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
        "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        end="<|eot_id|>",
        eos="<|eot_id|>",
    ),
    "gemma": Style(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + ROLES_ALTERNATE + "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' "
        "else m['role'] %}{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        end="<end_of_turn>",
        eos="<eos>",
        system=False,
    ),
    "phi3": Style(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        end="<|end|>",
        eos="<|endoftext|>",
        kind="legacy",
    ),
    "mistral": Style(
        "{{ bos_token }}" + ROLES_ALTERNATE + "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        end="</s>",
        eos="</s>",
        system=False,
        kind="sentence",
    ),
    "zephyr": Style(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        end="</s>",
        eos="</s>",
        kind="sentence",
    ),
    "llama2": Style(
        ROLES_ALTERNATE + "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        end=" </s>",
        eos="</s>",
        system=False,
        kind="legacy",
    ),
    "generation": Style(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        end="<|im_end|>",
        eos="<|endoftext|>",
    ),
    "no header in the prompt": Style(  # it does not look at add_generation_prompt
        "{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] + eos_token }}{% endfor %}",
        ("<|begin|>", "<|endoftext|>"),
        end="<|endoftext|>",
        eos="<|endoftext|>",
    ),
    "words for an end": Style(
        "{% for m in messages %}{{ '### ' + m['role'] + '\\n' + m['content'] + '\\n### end\\n' }}{% endfor %}",
        ("<|begin|>", "<|endoftext|>"),
        end="\n### end",
        eos="<|endoftext|>",
    ),
}


@lru_cache
def _trained(kind: str) -> str:
    """A tokenizer of that kind, trained on a few words, as JSON."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, unknown = pre_tokenizers.ByteLevel.alphabet(), []
    else:
        alphabet, unknown = [], [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
        replace, first = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
        tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), first])
        if kind == "legacy":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 200, special_tokens=unknown, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return str(tokenizer.to_str())


def tokenizer_of(style: Style) -> Any:
    """A tokenizer of transformers with that template; byte tokens are ordinary ones, as in released files."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    saved = json.loads(_trained(style.kind))
    saved["added_tokens"] = []
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(saved)),
        bos_token=style.special[0],
        eos_token=style.eos,
        extra_special_tokens=list(style.special),
        chat_template=style.template,
        clean_up_tokenization_spaces=False,
    )

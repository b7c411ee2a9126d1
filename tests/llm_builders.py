"""Tiny language models as ordinary Hugging Face folders with a tokenizer of their own, and models around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from builders import randomize, weights_of

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer
from neo_components.model.vocabulary import token_strings
from neo_components.quickstart.text_llm import train_text_llm
from neo_components.storage.weights import save_tensors

COLORS = ("red", "blue", "green", "black")
EMBEDDING = "model.embed_tokens.weight"


def text_llm(folder: Path, question: str = "what color is it?", **changes: Any) -> Path:
    """A language model that was trained on colours for two steps; another question gives another vocabulary."""
    talk = [[{"from": "human", "value": question}, {"from": "gpt", "value": color}] for color in COLORS for _ in "ab"]
    sizes = {"hidden_size": 32, "depth": 2, "heads": 2, "kv_heads": 1, "head_width": 16, "feed_forward": 48}
    train_text_llm(talk, folder, **sizes | {"vocab_size": 300, "steps": 2, "title": None} | changes)
    return folder


def native_model(llm: Path, seed: int = 0) -> NEO:
    """A random pre-Buffer of one block in front of a language model, which stays as it is; 4-pixel patches."""
    post_llm = PostLLM.from_pretrained(llm)
    h = post_llm.hparams
    pre_buffer = PreBuffer(1, h.hidden_size, h.num_heads, h.num_kv_heads, h.head_width, h.feed_forward_size)
    model = NEO(PatchEmbedding(h.hidden_size, width=16, patch_size=4), pre_buffer, post_llm)
    randomize(model.pre_buffer, seed)
    return model


def relate_embeddings(ours: Path, theirs: Path, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Makes word embeddings of ``theirs`` an affine map of ``ours``, token by token that both vocabularies have."""
    state, known = weights_of(theirs), weights_of(ours)[EMBEDDING]
    rows = token_strings(ours)
    for text, row in token_strings(theirs).items():
        if text in rows:
            state[EMBEDDING][row] = known[rows[text]] @ weight.T + bias
    save_tensors(theirs / "model.safetensors", state)


def word_tokenizer() -> Any:
    """Sixty words, an end of text, ChatML's two tokens, and the image tokens behind a vocabulary of 90."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(60)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.add_tokens([f"filler {n}" for n in range(28)])
    made.add_special_tokens({"additional_special_tokens": ["<IMG_CONTEXT>", "<img>", "</img>"]})
    assert made.convert_tokens_to_ids(["<|im_end|>", "<IMG_CONTEXT>", "<img>", "</img>"]) == [61, 90, 91, 92]
    return made

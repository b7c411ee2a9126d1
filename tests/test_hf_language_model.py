"""The T path as an ordinary language model: transformers computes the same from it, or it is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import randomize, tiny_model, weights_of
from commands import good, neo
from llm_builders import word_tokenizer
from llm_references import CASES, LENGTH, reference
from torch import Tensor

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer
from neo_components.components.ropes.native import Native
from neo_components.export.hf.language_model import (
    language_model_config,
    what_is_lost,
    write_language_model,
)
from neo_components.model.chat import Chat
from neo_components.registry import MASKS, ROPES
from neo_components.types import DocumentTokens

WORDS = 60


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


def trained(folder: Path, seed: int = 5) -> PostLLM:
    """A post-LLM from a folder whose every weight has moved since, H/W parts included."""
    llm = PostLLM.from_pretrained(folder)
    noise = copy.deepcopy(llm)
    randomize(noise, seed, 0.05)
    with torch.no_grad():
        for (name, weight), other in zip(llm.named_parameters(), noise.parameters(), strict=True):
            weight.add_(other - 1 if "norm" in name else other)
    return llm


def text_logits_without_hw(llm: PostLLM, token_ids: torch.Tensor) -> torch.Tensor:
    """``PostLLM.text_logits`` with its H/W keys at zero: what the exported model computes, [B, L, V]."""
    llm = copy.deepcopy(llm)
    with torch.no_grad():
        for layer in llm.layers:
            layer.self_attn.k_proj_hw.weight.zero_()
    return llm.text_logits(token_ids)


@pytest.mark.parametrize(("family", "case"), [(family, case) for family in CASES for case in CASES[family]])
def test_logits_of_transformers_equal_those_of_the_t_path(
    family: str, case: str, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    reference(family, tmp_path / "llm", **CASES[family][case])
    llm = trained(tmp_path / "llm")
    write_language_model(llm, tokenizer, tmp_path / "out")
    written, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, WORDS, (2, LENGTH))
    with torch.no_grad():
        expected = text_logits_without_hw(llm, ids)
        assert float(expected.std()) > 0.1
        # Float32 rounds large logits more coarsely.
        assert torch.allclose(written(ids).logits, expected, atol=1e-5 * max(1.0, float(expected.abs().max())))
        if llm.hparams.window != 1:  # a token that sees itself alone weighs it by 1 whatever its score
            assert not torch.allclose(llm.text_logits(ids), expected, atol=1e-3)
    again = PostLLM.from_pretrained(tmp_path / "out")
    assert {name: again.hparams[name] for name in again.hparams if name != "source"} == {
        name: llm.hparams[name] for name in llm.hparams if name != "source"
    }


def test_a_fresh_post_llm_loses_nothing(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference("qwen3", tmp_path / "llm")
    llm = PostLLM.from_pretrained(tmp_path / "llm")
    assert what_is_lost(llm)[1] == "Its H/W keys are zero, so its logits are those of PostLLM.text_logits."
    out = write_language_model(llm, tokenizer, tmp_path / "out", license="mit")
    ids = torch.randint(0, WORDS, (1, 30))
    with torch.no_grad():
        written = AutoModelForCausalLM.from_pretrained(out)(ids).logits
        assert torch.allclose(written, llm.text_logits(ids), atol=1e-5)
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "reads text only, no images" in card
    assert "at zero, and differ from the model's own" in what_is_lost(trained(tmp_path / "llm"))[1]


def test_tokenizer_and_generation_config(tokenizer: Any, tmp_path: Path) -> None:
    """Every token of the written tokenizer has a row; generation stops where an answer ends. The one given is kept."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference("qwen3", tmp_path / "llm")
    out = write_language_model(PostLLM.from_pretrained(tmp_path / "llm"), tokenizer, tmp_path / "out")
    written = AutoTokenizer.from_pretrained(out)
    assert len(written) == 90 and max(written.get_vocab().values()) == 89
    assert {"<img>", "<IMG_CONTEXT>", "</img>"}.isdisjoint(written.get_vocab())
    assert len(tokenizer) == 93 and tokenizer.padding_side == "right"
    assert written("w5<|im_end|>").input_ids == [5, 61]
    talk = written.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert talk == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    config = AutoModelForCausalLM.from_pretrained(out).generation_config
    assert (sorted(config.eos_token_id), config.pad_token_id, config.do_sample) == ([1, 61], 2, False)
    again = write_language_model(PostLLM.from_pretrained(tmp_path / "llm"), tokenizer, tmp_path / "again")
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in again.iterdir()}


def test_the_text_model_inside_a_vision_language_model(tokenizer: Any, tmp_path: Path) -> None:
    """Gemma 3 is written as the text model that it holds."""
    from transformers import AutoModelForCausalLM

    model = reference("gemma3_text", tmp_path / "llm", **CASES["gemma3_text"]["gqa"])
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    tied = {"tie_word_embeddings": config.pop("tie_word_embeddings")}
    nested = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}
    llm = PostLLM.from_pretrained(tmp_path / "llm")
    llm.hf_config = nested | tied
    out = write_language_model(llm, tokenizer, tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert type(written).__name__ == "Gemma3ForCausalLM"
    ids = torch.randint(0, WORDS, (1, LENGTH))
    with torch.no_grad():
        assert torch.allclose(written(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "biases"),
    [
        ("internlm2", {"bias": False}, False),
        ("internlm2", {}, True),
        ("internlm3", {"qkv_bias": True, "bias": True}, True),
    ],
)
def test_a_family_that_transformers_lacks_is_written_as_llama(
    kind: str, changes: dict[str, Any], biases: bool, tokenizer: Any, tmp_path: Path
) -> None:
    both = {"attention_bias": biases, "mlp_bias": biases and kind == "internlm3"}
    model = reference("llama", tmp_path / "llm", **both)
    llm = PostLLM.from_pretrained(tmp_path / "llm")
    assert llm.hf_config is not None
    llm.hf_config = {n: v for n, v in llm.hf_config.items() if n not in both} | changes | {
        "model_type": kind, "architectures": [f"{kind}ForCausalLM"], "auto_map": {"AutoConfig": "configuration.C"},
    }  # fmt: skip
    config, family = language_model_config(llm)
    assert (config["model_type"], config["architectures"], type(family).__name__) == (
        "llama",
        ["LlamaForCausalLM"],
        "Llama",
    )
    assert "auto_map" not in config
    from transformers import AutoModelForCausalLM

    written = AutoModelForCausalLM.from_pretrained(write_language_model(llm, tokenizer, tmp_path / "out"))
    ids = torch.randint(0, WORDS, (1, 30))
    with torch.no_grad():
        assert torch.allclose(written(ids).logits, model(ids).logits, atol=1e-4)


def test_what_has_no_form_in_transformers_is_refused_by_name(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was not read from a language model in the Hugging Face layout"):
        write_language_model(tiny_model().post_llm, tokenizer, tmp_path / "out")
    reference("qwen3", tmp_path / "llm")
    llm = PostLLM.from_pretrained(tmp_path / "llm")
    other = copy.deepcopy(llm)
    assert other.hf_config is not None
    other.hf_config |= {"rms_norm_eps": 1e-3}
    with pytest.raises(ValueError, match=r"as qwen3: norm_eps is 1e-06, the config says 0\.001; as llama: .*qk_norm"):
        write_language_model(other, tokenizer, tmp_path / "out")
    other.hf_config |= {"model_type": "internlm3", "qkv_bias": True}
    with pytest.raises(ValueError, match="transformers has no causal language model of type 'internlm3'"):
        write_language_model(other, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masks_and_ropes_that_read_text_otherwise_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    reference("qwen3", tmp_path / "llm")
    MASKS.register("everyone")(lambda query, key: query.document == key.document)

    @ROPES.register("swift")
    class Swift(Native):
        def positions(self, document: DocumentTokens) -> Tensor:
            return 2 * super().positions(document)

    try:
        seeing = PostLLM.from_pretrained(tmp_path / "llm", attention="everyone")
        with pytest.raises(ValueError, match="attention 'everyone' does not read text causally"):
            write_language_model(seeing, tokenizer, tmp_path / "out")
        turning = PostLLM.from_pretrained(tmp_path / "llm", rope="swift")
        with pytest.raises(ValueError, match="rope 'swift' rotates the T channels of text by other angles"):
            write_language_model(turning, tokenizer, tmp_path / "out")
    finally:
        MASKS.remove("everyone")
        ROPES.remove("swift")
    assert not (tmp_path / "out").exists()
    flat = PostLLM.from_pretrained(tmp_path / "llm", rope="1d", attention="causal")
    write_language_model(flat, tokenizer, tmp_path / "out")


def test_the_config_stays_with_the_model(tokenizer: Any, tmp_path: Path) -> None:
    """Through our own layout, and through the released one, where it is Qwen3's."""
    reference("phi3", tmp_path / "llm")
    llm = PostLLM.from_pretrained(tmp_path / "llm")
    sizes = {name: llm.hparams[name] for name in ("hidden_size", "num_heads", "num_kv_heads", "head_width")}
    model = NEO(PatchEmbedding(32, width=8, patch_size=4), PreBuffer(1, **sizes, feed_forward_size=8), llm)
    again = NEO.from_pretrained(model.save_pretrained(tmp_path / "neo"))
    assert again.post_llm.hf_config == llm.hf_config
    first = write_language_model(llm, tokenizer, tmp_path / "first")
    second = write_language_model(again.post_llm, tokenizer, tmp_path / "second")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    released = NEO.from_pretrained(tiny_model(post={"base_t": 1e6}).save_pretrained(tmp_path / "old", "released"))
    config, _ = language_model_config(released.post_llm)
    assert (config["model_type"], config["num_hidden_layers"]) == ("qwen3", 2)
    assert "extra_num_layers" not in config and "rope_theta_hw" not in config


def test_command(world: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = neo("export", world / "neo", "--to", "hf-llm", "-o", tmp_path / "llm")
    assert (done.status, done.out) == (0, f"{tmp_path}/llm\n")
    assert "reads text only, no images" in done.err and "Its H/W keys are zero" in done.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    ids = AutoTokenizer.from_pretrained(tmp_path / "llm")("what color is it?", return_tensors="pt").input_ids
    chat = Chat.from_pretrained(world / "neo")
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, chat.model.post_llm.text_logits(ids), atol=1e-5)
    good("export", world / "neo", "--to", "hf-llm", "-o", tmp_path / "half", "--dtype", "bfloat16")
    half = weights_of(tmp_path / "half")
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    tiny_model().save_pretrained(tmp_path / "own")
    chat.tokenizer.save_pretrained(tmp_path / "own")
    refused = neo("export", tmp_path / "own", "--to", "hf-llm", "-o", tmp_path / "none")
    assert refused.status == 1 and "was not read from a language model" in refused.err
    assert not (tmp_path / "none").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "neo").symlink_to(world / "neo")
    assert good("export", tmp_path / "run", "--to", "hf-llm", "-o", tmp_path / "again") == f"{tmp_path}/again\n"

"""Language models of the Hugging Face layout become post-LLMs: the same logits, or a refusal that names the setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    Edit,
    edit_config,
    llm_folder,
    random_image,
    random_sample,
    randomize,
    same_tensors,
)

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer, Sample, pack


def qwen3(folder: Path, seed: int, **options: Any) -> Any:
    """A random Qwen3 of transformers, saved in ``folder``."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 90, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    save = {name: options.pop(name) for name in ("max_shard_size",) if name in options}
    model = Qwen3ForCausalLM(Qwen3Config(**(sizes | options))).eval()
    # A head in place of the word embedding stays tied.
    randomize(model, seed)
    model.save_pretrained(folder, **save)
    return model


QWEN3 = [
    pytest.param({}, id="gqa2"),
    pytest.param({"num_key_value_heads": 4, "head_dim": 8}, id="mha"),
    pytest.param({"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 4}, id="mqa"),
    pytest.param({"tie_word_embeddings": True}, id="tied"),
    pytest.param({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-5}, id="base-eps"),
    pytest.param({"tie_word_embeddings": True, "max_shard_size": "20KB"}, id="tied-sharded"),
]


@pytest.mark.parametrize("options", QWEN3)
@pytest.mark.parametrize("seed", [1, 2])
def test_text_logits_equal_those_of_transformers(options: dict[str, Any], seed: int, tmp_path: Path) -> None:
    reference = qwen3(tmp_path, seed, **options)
    llm = PostLLM.from_pretrained(tmp_path)
    token_ids = torch.randint(0, 90, (2, 37))
    with torch.no_grad():
        expected = reference(token_ids).logits
        assert torch.allclose(llm.text_logits(token_ids), expected, atol=1e-4)
    assert float(expected.std()) > 0.5
    assert (llm.lm_head is None) is bool(options.get("tie_word_embeddings"))
    assert llm.hparams.source == str(tmp_path)
    assert llm.hparams.image_token_id == 90


def test_config_of_older_transformers(tmp_path: Path) -> None:
    """``rope_theta`` beside the other settings, and neither head width nor norm epsilon given."""
    reference = qwen3(tmp_path, 3, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4})

    def older(config: dict[str, Any]) -> None:
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["rope_scaling"] = None
        del config["head_dim"], config["rms_norm_eps"]

    edit_config(tmp_path, older)
    token_ids = torch.randint(0, 90, (1, 20))
    with torch.no_grad():
        assert torch.allclose(
            PostLLM.from_pretrained(tmp_path).text_logits(token_ids), reference(token_ids).logits, atol=1e-4
        )


def test_sharded_files(tmp_path: Path) -> None:
    """Several files with an index read as one; a missing shard or a broken index is named."""
    qwen3(tmp_path / "one", 4)
    qwen3(tmp_path / "many", 4, max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2
    one, many = (PostLLM.from_pretrained(tmp_path / name) for name in ("one", "many"))
    assert same_tensors(one.state_dict(), many.state_dict())
    (tmp_path / "many" / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"index.json names {shards[1]}, which is missing"):
        PostLLM.from_pretrained(tmp_path / "many")
    (tmp_path / "many" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        PostLLM.from_pretrained(tmp_path / "many")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(hidden_act="gelu"), "hidden_act='gelu' (supported: 'silu')"),
        (lambda c: c.update(attention_bias=True), "attention_bias=True (supported: False)"),
        (lambda c: c.update(use_sliding_window=True), "use_sliding_window=True (supported: False)"),
        (lambda c: c.update(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope scaling 'yarn' is not supported"),
        (lambda c: c.update(rope_scaling={"type": "linear", "factor": 2.0}), "rope scaling 'linear' is not supported"),
        (lambda c: c.update(rope_parameters={"rope_type": "llama3", "rope_theta": 1e6}), "rope scaling 'llama3'"),
        (lambda c: c.update(model_type="llama"), "language model type 'llama' is not supported; supported: qwen3"),
        (lambda c: c.pop("model_type"), "language model type None is not supported"),
        (lambda c: c.pop("rope_theta"), "the config gives no rope_theta"),
        (lambda c: c.pop("intermediate_size"), "config.json lacks 'intermediate_size' of a qwen3 model"),
    ],
)
def test_unsupported_settings_are_refused_by_name(edit: Edit, message: str, tmp_path: Path) -> None:
    folder = llm_folder(tmp_path / "llm")
    edit_config(folder, edit)
    with pytest.raises(ValueError) as error:
        PostLLM.from_pretrained(folder)
    assert message in str(error.value)


def test_two_unsupported_settings_are_told_together(tmp_path: Path) -> None:
    folder = llm_folder(tmp_path / "llm")
    edit_config(folder, lambda c: c.update(hidden_act="gelu", attention_bias=True))
    with pytest.raises(ValueError, match=r"hidden_act='gelu' .*; attention_bias=True"):
        PostLLM.from_pretrained(folder)


def tokenizer_file(folder: Path, special: list[str]) -> None:
    """A tokenizer of 20 words and these special tokens."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(20)}, unk_token="w0"))
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("special", "ids"),
    [
        ([], (20, 21, 22)),
        (["<|im_end|>"], (21, 22, 23)),
        (["</img>", "<img>", "<IMG_CONTEXT>"], (22, 21, 20)),
        (["<img>"], (21, 20, 22)),
    ],
    ids=["none", "others", "all", "one"],
)
def test_image_tokens_of_the_tokenizer(special: list[str], ids: tuple[int, ...], tmp_path: Path) -> None:
    """Tokens that it has keep their ids, missing ones get the next free ids."""
    folder = llm_folder(tmp_path / "llm")
    tokenizer_file(folder, special)
    h = PostLLM.from_pretrained(folder).hparams
    assert (h.image_token_id, h.image_start_id, h.image_end_id) == ids


def test_a_vocabulary_without_image_tokens_takes_images(tmp_path: Path) -> None:
    """Their ids lie beyond it, their vectors come from the pre-Buffer's side: forward, loss and generation run."""
    llm = PostLLM.from_pretrained(llm_folder(tmp_path / "llm"))
    names = ("hidden_size", "num_heads", "num_kv_heads", "head_width", "feed_forward_size")
    pre_buffer = PreBuffer(1, **{name: llm.hparams[name] for name in names})
    model = NEO(PatchEmbedding(48, width=16, patch_size=4), pre_buffer, llm)
    spec = model.input_spec
    assert spec.image_ids == (200, 201, 202)
    image = random_image(spec, (1, 2), torch.Generator().manual_seed(0))
    ids = torch.tensor([3, 201, 200, 200, 202, 4, 5])
    batch = pack([Sample(ids, torch.where(ids < 200, ids, -100), [image])], spec)
    out = model(batch)
    assert out.logits.shape == (1, 7, 200)
    assert out.loss is not None
    assert out.loss.isfinite()
    assert len(model.generate([Sample(ids, images=[image]), random_sample(spec, 1, learn=False)], 4)) == 2
    again = NEO.from_pretrained(model.save_pretrained(tmp_path / "own"))
    assert torch.equal(again(batch).logits, out.logits)

"""Language models of the Hugging Face layout become post-LLMs: the same logits, or a refusal that names the setting."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edit_config, llm_folder, random_image, random_sample, same_tensors, weights_of
from llm_references import CASES, DYNAMIC, LENGTH, LINEAR, SIZES, plain, reference, shake

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer, Sample, pack
from neo_components.llms import family_of
from neo_components.llms.family import Config, Sizes
from neo_components.llms.layout import to_stored
from neo_components.llms.llama import Llama
from neo_components.registry import LLM_FAMILIES
from neo_components.storage.weights import save_tensors


def close(llm: PostLLM, model: Any, length: int = 40, within: float = 1e-4) -> bool:
    """Whether a post-LLM gives the logits of a model of transformers."""
    ids = torch.randint(0, 90, (2, length))
    with torch.no_grad():
        return torch.allclose(llm.text_logits(ids), model(ids).logits, atol=within, rtol=0)


def test_where_it_comes_from_is_kept(tmp_path: Path) -> None:
    plain("qwen3", tmp_path)
    h = PostLLM.from_pretrained(tmp_path).hparams
    assert (h.source, h.image_token_id) == (str(tmp_path), 90)


# Configs


CORE = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}


@pytest.mark.parametrize("family", CASES)
def test_what_a_config_leaves_out_is_the_default_of_its_class(family: str, tmp_path: Path) -> None:
    """A folder with the core sizes alone reads as transformers reads it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    core: dict[str, Any] = {"vocab_size": 90, "hidden_size": 128, "intermediate_size": 40, "num_hidden_layers": 7}
    core |= {"num_attention_heads": 32, "pad_token_id": None}
    if family == "gemma3_text":
        core["num_attention_heads"] = 8  # its heads are wide
    if family == "qwen3_moe":
        core |= {"moe_intermediate_size": 8, "num_experts": 9}  # its own are large
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **core), attn_implementation="eager").eval()
    shake(theirs, 1)
    theirs.save_pretrained(tmp_path)
    kept = CORE | {"num_local_experts", "moe_intermediate_size"}
    edit_config(tmp_path, lambda c: [c.pop(name) for name in set(c) - kept])
    # Granite's scores are not scaled down by default: its own float32 logits, up to 9, are 3e-4 from those in float64.
    assert close(PostLLM.from_pretrained(tmp_path), theirs, within=3e-4 if family == "granite" else 1e-4)


def test_config_of_older_transformers(tmp_path: Path) -> None:
    """``rope_theta`` and ``rope_scaling`` beside the other settings, the kind of scaling under its older name."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    theirs = plain("llama", tmp_path, rope_parameters=yarn)

    def older(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
        config["rope_scaling"] = rope | {"type": kind}

    edit_config(tmp_path, older)
    assert close(PostLLM.from_pretrained(tmp_path), theirs)


def test_a_gemma_config_of_older_transformers(tmp_path: Path) -> None:
    """One number says which blocks see all; both rope bases and the scaling of one of them stand side by side."""
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 2e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    }
    theirs = plain("gemma3_text", tmp_path, num_hidden_layers=4, layer_types=types, rope_parameters=ropes)

    def older(config: dict[str, Any]) -> None:
        ropes = config.pop("rope_parameters")
        del config["layer_types"]
        config["sliding_window_pattern"] = 3
        config["rope_theta"] = ropes["full_attention"].pop("rope_theta")
        config["rope_scaling"] = ropes["full_attention"]
        config["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]

    edit_config(tmp_path, older)
    assert close(PostLLM.from_pretrained(tmp_path), theirs)


def test_the_older_name_of_longrope(tmp_path: Path) -> None:
    theirs = reference("phi3", tmp_path, **CASES["phi3"]["longrope"])

    def older(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_scaling"] = {
            "type": "su",
            "long_factor": rope["long_factor"],
            "short_factor": rope["short_factor"],
        }

    edit_config(tmp_path, older)
    assert close(PostLLM.from_pretrained(tmp_path), theirs)


# Files


def test_sharded_files(tmp_path: Path) -> None:
    """Several files with an index read as one; a missing shard or a broken index is named."""
    plain("qwen3", tmp_path / "one")
    plain("qwen3", tmp_path / "many", max_shard_size="20KB")
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


def test_stacked_experts(tmp_path: Path) -> None:
    """Files that hold the experts stacked, as transformers does in memory, read like those with one tensor each."""
    theirs = plain("qwen3_moe", tmp_path)
    one_by_one = PostLLM.from_pretrained(tmp_path)
    state = {name: tensor for name, tensor in weights_of(tmp_path).items() if ".experts." not in name}
    assert len(state) < len(weights_of(tmp_path))
    experts = {name: tensor for name, tensor in theirs.state_dict().items() if ".experts." in name}
    assert len(experts) == 2 * theirs.config.num_hidden_layers
    save_tensors(tmp_path / "model.safetensors", state | experts)
    assert same_tensors(PostLLM.from_pretrained(tmp_path).state_dict(), one_by_one.state_dict())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["model.language_model.", "language_model.model."])
def test_the_language_model_inside_gemma3(layout: str, tied: bool, tmp_path: Path) -> None:
    """A vision-language folder of either layout, its text config cut down to what differs from the defaults."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = SIZES | CASES["gemma3_text"]["linear"] | {"tie_word_embeddings": tied}
    text.pop("attn_implementation")
    sight = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sight |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=sight, tie_word_embeddings=tied, mm_tokens_per_image=4)
    config._attn_implementation = "eager"
    theirs = Gemma3ForConditionalGeneration(config).eval()
    shake(theirs, 1)
    theirs.save_pretrained(tmp_path)
    state = {}
    for name, tensor in theirs.state_dict().items():
        if layout.startswith("language_model"):
            name = "language_model.lm_head.weight" if name == "lm_head.weight" else name.removeprefix("model.")
            name = name.replace("language_model.", "language_model.model.", "lm_head" not in name)
        if not (tied and "lm_head" in name):
            state[name] = tensor
    assert any("vision_tower" in name for name in state)
    save_tensors(tmp_path / "model.safetensors", state)
    llm = PostLLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 90, (2, 40))
    with torch.no_grad():
        expected = theirs(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
        assert torch.allclose(llm.text_logits(ids), expected, atol=1e-4, rtol=0)
    assert (llm.lm_head is None) is tied


def test_rotary_tables_of_older_files_are_not_looked_at(tmp_path: Path) -> None:
    theirs = plain("llama", tmp_path)
    old = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for n in range(3)}
    save_tensors(tmp_path / "model.safetensors", weights_of(tmp_path) | old)
    assert close(PostLLM.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize(
    ("family", "lost", "message"),
    [
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight", "missing: {} -> self_attn.k_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.up_proj.weight", "missing: model.layers.0.mlp.experts.0.gate_proj"),
        ("granite", "model.norm.weight", "missing: {}"),
    ],
)
def test_a_missing_tensor_is_named(family: str, lost: str, message: str, tmp_path: Path) -> None:
    plain(family, tmp_path)
    state = weights_of(tmp_path)
    del state[lost]
    save_tensors(tmp_path / "model.safetensors", state)
    with pytest.raises(ValueError, match="does not fit the model") as error:
        PostLLM.from_pretrained(tmp_path)
    assert message.format(lost) in str(error.value)


@pytest.mark.parametrize(
    ("family", "name", "rows"),
    [("phi3", "self_attn.qkv_proj.weight", 31), ("qwen3_moe", "mlp.experts.2.gate_proj.weight", 11)],
)
def test_a_misshapen_tensor_of_a_group_is_named(family: str, name: str, rows: int, tmp_path: Path) -> None:
    plain(family, tmp_path)
    state = weights_of(tmp_path)
    state[f"model.layers.1.{name}"] = state[f"model.layers.1.{name}"][:rows].clone()
    save_tensors(tmp_path / "model.safetensors", state)
    with pytest.raises(ValueError, match="misshapen: ") as error:
        PostLLM.from_pretrained(tmp_path)
    assert name in str(error.value)


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    plain("phi3", tmp_path)
    extra = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2)}
    save_tensors(tmp_path / "model.safetensors", weights_of(tmp_path) | extra)
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.0\.self_attn\.q_proj\.weight"):
        PostLLM.from_pretrained(tmp_path)


# InternLM: its code lives beside its weights, so the references are models of the same arithmetic in transformers


def internlm2_name(name: str) -> str:
    """Llama's name -> InternLM2's."""
    parts = {
        "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
        "post_attention_layernorm": "ffn_norm", "input_layernorm": "attention_norm",
    }  # fmt: skip
    for part, other in parts.items():
        name = name.replace(part, other)
    return name


def internlm2(folder: Path, bias: bool, **options: Any) -> Any:
    """Turns a saved Llama into an InternLM2 folder: row by row, per key/value head its queries, its key, its value."""
    theirs = plain("llama", folder, attention_bias=bias, **options)
    state, config = weights_of(folder), theirs.config
    width, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    new = {internlm2_name(name): tensor for name, tensor in state.items() if not re.search("[qkv]_proj", name)}
    for layer in range(config.num_hidden_layers):
        for kind in ("weight", "bias") if bias else ("weight",):
            q, k, v = (state[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv")
            rows = []
            for head in range(config.num_key_value_heads):
                rows += [q[head * group * width : (head + 1) * group * width]]
                rows += [k[head * width : (head + 1) * width], v[head * width : (head + 1) * width]]
            new[f"model.layers.{layer}.attention.wqkv.{kind}"] = torch.cat(rows)
    save_tensors(folder / "model.safetensors", new)

    def internlm(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope | {"type": rope.pop("rope_type")}
        config.update(model_type="internlm2", bias=config.pop("attention_bias"), head_dim=None)

    edit_config(folder, internlm)
    return theirs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"num_attention_heads": 8, "num_key_value_heads": 2, "rope_parameters": DYNAMIC},
        {"rope_parameters": LINEAR},
    ],
    ids=["gqa", "mha-tied", "dynamic", "linear"],
)
def test_internlm2(options: dict[str, Any], bias: bool, tmp_path: Path) -> None:
    theirs = internlm2(tmp_path, bias, **options)
    llm = PostLLM.from_pretrained(tmp_path)
    assert close(llm, theirs, 12)
    assert close(llm, theirs, LENGTH)
    new = {id(p) for part in llm.hw_modules() for p in part.parameters()}
    state = {name: p.detach() for name, p in llm.named_parameters() if id(p) not in new}
    assert same_tensors(to_stored(state, LLM_FAMILIES["internlm2"](), dict(llm.hparams)), weights_of(tmp_path))


@pytest.mark.parametrize(
    ("family", "options", "qkv_bias", "bias"),
    [
        ("llama", {"head_dim": 12}, False, False),
        ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": DYNAMIC}, True, True),
        ("qwen2", {"tie_word_embeddings": True}, True, False),
    ],
)
def test_internlm3(family: str, options: dict[str, Any], qkv_bias: bool, bias: bool, tmp_path: Path) -> None:
    theirs = plain(family, tmp_path, **options)
    edit_config(tmp_path, lambda c: c.update(model_type="internlm3", qkv_bias=qkv_bias, bias=bias))
    llm = PostLLM.from_pretrained(tmp_path)
    assert close(llm, theirs, 12)
    assert close(llm, theirs, LENGTH)


# What is refused


@pytest.mark.parametrize(
    ("family", "edit", "message"),
    [
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act='gelu' (supported: 'silu')"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 3},
            "layer_types has sliding_attention, but use_sliding_window",
        ),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers=3"),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, "layer_types has linear_attention (supported: "),
        (
            "llama",
            {"rope_scaling": {"rope_type": "mrope"}},
            "rope scaling 'mrope' is not supported (supported: default",
        ),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling of rope_type 'linear' lacks factor"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "spin": 1}}, "rope scaling 'yarn' with spin"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "holds weights quantized by 'gptq'"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types=['full_attention', "),
        ("smollm3", {"layer_types": ["sliding_attention"] * 5}, "layer_types=['sliding_attention', "),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for num_hidden_layers=5"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 (supported: None)"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 (supported: None)"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "supported: default, longrope"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}, "must have 4 numbers"),
        ("phi3", {"partial_rotary_factor": 0.4, "rope_parameters": None}, "rotary_width must be even"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "experts_per_token must lie in 1 to num_experts (6), got 7"),
        (
            "granite",
            {"model_type": "granitemoe"},
            "model_type 'granitemoe' is unknown; registered: gemma3, ",
        ),
        ("granite", {"model_type": None}, "model_type None is unknown; registered: "),
        ("granite", {"intermediate_size": ...}, "config.json lacks 'intermediate_size' of a granite model"),
    ],
)
def test_unsupported_settings_are_refused_by_name(
    family: str, edit: dict[str, Any], message: str, tmp_path: Path
) -> None:
    plain(family, tmp_path)

    def change(config: dict[str, Any]) -> None:
        config.update(edit)
        for name in [name for name, value in config.items() if value is ...]:
            del config[name]

    edit_config(tmp_path, change)
    with pytest.raises(ValueError) as error:
        PostLLM.from_pretrained(tmp_path)
    assert message in str(error.value)


def test_an_unknown_family_proposes_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"registered: gemma3, .*, smollm3; .*; did you mean 'granite'\?$"):
        family_of({"model_type": "granit"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda sizes: sizes | {"qk_nrm": "none"},
            "gives 'qk_nrm', which PostLLM does not have; did you mean 'qk_norm'?",
        ),
        (lambda sizes: {n: v for n, v in sizes.items() if n != "depth"}, "does not give 'depth', which PostLLM needs"),
    ],
)
def test_a_family_that_does_not_fit_the_post_llm(change: Any, message: str, tmp_path: Path) -> None:
    """The message names the family's class and the argument."""
    plain("llama", tmp_path)
    edit_config(tmp_path, lambda c: c.update(model_type="odd"))

    @LLM_FAMILIES.register("odd")
    class Odd(Llama):
        def sizes(self, config: Config) -> Sizes:
            return change(super().sizes(config))

    try:
        with pytest.raises(ValueError) as error:
            PostLLM.from_pretrained(tmp_path)
    finally:
        LLM_FAMILIES.remove("odd")
    assert "Odd.sizes " + message in str(error.value)


def test_two_unsupported_settings_are_reported_together(tmp_path: Path) -> None:
    plain("gemma3_text", tmp_path)
    edit_config(tmp_path, lambda c: c.update(hidden_activation="gelu", final_logit_softcapping=3.0))
    with pytest.raises(ValueError, match=r"hidden_activation='gelu' .*; final_logit_softcapping=3.0"):
        PostLLM.from_pretrained(tmp_path)


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
    assert spec.image_special_token_ids == (200, 201, 202)
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

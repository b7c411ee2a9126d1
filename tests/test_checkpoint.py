"""Layouts on disk: round trips bit for bit, frozen names, the configs of either released kit, the asset."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    SIZES,
    VOCAB,
    Edit,
    edit_config,
    expressible,
    randomize,
    same_outputs,
    same_tensors,
    tiny_model,
    weights_of,
)

from neo_components import NEO, Bridge, PatchEmbedding, PostLLM, PreBuffer
from neo_components.components.pre_buffer import Anchors, AssetInfo
from neo_components.model.layouts import parts_from_released, released_of


def bridged() -> NEO:
    """Pre-Buffer and post-LLM of different widths."""
    post = PostLLM(VOCAB, 1, **(SIZES | {"hidden_size": 24}))
    patch = PatchEmbedding(32, width=16, patch_size=4, position="sincos")
    model = NEO(patch, PreBuffer(1, **SIZES, base_h=1e3), post, Bridge(24, 32), Bridge(32, 24))
    randomize(model)
    return model


# Round trips


OTHERS: dict[str, dict[str, Any]] = {
    "gemma": {
        "norm": "one_plus_weight", "norm_placement": "both", "activation": "gelu_tanh", "attention_scale": 0.3,
        "window": 4, "window_layers": [0], "window_base_t": 100.0, "embedding_multiplier": 3.0,
    },
    "phi": {
        "qk_norm": "none", "rotary_width": 4, "rope_scaling": {
            "rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0], "factor": 2.0,
            "original_max_position_embeddings": 9,
        },
    },
    "granite": {
        "qkv_bias": True, "output_bias": True, "feed_forward_bias": True, "residual_multiplier": 0.5,
        "logits_divisor": 4.0, "qk_norm": "whole", "norm_placement": "after", "nope_layers": [1],
    },
    "experts": {"num_experts": 3, "experts_per_token": 2, "expert_layers": [1], "expert_size": 12},
}  # fmt: skip
"""Arguments of post-LLMs of other families than Qwen3."""


@pytest.mark.parametrize("kind", ["plain", "tied", "depth-0", "bridged", "1d-causal", *OTHERS])
def test_own_round_trip(kind: str, tmp_path: Path) -> None:
    """The same weights, hyperparameters and outputs; written twice, the same bytes."""
    models: dict[str, Callable[[], NEO]] = {
        "plain": lambda: tiny_model(patch={"fold": 3, "channels": 1}),
        "tied": lambda: tiny_model(post={"tie_embeddings": True, "image_token_id": VOCAB}),
        "depth-0": lambda: tiny_model(pre={"depth": 0}),
        "bridged": bridged,
        "1d-causal": lambda: tiny_model(rope="1d", attention="causal"),
        **{name: partial(tiny_model, post=arguments) for name, arguments in OTHERS.items()},
    }
    model = models[kind]()
    model.save_pretrained(tmp_path / "one")
    again = NEO.from_pretrained(tmp_path / "one")
    assert same_tensors(model.state_dict(), again.state_dict())
    assert same_outputs(model, again)
    for part in ("pre_buffer", "post_llm", "patch_embedding"):
        assert dict(getattr(model, part).hparams) == dict(getattr(again, part).hparams)
    again.save_pretrained(tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert ("post_llm.lm_head.weight" in weights_of(tmp_path / "one")) is (kind != "tied")
    assert json.loads((tmp_path / "one" / "config.json").read_text())["format_version"] == 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fold", [1, 2, 3])
def test_released_round_trip(tied: bool, fold: int, tmp_path: Path) -> None:
    """Own to released and back loses nothing; a tied model's file has no head."""
    model = expressible(tied, patch={"fold": fold, "patch_size": 6, "channels": 2}, base_h=1e3, base_w=1e3)
    again = NEO.from_pretrained(model.save_pretrained(tmp_path / "released", layout="released"))
    assert same_tensors(model.state_dict(), again.state_dict())
    assert same_outputs(model, again)
    state = weights_of(tmp_path / "released")
    assert ("language_model.lm_head.weight" in state) is not tied
    assert state["vision_model.embeddings.patch_embedding.weight"].shape == (16, 2, 6, 6)
    assert state["vision_model.embeddings.dense_embedding.weight"].shape == (32, 16, fold, fold)


def test_reference_round_trip(data_folder: Path, tmp_path: Path) -> None:
    """The reference's file, read, kept in our own layout and written back, has the same names and bits."""
    model = NEO.from_pretrained(data_folder / "model_forward")
    own = NEO.from_pretrained(model.save_pretrained(tmp_path / "own"))
    own.save_pretrained(tmp_path / "released", layout="released")
    assert same_tensors(weights_of(data_folder / "model_forward"), weights_of(tmp_path / "released"))
    theirs, ours = (
        json.loads((folder / "config.json").read_text())
        for folder in (data_folder / "model_forward", tmp_path / "released")
    )
    assert (
        theirs["llm_config"].items()
        >= {k: v for k, v in ours["llm_config"].items() if k not in ("layer_types", "tie_word_embeddings")}.items()
    )
    assert theirs["vision_config"].items() >= ours["vision_config"].items()
    for name in ("img_context_token_id", "img_start_token_id", "hidden_size", "tie_word_embeddings", "model_type"):
        assert ours[name] == theirs[name]


def test_trained_boundary_vectors_reach_the_released_word_embedding(tmp_path: Path) -> None:
    """There is no other place for them there; the outputs of an untied model stay the same."""
    model = tiny_model()
    model.save_pretrained(tmp_path, layout="released")
    table = weights_of(tmp_path)["language_model.model.embed_tokens.weight"]
    assert torch.equal(table[VOCAB - 2 :], model.pre_buffer.boundary)
    assert torch.equal(table[: VOCAB - 2], model.post_llm.word_embedding.weight[: VOCAB - 2])
    assert same_outputs(model, NEO.from_pretrained(tmp_path))


def test_half_precision_files_keep_their_values(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights_of(tmp_path).values())
    again = NEO.from_pretrained(tmp_path)
    assert same_tensors({n: t.float() for n, t in model.state_dict().items()}, again.state_dict())


def test_the_backend_is_a_matter_of_the_machine_and_not_saved(tmp_path: Path) -> None:
    model = tiny_model(backend="eager")
    again = NEO.from_pretrained(model.save_pretrained(tmp_path / "neo"))
    asset = PreBuffer.from_pretrained(model.pre_buffer.save_pretrained(tmp_path / "asset"))
    assert again.post_llm.backend == again.pre_buffer.backend == asset.backend == "auto"


@pytest.mark.parametrize("kind", ["untied", "tied", "bridged"])
def test_names_of_weights_are_frozen(kind: str, data_folder: Path) -> None:
    """A rename needs a converter: files of users have these names. Each line: our name, the released one."""
    frozen = dict(line.split() for line in (data_folder / "weight_names.txt").read_text().splitlines())
    if kind == "tied":
        del frozen["post_llm.lm_head.weight"]
    if kind != "bridged":
        frozen = {name: theirs for name, theirs in frozen.items() if not name.startswith("bridge")}
    one = {"depth": 1}
    model = bridged() if kind == "bridged" else tiny_model(pre=one, post=one | {"tie_embeddings": kind == "tied"})
    assert set(model.state_dict()) == set(frozen)
    released = released_of(model)
    assert {name: released.rename(name) for name, theirs in frozen.items() if theirs != "-"} == {
        name: theirs for name, theirs in frozen.items() if theirs != "-"
    }


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (bridged, r"bridge_in is not None"),
        (bridged, r"hidden_size: pre-Buffer 32, post-LLM 24"),
        (lambda: tiny_model(rope="1d"), r"rope '1d' \(only 'native'\)"),
        (lambda: tiny_model(attention="causal"), r"attention 'causal' \(only 'mixed'\)"),
        (lambda: tiny_model(pre={"feed_forward_size": 40}), r"feed_forward_size: pre-Buffer 40, post-LLM 48"),
        (lambda: tiny_model(base_h=1e3), r"base_h 1000.0 differs from base_w 10000.0"),
        (lambda: tiny_model(patch={"position": "sincos"}), r"patch position 'sincos' \(only 'rotary'\)"),
    ],
)
def test_what_the_released_layout_cannot_hold(make: Callable[[], NEO], fault: str, tmp_path: Path) -> None:
    """Refused by name, nothing written."""
    with pytest.raises(ValueError, match=rf'(?s)cannot hold this model; use layout="neo_components".*{fault}'):
        make().save_pretrained(tmp_path / "out", layout="released")
    assert not (tmp_path / "out").exists()


def test_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout must be 'neo_components' or 'released', got 'hf'"):
        tiny_model().save_pretrained(tmp_path, layout="hf")


# Released configs


@pytest.fixture
def released(data_folder: Path, tmp_path: Path) -> Path:
    """A copy of the reference model's folder."""
    folder = tmp_path / "released"
    shutil.copytree(data_folder / "model_forward", folder, ignore=shutil.ignore_patterns("?_*", "cases.json"))
    return folder


def set_layer_types(count: int | None) -> Edit:
    def edit(config: dict[str, Any]) -> None:
        del config["llm_config"]["layer_types"]
        if count is not None:
            config["llm_config"]["layer_types"] = ["full_attention"] * count

    return edit


def as_tuples(config: dict[str, Any]) -> None:
    """As the inference kit writes them: a trailing comma made tuples of two numbers."""
    for name in ("downsample_ratio", "llm_hidden_size"):
        config["vision_config"][name] = [config["vision_config"][name]]


def all_as_tuples(config: dict[str, Any]) -> None:
    """Every number that is read."""
    for section in (config, config["llm_config"], config["vision_config"]):
        for name, value in section.items():
            if isinstance(value, int | float):
                section[name] = [value]


def tied_at(config: dict[str, Any]) -> None:
    del config["tie_word_embeddings"]
    config["llm_config"]["tie_word_embeddings"] = False


def new_style_rope(config: dict[str, Any]) -> None:
    base = config["llm_config"].pop("rope_theta")
    config["llm_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": base}


@pytest.mark.parametrize(
    "edit",
    [*map(set_layer_types, (None, 0, 1, 99)), as_tuples, all_as_tuples, tied_at, new_style_rope],
    ids=["no-layer-types", "0", "1", "99", "tuples", "all-tuples", "tied-below", "rope-parameters"],
)
def test_configs_that_mean_the_same(edit: Edit, data_folder: Path, released: Path) -> None:
    edit_config(released, edit)
    assert same_outputs(NEO.from_pretrained(data_folder / "model_forward"), NEO.from_pretrained(released))


def test_image_tokens_of_a_config_that_names_none(tmp_path: Path) -> None:
    """Those of the released tokenizers, where the vocabulary is theirs, and their rows of the word embedding."""
    sizes = {"hidden_size": 4, "num_heads": 1, "num_kv_heads": 1, "head_width": 4, "feed_forward_size": 4}
    model = tiny_model(post={"vocab_size": 151936, "image_token_id": 151669}, **sizes)
    model.save_pretrained(tmp_path, layout="released")
    edit_config(tmp_path, lambda config: [config.pop(f"img_{name}_token_id") for name in ("start", "context")])
    again = NEO.from_pretrained(tmp_path)
    assert again.input_spec.image_special_token_ids == (151669, 151670, 151671)
    assert torch.equal(again.pre_buffer.boundary, again.post_llm.word_embedding.weight[151670:151672])
    assert torch.equal(again.pre_buffer.boundary, model.pre_buffer.boundary)


def test_image_tokens_of_the_tokenizer_beside_such_a_config(data_folder: Path, released: Path) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(389)}, unk_token="w0"))
    tokenizer.add_special_tokens(["<IMG_CONTEXT>", "<img>", "</img>"])
    tokenizer.save(str(released / "tokenizer.json"))
    shutil.copy(released / "config_inference_layout.json", released / "config.json")
    again = NEO.from_pretrained(released)
    assert again.input_spec.image_special_token_ids == (389, 390, 391)
    assert same_tensors(again.state_dict(), NEO.from_pretrained(data_folder / "model_forward").state_dict())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["llm_config"].update(hidden_act="gelu"), "hidden_act='gelu' (supported: 'silu')"),
        (lambda c: c["llm_config"].update(attention_bias=True), "attention_bias=True (supported: False)"),
        (lambda c: c["llm_config"].update(use_sliding_window=True), "use_sliding_window=True (supported: False)"),
        (lambda c: c["llm_config"].update(rope_scaling={"rope_type": "yarn", "factor": 4}), "rope scaling 'yarn'"),
        (lambda c: c["llm_config"].pop("rope_theta"), "gives no rope_theta"),
        (lambda c: c["llm_config"].pop("hidden_size"), "lacks 'hidden_size'"),
        (lambda c: c.pop("vision_config"), "lacks 'vision_config'"),
    ],
)
def test_released_configs_that_cannot_be_read(edit: Edit, message: str, released: Path) -> None:
    edit_config(released, edit)
    with pytest.raises(ValueError) as error:
        NEO.from_pretrained(released)
    assert message in str(error.value)


# Sizes of the released models


def released_config(before: int, after: int, width: int, feed_forward: int, heads: int, kit: str) -> dict[str, Any]:
    """A config as one of the two kits writes it; the layer types of the training kit are 32 whatever the depth."""
    depth = before + after
    llm = {
        "model_type": "qwen3", "hidden_size": width, "intermediate_size": feed_forward, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": depth, "extra_num_layers": before,
        "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_theta_hw": 10000.0,
        "rope_scaling": None, "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False,
        "layer_types": ["full_attention"] * (32 if kit == "training" else depth),
    }  # fmt: skip
    vision: dict[str, Any] = {
        "hidden_size": 1024, "llm_hidden_size": width, "patch_size": 16, "num_channels": 3, "downsample_ratio": 0.5,
        "rope_theta_vision": 10000.0,
    }  # fmt: skip
    config = {"model_type": "neo_chat", "tie_word_embeddings": False, "llm_config": llm, "vision_config": vision}
    if kit == "training":
        return config | {"img_context_token_id": 151669, "img_start_token_id": 151670}
    vision |= {"downsample_ratio": [0.5], "llm_hidden_size": [width]}
    return config | {"downsample_ratio": 0.5, "template": "neo1_0"}


RELEASED = [
    pytest.param((12, 28, 2048, 6144, 16), "2.27", id="2.2B"),
    pytest.param((6, 36, 4096, 12288, 32), "9.00", id="9B"),
]


@pytest.mark.parametrize("kit", ["training", "inference"])
@pytest.mark.parametrize(("sizes", "billions"), RELEASED)
def test_sizes_of_the_released_models(
    sizes: tuple[int, int, int, int, int], billions: str, kit: str, tmp_path: Path, data_folder: Path
) -> None:
    """Parameters beside the word embedding and the head; names and shapes of their files, frozen in a list."""
    with torch.device("meta"):
        model = NEO(**parts_from_released(released_config(*sizes, kit), tmp_path))
    assert (len(model.pre_buffer.layers), len(model.post_llm.layers)) == sizes[:2]
    tables = {id(model.post_llm.word_embedding.weight), id(model.post_llm.head_weight)}
    count = sum(p.numel() for p in model.parameters() if id(p) not in tables)
    assert f"{count / 1e9:.2f}" == billions
    assert model.input_spec.image_special_token_ids == (151669, 151670, 151671)
    released, state = released_of(model), model.state_dict()
    del state["pre_buffer.boundary"]
    written = {released.rename(name): list(released.write(name, tensor).shape) for name, tensor in state.items()}
    letters = {"D": sizes[2], "F": sizes[3], "Q": sizes[4] * 128, "V": 151936}
    expected: dict[str, list[int]] = {}
    for line in (data_folder / "released_names.txt").read_text().splitlines():
        name, shape = line.split()
        for number in range(sum(sizes[:2])) if "layers.N." in name else (0,):
            numbers = [letters[part] if part in letters else int(part) for part in shape.split(",")]
            expected[name.replace("layers.N.", f"layers.{number}.")] = numbers
    assert written == expected


@pytest.mark.parametrize("kind", OTHERS)
def test_other_language_models_have_no_released_layout(kind: str, tmp_path: Path) -> None:
    """Each argument that a released config has no word for is named, of the post-LLM and of the pre-Buffer."""
    with pytest.raises(ValueError, match='layout="released" cannot hold this model') as error:
        tiny_model(post=OTHERS[kind]).save_pretrained(tmp_path, layout="released")
    spoken = {
        "window_layers",
        "window_base_t",
        "expert_layers",
        "expert_size",
    }  # of no weight without those they refine
    for name, value in OTHERS[kind].items():
        assert name in spoken or f"{name}: {value!r} (only " in str(error.value)
    with pytest.raises(ValueError, match="norm_placement: 'both' \\(only 'before'\\)"):
        tiny_model(pre={"norm_placement": "both"}).save_pretrained(tmp_path, layout="released")


# The pre-Buffer asset


def test_pre_buffer_round_trip(tmp_path: Path) -> None:
    """Weights, anchors, provenance and card survive; the second writing has the same bytes."""
    pre_buffer = tiny_model(patch={"position": "sincos", "fold": 1}).pre_buffer
    pre_buffer.anchors = Anchors(["the", "Ġcat", "ĊĊ", "é", "日本"], torch.randn(5, 32).half().float())
    pre_buffer.info = AssetInfo({"mean": [0.5], "min_pixels": 1024}, {"steps": 12, "score": 0.5}, "apache-2.0")
    pre_buffer.save_pretrained(tmp_path / "one")
    again = PreBuffer.from_pretrained(tmp_path / "one")
    assert same_tensors(pre_buffer.state_dict(), again.state_dict())
    assert dict(again.hparams) == dict(pre_buffer.hparams)
    assert again.patch_embedding is not None
    assert again.patch_embedding.hparams.position == "sincos"
    assert again.anchors is not None
    assert again.anchors.tokens == pre_buffer.anchors.tokens
    assert torch.equal(again.anchors.vectors, pre_buffer.anchors.vectors)
    assert again.info.image == pre_buffer.info.image
    assert again.info.provenance == pre_buffer.info.provenance
    assert again.info.license == "apache-2.0"
    assert "- steps: 12" in again.info.card
    assert "license: apache-2.0" in again.info.card
    again.save_pretrained(tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["README.md", "anchors.safetensors", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_pre_buffer_computes_alike_in_another_model(tmp_path: Path) -> None:
    """Joined to the same language model again, the reloaded asset gives the same outputs."""
    model = tiny_model()
    asset = PreBuffer.from_pretrained(model.pre_buffer.save_pretrained(tmp_path))
    assert asset.anchors is None
    assert asset.patch_embedding is not None
    assert same_outputs(model, NEO(asset.patch_embedding, asset, model.post_llm))


def test_pre_buffer_is_saved_with_its_patch_embedding(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="saved with its patch embedding; join one by NEO"):
        PreBuffer(1, **SIZES).save_pretrained(tmp_path)

"""A recipe becomes the model that it describes: from scratch, on a language model, from an asset, from a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import random_sample, tiny_model
from recipe_texts import MODEL, faults, written

from neo_components import NEO, PostLLM, build, load_recipe, pack
from neo_components.recipe import (
    Checkpoint,
    Compose,
    import_user_modules,
)
from neo_components.registry import PATCH_EMBEDDINGS, ROPES


def test_a_model_from_scratch_learns(tmp_path: Path) -> None:
    """Text and image through the built model: a finite gradient everywhere, and a step that lowers the loss."""
    text = MODEL + "  rope: {base_t: 1e4, base_w: 100}\n  attention: causal\n  backend: eager\n"
    recipe = load_recipe(written(tmp_path, text), ["model.pre_buffer.depth=3", "model.pre_buffer.num_heads=2"])
    model = build(recipe.model)
    pre, post, patch = model.pre_buffer.hparams, model.post_llm.hparams, model.patch_embedding.hparams
    assert (len(model.pre_buffer.layers), len(model.post_llm.layers)) == (3, 2)
    assert (pre.num_heads, pre.num_kv_heads, pre.head_width, pre.hidden_size) == (2, 2, 8, 32)
    assert (post.num_heads, patch.width, patch.patch_size, patch.hidden_size) == (4, 16, 4, 32)
    for part in (pre, post):
        assert (part.base_t, part.base_h, part.base_w, part.attention) == (1e4, 1e4, 100.0, "causal")
    assert (model.pre_buffer.backend, model.post_llm.backend) == ("eager", "eager")
    batch = pack([random_sample(model.input_spec, seed, images=1) for seed in range(3)], model.input_spec)
    assert len(batch.patches)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.loss(batch)
    before.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    optimizer.step()
    assert model.loss(batch) < before


def test_build_draws_from_the_generator_and_never_seeds_it(tmp_path: Path) -> None:
    model = load_recipe(written(tmp_path, "seed: 5\n" + MODEL)).model
    built = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        built.append(build(model).patch_embedding.patch_proj.weight)
    assert torch.equal(built[0], built[1])
    assert not torch.equal(built[0], built[2])


def test_a_pretrained_language_model_brings_its_own_sizes(tmp_path: Path, data_folder: Path) -> None:
    llm = data_folder / "init_from_llm" / "tied" / "llm"
    text = f"model: {{pre_buffer: {{depth: 1}}, post_llm: {{from_pretrained: {llm}}}, patch_embedding: {{width: 8}}}}"
    path = written(tmp_path, text)
    model = build(load_recipe(path).model)
    expected = PostLLM.from_pretrained(llm)
    assert model.post_llm.hparams == expected.hparams
    assert all(torch.equal(a, b) for a, b in zip(model.post_llm.parameters(), expected.parameters(), strict=True))
    for name in ("hidden_size", "num_heads", "num_kv_heads", "head_width", "feed_forward_size", "norm_eps", "base_t"):
        assert model.pre_buffer.hparams[name] == expected.hparams[name]
    theirs = expected.hparams["base_t"]
    assert build(load_recipe(path, [f"model.rope.base_t={theirs}"]).model).post_llm.hparams["base_t"] == theirs


def test_what_does_not_fit_a_language_model_stops_before_its_weights(tmp_path: Path, data_folder: Path) -> None:
    """A folder that has a config and no weights is enough to refuse."""
    config = (data_folder / "init_from_llm" / "tied" / "llm" / "config.json").read_text()
    llm = written(tmp_path, config, "llm/config.json").parent
    path = written(tmp_path, f"model: {{pre_buffer: {{depth: 1}}, post_llm: {{from_pretrained: {llm}}}}}")
    with pytest.raises(ValueError, match=r"model.rope.base_t is 5.0, but the language model .* was trained with"):
        build(load_recipe(path, ["model.rope.base_t=5"]).model)
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads, got 3 and"):
        build(load_recipe(path, ["model.pre_buffer.num_kv_heads=3"]).model)
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        build(load_recipe(path).model)


def scratch_llm(**changes: Any) -> str:
    sizes = {"vocab_size": 60, "depth": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_width": 8,
             "feed_forward_size": 48} | changes  # fmt: skip
    return "{" + ", ".join(f"{name}: {value}" for name, value in sizes.items()) + "}"


def test_an_asset_is_attached_or_reset(tmp_path: Path) -> None:
    trained = tiny_model(pre={"rope": "1d", "attention": "causal"}, post={"rope": "1d"}).pre_buffer
    folder = trained.save_pretrained(tmp_path / "asset")
    path = written(
        tmp_path,
        f"model: {{pre_buffer: {{from_pretrained: {folder}}}, post_llm: {scratch_llm()}, bridge: identity,"
        " backend: sdpa}",
    )
    kept, fresh = build(load_recipe(path).model), build(load_recipe(path, ["model.pre_buffer.reset=true"]).model)
    state = trained.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in kept.pre_buffer.state_dict().items())
    assert (kept.post_llm.hparams["rope"], kept.post_llm.hparams["attention"]) == ("1d", "causal")
    assert (kept.pre_buffer.backend, kept.post_llm.backend) == ("sdpa", "sdpa")
    assert {n: t.shape for n, t in fresh.pre_buffer.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert fresh.pre_buffer.hparams == kept.pre_buffer.hparams
    for name in ("boundary", "patch_embedding.patch_proj.weight", "layers.0.self_attn.q_proj.weight"):
        assert not torch.allclose(fresh.pre_buffer.state_dict()[name], state[name])
    with pytest.raises(ValueError, match=r"model.rope is 'native', but the pre-Buffer .* was trained with '1d'"):
        build(load_recipe(path, ["model.rope=native"]).model)


def test_an_asset_on_another_width_gets_bridges(tmp_path: Path) -> None:
    folder = tiny_model().pre_buffer.save_pretrained(tmp_path / "asset")
    llm = scratch_llm(hidden_size=24)
    path = written(
        tmp_path,
        f"model: {{pre_buffer: {{from_pretrained: {folder}}}, post_llm: {llm}, bridge: random, text: shared}}\n",
    )
    model = build(load_recipe(path).model)
    assert model.bridge_in is not None and model.bridge_out is not None
    assert (model.bridge_in.hparams["in_width"], model.bridge_in.hparams["out_width"]) == (24, 32)
    with pytest.raises(ValueError, match="no anchors"):
        build(load_recipe(path, ["model.bridge=auto"]).model)


def test_a_checkpoint_is_continued(tmp_path: Path) -> None:
    model = tiny_model()
    folder = model.save_pretrained(tmp_path / "neo")
    recipe = load_recipe(written(tmp_path, f"model: {{from_pretrained: {folder}, backend: eager}}"))
    assert recipe.model == Checkpoint(from_pretrained=str(folder), backend="eager")
    built = build(recipe.model)
    assert isinstance(built, NEO) and built.post_llm.backend == built.pre_buffer.backend == "eager"
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), model.parameters(), strict=True))
    other = build(load_recipe(written(tmp_path, f"model: {{from_pretrained: {folder}, text: bypass}}")).model)
    assert (built.text, other.text) == ("shared", "bypass")


OWN_ROPE = """
from dataclasses import dataclass

from neo_components.components.rotary import pairs
from neo_components.registry import ROPES


@ROPES.register("mine")
@dataclass(frozen=True)
class Mine(ROPES["1d"]):
    spacing: float = 2.5

    def table(self, frequency_t):
        spaced = pairs(0, [frequency / self.spacing for frequency in frequency_t])
        return spaced + spaced
"""


def test_a_rope_of_ones_own_with_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its option is a key of recipes, reaches both stacks, and stays with the saved model."""
    written(tmp_path, OWN_ROPE, "own_package/own_rope.py")
    path = written(tmp_path, MODEL + "  rope: {kind: mine, spacing: 4}\n")
    assert faults(path)[0][1].startswith("unknown rope 'mine'; nearest: ")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        import_user_modules(["own_package.own_rope"])
        recipe = load_recipe(path)
        assert isinstance(recipe.model, Compose)
        assert recipe.model.rope == {"kind": "mine", "spacing": 4.0, "base_t": 1e6}
        model = build(recipe.model)
        plain = build(load_recipe(path, ["model.rope=1d"]).model)
        assert torch.allclose(model.post_llm.rotary.frequency * 4, plain.post_llm.rotary.frequency)
        for stack in (model.pre_buffer, model.post_llm):
            assert stack.hparams["rope"] == {"kind": "mine", "spacing": 4.0}
        again = NEO.from_pretrained(model.save_pretrained(tmp_path / "neo"))
        assert torch.equal(again.pre_buffer.rotary.frequency, model.pre_buffer.rotary.frequency)
        assert build(load_recipe(path, ["model.rope=mine"]).model).post_llm.hparams["rope"]["spacing"] == 2.5
        assert [key for key, _ in faults(path, "model.rope.spacing=far", "model.rope.base_h=9")] == [
            "model.rope.spacing",
            "model.rope.base_h",
        ]
    finally:
        ROPES.remove("mine")
        for name in ("own_package.own_rope", "own_package"):
            sys.modules.pop(name, None)


def test_a_module_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match=r"--import no_such.module: no such module; looked in "):
        import_user_modules(["no_such.module"])
    written(tmp_path, "import not_installed_here\n", "half_there.py")
    with pytest.raises(
        ValueError, match=r"--import half_there: it imports 'not_installed_here', which is not installed"
    ):
        import_user_modules(["half_there"])


OWN = """
from neo_components import PatchEmbedding
from neo_components.registry import PATCH_EMBEDDINGS, ROPES


@PATCH_EMBEDDINGS.register("scaled")
class Scaled(PatchEmbedding):
    def __init__(self, hidden_size: int, gain: float, width: int = 8) -> None:
        super().__init__(hidden_size, width, patch_size=4)
        self.gain = gain

    def forward(self, *args):
        return super().forward(*args) * self.gain
"""


def test_a_patch_embedding_of_ones_own_with_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered by ``--import``: its options are keys of recipes, checked and completed like all others."""
    written(tmp_path, OWN, "own_scaled.py")
    path = written(tmp_path, MODEL.replace("{width: 16, patch_size: 4}", "{kind: scaled, gain: 3}"))
    [(key, text)] = faults(path)
    assert key == "model.patch_embedding.kind"
    assert text.startswith("unknown patch_embedding 'scaled'; nearest: ")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        import_user_modules(["own_scaled"])
        recipe = load_recipe(path)
        assert isinstance(recipe.model, Compose)
        assert recipe.model.patch_embedding == {"kind": "scaled", "gain": 3.0, "width": 8}
        assert load_recipe(written(tmp_path, recipe.to_yaml(), "complete.yaml")).model == recipe.model
        model = build(recipe.model)
        assert (type(model.patch_embedding).__name__, model.patch_embedding.gain) == ("Scaled", 3.0)
        one = random_sample(model.input_spec, 0, images=1)
        assert model.loss(pack([one], model.input_spec)).isfinite()
        assert faults(path, "model.patch_embedding.gain=much", "model.patch_embedding.widht=3") == [
            ("model.patch_embedding.gain", "got 'much' (str), wanted float (a finite number)"),
            (
                "model.patch_embedding.widht",
                "is no option of patch_embedding 'scaled'; nearest: model.patch_embedding.width "
                "(valid here: kind, gain, width)",
            ),
        ]
        assert faults(path, "model.patch_embedding={kind: scaled}") == []  # sections merge key by key
        child = written(tmp_path, f"extends: {path.name}\nmodel: {{patch_embedding: {{kind: neo}}}}\n", "child.yaml")
        assert faults(child) == [
            (
                "model.patch_embedding.gain",
                "is no option of patch_embedding 'neo'; nearest: model.patch_embedding.position (valid here: kind, "
                "width, patch_size, fold, channels, position, base); null takes away what an extended recipe has",
            )
        ]
        assert faults(child, "model.patch_embedding.gain=null") == []
        assert faults(path, "model.patch_embedding=scaled") == [
            ("model.patch_embedding", "lacks model.patch_embedding.gain")
        ]
    finally:
        PATCH_EMBEDDINGS.remove("scaled")
        sys.modules.pop("own_scaled", None)

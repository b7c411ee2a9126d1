"""A model whose weights are deferred gets the very weights that it would have had at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import expressible, tiny_model
from llm_references import plain
from torch import Tensor, nn

from neo_components import NEO, PatchEmbedding, load_recipe
from neo_components.model.attach import export_pre_buffer
from neo_components.recipe import build
from neo_components.registry import PATCH_EMBEDDINGS
from neo_components.storage.deferred import Deferred, filled, new_weights, to_meta, unfilled

SMALL = "vocab_size: 60, depth: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, head_width: 8, feed_forward_size: 48"


def check(folder: Path, text: str) -> None:
    """Builds the model section twice and compares every weight, and the random numbers behind."""
    path = folder / "recipe.yaml"
    path.write_text(f"model: {text}\n")
    recipe = load_recipe(path)
    torch.manual_seed(7)
    at_once = build(recipe.model)
    after = torch.rand(3)
    torch.manual_seed(7)
    with Deferred() as deferred:
        model = build(recipe.model)
    assert torch.equal(torch.rand(3), after)
    assert sum(p.is_meta for p in model.parameters()) > 20
    torch.manual_seed(11)  # what is drawn later depends on nothing but the build
    known = to_meta(model)
    deferred.materialize(model, torch.device("cpu"), known)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(11)))
    for (name, parameter), (other, value) in zip(at_once.named_parameters(), model.named_parameters(), strict=True):
        assert name == other and value.dtype == parameter.dtype, name
        assert torch.equal(value, parameter), name
    for (name, buffer), own in zip(at_once.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(buffer, own), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_weights(tmp_path: Path, dtype: str) -> None:
    post = f"{{{SMALL}, num_experts: 4, experts_per_token: 2, qkv_bias: true}}"
    check(tmp_path, f"{{patch_embedding: {{width: 16}}, pre_buffer: {{depth: 2}}, post_llm: {post}, dtype: {dtype}}}")


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_a_language_model_from_its_files(tmp_path: Path, family: str) -> None:
    """Also where the files hold several of our tensors in one; the H/W queries are computed from others."""
    plain(family, tmp_path / "llm")
    check(tmp_path, f"{{pre_buffer: {{depth: 1}}, post_llm: {{from_pretrained: {tmp_path}/llm}}}}")


@pytest.mark.parametrize("layout", ["neo_components", "released"])
def test_a_trained_model(tmp_path: Path, layout: str) -> None:
    expressible().save_pretrained(tmp_path / "neo", layout=layout)
    check(tmp_path, f"{{from_pretrained: {tmp_path}/neo, dtype: bfloat16}}")


def test_an_asset_with_fitted_bridges(world: Path, tmp_path: Path) -> None:
    """The bridges are fitted on real word embeddings."""
    model = NEO.from_pretrained(world / "neo")
    export_pre_buffer(model, tmp_path / "asset", world / "neo", 4096)
    for more in ("", ", reset: true"):
        pre = f"{{from_pretrained: {tmp_path}/asset{more}}}"
        check(tmp_path, f"{{pre_buffer: {pre}, post_llm: {{from_pretrained: {world}/other}}, bridge: least_squares}}")


class Layer(nn.Linear):
    """A part that sets its own weights, or forgets its bias."""

    forgets = False

    def init_weights(self) -> None:
        nn.init.normal_(self.weight)
        if not self.forgets:
            nn.init.zeros_(self.bias)


def test_parts_can_be_filled_before_the_model() -> None:
    """The same weights as at once, once or for a moment."""
    torch.manual_seed(3)
    at_once = new_weights(lambda: Layer(5, 4))
    torch.manual_seed(3)
    with Deferred() as deferred:
        layer = new_weights(lambda: Layer(5, 4))
        with filled(layer):
            assert torch.equal(layer.weight, at_once.weight)
        assert layer.weight.is_meta
        deferred.fill(layer)
    assert torch.equal(layer.weight, at_once.weight) and torch.equal(layer.bias, at_once.bias)
    assert at_once.weight.std() > 0.5 and not at_once.bias.any()


@PATCH_EMBEDDINGS.register("tabled")
class Tabled(PatchEmbedding):
    """A patch embedding with tables that no file holds, and one that files hold."""

    def __init__(self, hidden_size: int, **arguments: Any) -> None:
        super().__init__(hidden_size, **arguments)
        self.register_buffer("table", torch.arange(hidden_size) / 8, persistent=False)
        self.register_buffer("count", torch.ones(()))

    def forward(self, patches: Tensor, patch_positions: Tensor, image_grids: Tensor | None = None) -> Tensor:
        return super().forward(patches, patch_positions) * self.count + self.table

    def init_weights(self) -> None:
        for projection in (self.patch_proj, self.token_proj):
            projection.reset_parameters()


def test_tables_of_a_part_keep_their_values(tmp_path: Path) -> None:
    """Buffers are no weights: neither loading nor building for later may lose them."""
    model = tiny_model()
    model = NEO(Tabled(32, width=16, patch_size=4), model.pre_buffer, model.post_llm)
    model.patch_embedding.count.fill_(3)
    model.save_pretrained(tmp_path / "neo")
    for loaded in (NEO.from_pretrained(tmp_path / "neo"), NEO.from_pretrained(tmp_path / "neo", dtype="bfloat16")):
        assert loaded.patch_embedding.table.tolist() == (torch.arange(32) / 8).tolist()
        assert loaded.patch_embedding.count == 3
    check(tmp_path, f"{{from_pretrained: {tmp_path}/neo}}")
    check(tmp_path, f"{{patch_embedding: {{kind: tabled}}, pre_buffer: {{depth: 2}}, post_llm: {{{SMALL}}}}}")


def test_a_weight_without_a_value_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layer, "forgets", True)
    with Deferred() as deferred:
        layer = new_weights(lambda: Layer(2, 2))
    with pytest.raises(ValueError, match=r"1 weights are not a number after the start, for example bias"):
        deferred.materialize(layer, torch.device("cpu"), {})
    with Deferred() as deferred, unfilled():
        layer = Layer(2, 2)
    with pytest.raises(ValueError, match=r"2 weights are not a number after the start, for example weight"):
        deferred.materialize(layer, torch.device("cpu"), {})

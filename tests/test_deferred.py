"""A deferred model has, piece by piece, the very weights that it would have had at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import expressible
from llm_references import plain
from torch import nn

from neo_components import NEO, load_recipe
from neo_components.data.text.conversation import load_tokenizer  # noqa: F401 - registers nothing; the world's tokenizer
from neo_components.model.attach import export_pre_buffer
from neo_components.recipe import build
from neo_components.storage.deferred import Deferred, Source, filled, new_weights, unfilled

SMALL = "vocab_size: 60, depth: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, head_width: 8, feed_forward_size: 48"


def check(folder: Path, text: str) -> None:
    """Builds the model section twice and compares every weight, whole and by rows, and the random numbers behind."""
    path = folder / "recipe.yaml"
    path.write_text(f"model: {text}\n")
    recipe = load_recipe(path)
    torch.manual_seed(7)
    at_once = build(recipe.model)
    after = torch.rand(3)
    torch.manual_seed(7)
    with Deferred() as notes:
        model = build(recipe.model)
        sources = notes.sources(model)
    assert torch.equal(torch.rand(3), after)
    assert {p.device.type for p in model.parameters()} <= {"meta", "cpu"}
    assert sum(p.is_meta for p in model.parameters()) > 20
    torch.manual_seed(11)  # what is drawn later depends on nothing but the notes
    for name, parameter in at_once.named_parameters():
        value = sources[name].value()
        assert value.dtype == parameter.dtype, name
        assert torch.equal(value, parameter), name
        middle = len(parameter) // 2
        assert torch.equal(sources[name].rows(1, middle), parameter[1:middle]), name
    assert [name for name, _ in model.named_parameters()] == list(sources) == [n for n, _ in at_once.named_parameters()]
    for (name, buffer), other in zip(at_once.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(buffer, other[1]), name


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


def test_parts_can_be_filled(tmp_path: Path) -> None:
    torch.manual_seed(3)
    at_once = nn.Linear(5, 4)
    torch.manual_seed(3)
    with Deferred() as notes:
        with new_weights():
            layer = nn.Linear(5, 4)
        with filled(layer):
            assert torch.equal(layer.weight, at_once.weight)
        assert layer.weight.is_meta
        notes.fill(layer)
    assert torch.equal(layer.weight, at_once.weight) and torch.equal(layer.bias, at_once.bias)


def test_changes_of_a_part_and_views_are_noted() -> None:
    def make() -> torch.Tensor:
        table = torch.zeros(4, 6)
        table[1:3, ::2] = torch.randn(2, 3)
        table.T[0] += 1.0
        return (table.T * 2).contiguous().view(8, 3)

    torch.manual_seed(0)
    expected = make()
    torch.manual_seed(0)
    with Deferred() as notes:
        with new_weights():
            table = make()
        source: Source = notes.source(table)
    assert table.is_meta and torch.equal(source.value(), expected)


def test_a_weight_without_a_value_is_told() -> None:
    with Deferred() as notes, unfilled():
        source = notes.source(nn.Linear(2, 2).weight)
    with pytest.raises(ValueError, match="never given a value"):
        source.value()

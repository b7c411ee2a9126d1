"""Programs of ``torch.export``: loaded with torch alone they compute what the library does, for sizes never seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import random_batch, tiny_model
from commands import good
from llm_builders import native_model, text_llm

from neo_components import NEO, attach
from neo_components.export.torch_export import write_programs
from neo_components.model.attach import export_pre_buffer, image_features
from neo_components.storage.weights import save_tensors

MODES = ("shared", "bypass")
GRIDS = ((2, 2), (3, 5), (7, 4))
CHILD = """
import importlib.abc, json, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("neo_components", "lightning", "omegaconf", "torchmetrics", "webdataset"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file, save_file
root = sys.argv[1]
out = {}
with torch.no_grad():
    for mode in ("shared", "bypass"):
        images = torch.export.load(f"{root}/{mode}/images.pt2").module()
        inputs = torch.export.load(f"{root}/{mode}/inputs.pt2").module()
        given = load_file(f"{root}/{mode}/given.safetensors")
        for name in [n for n in given if n.startswith("image_")]:
            out[f"{mode}.{name}"] = images(given[name]).contiguous()
        assert "transformers" not in sys.modules or mode == "bypass"
        from transformers import AutoModelForCausalLM
        llm = AutoModelForCausalLM.from_pretrained(f"{root}/llm", attn_implementation="sdpa").eval()
        embed = llm.get_input_embeddings()
        number = 0
        while f"ids_{number}" in given:
            ids = given[f"ids_{number}"]
            words = embed(ids.clamp(max=embed.num_embeddings - 1))
            x, positions, mask = inputs(ids, words, given[f"patches_{number}"], given[f"places_{number}"])
            out[f"{mode}.logits_{number}"] = llm(inputs_embeds=x, position_ids=positions, attention_mask=mask).logits
            number += 1
save_file(out, f"{root}/out.safetensors")
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the library computes, and what a program without it does, on the same inputs."""
    root = tmp_path_factory.mktemp("programs")
    source, llm = text_llm(root / "source"), text_llm(root / "llm", hidden_size=48, heads=3, vocab_size=290, seed=5)
    asset = export_pre_buffer(native_model(source), root / "asset", source)
    expected: dict[str, torch.Tensor] = {}
    for mode in MODES:
        model = attach(asset, llm, text=mode).eval()
        write_programs(model, root / mode)
        given: dict[str, torch.Tensor] = {}
        pictures = [torch.randn(3, 8 * rows, 8 * columns) for rows, columns in GRIDS]
        with torch.no_grad():
            for picture, found in zip(pictures, image_features(model.pre_buffer, pictures), strict=True):
                name = f"image_{picture.shape[1]}"
                given[name], expected[f"{mode}.{name}"] = picture, found
            for number, images in enumerate((2, 2, 2)):
                batch, _ = random_batch(
                    model.input_spec, seed=20 + number, rows=1, documents=1, padding=0, images=images
                )
                given[f"ids_{number}"] = batch.token_ids
                given[f"patches_{number}"], given[f"places_{number}"] = batch.patches, batch.patch_positions
                expected[f"{mode}.logits_{number}"] = model(batch).logits
        save_tensors(root / mode / "given.safetensors", given)
    child = subprocess.run([sys.executable, "-c", CHILD, root], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    from safetensors.torch import load_file

    return expected, load_file(root / "out.safetensors")


def test_visual_tokens_of_every_size(done: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    expected, found = done
    names = [name for name in expected if "image" in name]
    assert len(names) == len(MODES) * len(GRIDS)
    for name in names:
        assert found[name].shape == expected[name].shape
        assert torch.allclose(found[name], expected[name], atol=1e-4), name


def test_a_plain_language_model_answers_as_the_whole_model(
    done: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    """An attached model's H/W scores are 0, so embeddings, positions and mask are all that a plain model needs."""
    expected, found = done
    names = [name for name in expected if "logits" in name]
    assert len(names) == 3 * len(MODES)
    for name in names:
        assert torch.allclose(found[name], expected[name], atol=1e-4), name
    assert not torch.allclose(found["shared.logits_0"], found["bypass.logits_0"], atol=1e-2)


def test_plain_positions_and_what_is_told(tmp_path: Path) -> None:
    model = tiny_model(pre={"rope": "1d"}, post={"rope": "1d"})
    folder = write_programs(model, tmp_path / "programs", {"min_pixels": 64})
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "images.pt2", "inputs.pt2", "program.json"]
    told = json.loads((folder / "program.json").read_text())
    assert (told["image_token_id"], told["patch_size"], told["fold"], told["text"]) == (57, 4, 2, "shared")
    assert told["image"] == {"min_pixels": 64} and told["format_version"] == 1
    assert (told["device"], told["dtype"]) == ("cpu", "float32")
    inputs: Any = torch.export.load(folder / "inputs.pt2").module()
    batch, _ = random_batch(model.input_spec, seed=5, rows=1, documents=1, padding=0, images=2)
    with torch.no_grad():
        words = model.post_llm.embed(batch.token_ids)
        x, positions, mask = inputs(batch.token_ids, words, batch.patches, batch.patch_positions)
        states = model(batch, output_hidden_states=True).hidden_states
    assert states is not None and torch.allclose(x, states["layer_1"], atol=1e-4)
    assert torch.equal(positions, batch.positions[..., 0])
    see = (torch.tril(torch.ones(positions.shape[1], positions.shape[1])) > 0)[None]
    image = batch.image_ids
    same = (image[:, :, None] == image[:, None]) & (image[:, :, None] >= 0)
    assert torch.equal(mask[:, 0], see | same)


def test_image_features_are_the_same_alone_and_pooled() -> None:
    model = tiny_model()
    pictures = [torch.randn(3, 8, 16), torch.randn(3, 24, 8)]
    tokens = image_features(model.pre_buffer, pictures)
    assert [tuple(t.shape) for t in tokens] == [(1, 2, 32), (3, 1, 32)]
    pooled = image_features(model.pre_buffer, pictures, pooled=True)
    assert torch.allclose(torch.stack([t.mean((0, 1)) for t in tokens]), torch.stack(pooled), atol=1e-6)
    assert torch.allclose(image_features(model.pre_buffer, pictures[1:])[0], tokens[1], atol=1e-5)
    with pytest.raises(ValueError, match=r"image of shape \(3, 9, 8\); it must be"):
        image_features(model.pre_buffer, [torch.zeros(3, 9, 8)])


def test_what_no_program_can_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="experts runs each of them on a number of tokens"):
        write_programs(tiny_model(pre={"num_experts": 2, "experts_per_token": 1}), tmp_path)
    scaled = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
    with pytest.raises(ValueError, match="depend on a document's length"):
        write_programs(tiny_model(pre={"rope_scaling": scaled}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command(world: Path, tmp_path: Path) -> None:
    assert good("export", world / "neo", "--to", "program", "-o", tmp_path / "p") == f"{tmp_path / 'p'}\n"
    told = json.loads((tmp_path / "p" / "program.json").read_text())
    assert told["image"]["max_pixels"] == 1024
    assert NEO.from_pretrained(world / "neo").input_spec.image_token_id == told["image_token_id"]

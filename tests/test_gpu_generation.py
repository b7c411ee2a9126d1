"""On a GPU: generation gives a CPU's tokens, and exported programs compute what the model does.

``--gpu-device cpu`` runs the same tests on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCAB, random_batch, random_image, random_sample, tiny_model
from torch import Tensor

from neo_components import NEO
from neo_components.export.torch_export import write_programs
from neo_components.model.attach import image_features

pytestmark = pytest.mark.gpu

NEW = 40
"""Enough that a GPU captures the steps as a graph."""


def speaker(**options: Any) -> NEO:
    """A model that cannot generate image tokens: their ids lie beyond its vocabulary."""
    return tiny_model(post={"image_token_id": VOCAB} | options).eval()


WAYS: list[dict[str, Any]] = [{}, {"compile": False}, {"compile": True}]
"""How steps are taken; by default a GPU captures them as a graph, over a cache of fixed size."""


@pytest.mark.parametrize("options", WAYS, ids=["default", "plain", "compiled"])
@pytest.mark.parametrize("post", [{}, {"window": 5}], ids=["full", "window"])
def test_generation_gives_the_tokens_of_a_cpu(
    post: dict[str, Any], options: dict[str, Any], gpu_device: torch.device
) -> None:
    """Greedy tokens in float32 of prompts of different lengths, with and without images, in one call."""
    exact, other = speaker(**post), speaker(**post).to(gpu_device)
    prompts = [random_sample(exact.input_spec, seed, images=seed % 3, learn=False) for seed in range(6)]
    wanted = [tokens.tolist() for tokens in exact.generate(prompts, max_new_tokens=NEW)]
    found = other.generate(prompts, max_new_tokens=NEW, **options)
    assert [tokens.tolist() for tokens in found] == wanted
    assert len({tuple(tokens) for tokens in wanted}) == len(prompts)
    stop = [wanted[1][2], wanted[4][0]]
    ended = other.generate(prompts, max_new_tokens=NEW, stop_token_ids=stop, **options)
    for tokens, free in zip(ended, wanted, strict=True):
        ends = [number for number, token in enumerate(free) if token in stop]
        assert tokens.tolist() == (free[: ends[0] + 1] if ends else free)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["float32", "bfloat16"]
)
def test_logits_are_those_of_a_cpu(dtype: torch.dtype, tolerance: float, gpu_device: torch.device) -> None:
    """Relative, in norm, beside float32; weights and all else in the type."""
    exact, other = speaker(), speaker().to(gpu_device, dtype)
    batch, _ = random_batch(exact.input_spec, seed=3, padding=0)
    with torch.no_grad():
        wanted, found = exact(batch).logits, other(batch.to(gpu_device)).logits
    real = batch.document_ids >= 0
    off = (found.cpu().float()[real] - wanted[real]).norm() / wanted[real].norm()
    assert 0 < float(off) < tolerance or (dtype == torch.float32 and gpu_device.type == "cpu")


def test_exported_programs(tmp_path: Path, gpu_device: torch.device) -> None:
    """Written on the device, loaded by torch alone and run there, for sizes that the export has not seen."""
    model = tiny_model(pre={"depth": 1}, post={"depth": 1}).eval()
    grids = ((2, 2), (3, 5), (7, 4))
    images = [random_image(model.input_spec, grid, torch.Generator().manual_seed(1)) for grid in grids]
    batch, _ = random_batch(model.input_spec, seed=5, rows=1, documents=1, padding=0, images=2)
    with torch.no_grad():
        expected = image_features(model.pre_buffer, images)
        words = model.post_llm.embed(batch.token_ids)
        hidden: dict[str, Tensor] = {}
        model.hidden(batch, hidden_states=hidden)
    folder = write_programs(model.to(gpu_device), tmp_path / "programs")
    tower = torch.export.load(folder / "images.pt2").module()
    inputs = torch.export.load(folder / "inputs.pt2").module()
    with torch.no_grad():
        for image, exact in zip(images, expected, strict=True):
            assert torch.allclose(tower(image.to(gpu_device)).cpu(), exact, atol=1e-4)
        given = (batch.token_ids, words, batch.patches, batch.patch_positions)
        x, positions, mask = inputs(*(tensor.to(gpu_device) for tensor in given))
    assert torch.allclose(x.cpu(), hidden["layer_0"], atol=1e-4)
    assert torch.equal(positions.cpu(), batch.positions[..., 0])
    assert mask.shape == (1, 1, batch.token_ids.shape[1], batch.token_ids.shape[1])
    assert x.device == positions.device == mask.device

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

NEW = 12


def speaker(**options: Any) -> NEO:
    """A model that cannot generate image tokens: their ids lie beyond its vocabulary."""
    return tiny_model(post={"image_token_id": VOCAB} | options).eval()


def logits_of(model: NEO, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collects what the head gives at each step."""
    head, steps = model.post_llm.logits, []
    monkeypatch.setattr(
        model.post_llm, "logits", lambda hidden: steps.append(head(hidden).detach().cpu()) or head(hidden)
    )
    return steps


@pytest.mark.parametrize(
    ("post", "dtype"),
    [
        pytest.param({}, torch.float32, id="float32"),
        pytest.param({"window": 5}, torch.float32, id="float32-window"),
        pytest.param({}, torch.bfloat16, id="bfloat16"),
    ],
)
def test_generation_gives_the_tokens_of_a_cpu(
    post: dict[str, Any], dtype: torch.dtype, gpu_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy tokens of prompts of different lengths, with and without images, in one call. In float32 all are equal,
    and the logits within 1e-4; in bfloat16 the first logits are within 3 % of those in float32, in norm."""
    exact, other = speaker(**post), speaker(**post).to(gpu_device, dtype)
    prompts = [random_sample(exact.input_spec, seed, images=seed % 3, learn=False) for seed in range(6)]
    expected, found = logits_of(exact, monkeypatch), logits_of(other, monkeypatch)
    wanted = exact.generate(prompts, max_new_tokens=NEW)
    given = other.generate(prompts, max_new_tokens=NEW)
    assert [len(tokens) for tokens in given] == [NEW] * len(prompts)
    assert all(tokens.dtype == torch.int64 and int(tokens.max()) < VOCAB for tokens in given)
    if dtype == torch.float32:
        assert [tokens.tolist() for tokens in given] == [tokens.tolist() for tokens in wanted]
        assert torch.allclose(torch.stack(found), torch.stack(expected), atol=1e-4)
    assert float((found[0] - expected[0]).norm() / expected[0].norm()) < (1e-5 if dtype == torch.float32 else 3e-2)


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

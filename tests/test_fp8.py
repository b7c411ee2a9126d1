"""FP8 linear layers: which ones are converted, how far a step moves, and where the key is refused."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from builders import random_batch, tiny_model
from torch import nn

from neo_components import NEO
from neo_components.recipe.stage import LINEAR, LoRA, StageConfig
from neo_components.training import fp8
from neo_components.training.fp8 import use_fp8, without_fp8
from neo_components.training.fsdp2.strategy import refuse_unshardable
from neo_components.training.groups import train_only
from neo_components.training.module import NEOTraining

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed: pip install torchao"
)


def staged(**changes: Any) -> StageConfig:
    return StageConfig(**{"train": ("all",), "fp8": "emulated"} | changes)


def wide_model(groups: list[str], **post: Any) -> NEO:
    model = tiny_model(hidden_size=64, head_width=16, feed_forward_size=96, post=post)
    train_only(model, groups)
    return model


def converted(model: NEO) -> list[str]:
    return [name for name, part in model.named_modules() if type(part).__name__ == "Float8Linear"]


@needs_torchao
def test_which_layers_are_converted() -> None:
    """The language model's own of every block that trains; never the head, the H/W projections or a frozen layer."""
    model = wide_model(["all"])
    names, weights = model.state_dict().keys(), [id(p) for p in model.parameters()]
    assert use_fp8(model, staged()) == 4 * len(LINEAR)
    stacks = [f"{stack}.layers.{n}" for stack in ("pre_buffer", "post_llm") for n in range(2)]
    expected = {f"{at}.{'self_attn' if name[1:] == '_proj' else 'mlp'}.{name}" for at in stacks for name in LINEAR}
    assert set(converted(model)) == expected
    assert model.state_dict().keys() == names and [id(p) for p in model.parameters()] == weights
    frozen = wide_model(["pre_buffer"])
    assert use_fp8(frozen, staged()) == 2 * len(LINEAR)
    assert all(name.startswith("pre_buffer") for name in converted(frozen))
    without_fp8(model)
    assert converted(model) == []
    with pytest.raises(ValueError, match=r"stage\.fp8: emulated: no linear layer of a block trains"):
        use_fp8(wide_model(["patch_embedding"]), staged())
    narrow = tiny_model(hidden_size=40)
    with pytest.raises(ValueError, match="has widths that 16 divides; use none"):
        use_fp8(narrow, staged())


@needs_torchao
def test_a_step_stays_close() -> None:
    """Float8 has 3 or 2 bits of fraction: the loss moves by less than a fiftieth, and gradients mostly keep their
    direction, in random weights of ten times the usual size. A plain model again computes what it computed before."""
    model, other = wide_model(["all"]), wide_model(["all"])
    batch, _ = random_batch(model.input_spec, seed=1)
    use_fp8(other, staged())
    losses = [one.loss(batch) for one in (model, other)]
    for loss in losses:
        loss.backward()
    plain, rounded = (float(loss.detach()) for loss in losses)
    assert rounded != plain and rounded == pytest.approx(plain, rel=0.02)
    gradients = [
        torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None]) for one in (model, other)
    ]
    assert float(nn.functional.cosine_similarity(*gradients, dim=0)) > 0.85
    without_fp8(other)
    assert torch.equal(other.loss(batch), model.loss(batch))


def test_where_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"stage\.fp8: got emulated, which has no form beside stage\.lora"):
        staged(train=("pre_buffer",), lora=LoRA())
    with pytest.raises(ValueError, match=r"stage\.fp8: emulated is not tested on sharded weights"):
        refuse_unshardable(staged())
    assert use_fp8(tiny_model(), StageConfig(train=("all",))) == 0
    found = importlib.util.find_spec
    monkeypatch.setattr(fp8.importlib.util, "find_spec", lambda name: None if name == "torchao" else found(name))
    with pytest.raises(ValueError, match=r"stage\.fp8: emulated: the package torchao is not installed: pip install"):
        NEOTraining(tiny_model(), staged())
    monkeypatch.setattr(fp8.importlib.util, "find_spec", lambda name: True)
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match="linears: its products need a GPU, and there is none here; use none, or emul"
        ):
            use_fp8(tiny_model(), staged(fp8="linears"))

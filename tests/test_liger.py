"""Liger's kernels in place of plain norms and gates: equal where they run, refused where they cannot."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import random_batch, tiny_model

from neo_components.components import liger
from neo_components.components.layers import GatedFeedForward, RMSNorm
from neo_components.recipe.stage import StageConfig
from neo_components.training import kernels
from neo_components.training.module import NEOTraining

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("liger_kernel", "triton")),
    reason="liger-kernel is not installed: pip install liger-kernel",
)
def test_kernels_equal_the_plain_form() -> None:
    """Run on a CPU by Triton's interpreter: forward and backward, alone and in a whole step."""
    run = subprocess.run(
        [sys.executable, str(HERE / "liger_child.py")], capture_output=True, text=True, timeout=250,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout.splitlines()[-1])
    model = tiny_model()
    assert report.pop("modules") == sum(isinstance(p, RMSNorm | GatedFeedForward) for p in model.modules())
    assert report.pop("model") < 1e-4
    assert len(report) == 8
    for name, distance in report.items():
        assert distance < (2e-6 if "float32" in name else 4e-3), (name, distance)


def test_on_a_cpu_the_plain_form_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that trained with them can be used on a CPU later: the very same loss."""
    monkeypatch.setattr(liger, "installed", lambda: True)
    monkeypatch.delenv(liger.INTERPRETED, raising=False)
    model = tiny_model(post={"activation": "gelu_tanh"})
    batch, _ = random_batch(model.input_spec, seed=1)
    before = model.loss(batch)
    assert liger.use_liger(model) == sum(isinstance(p, RMSNorm | GatedFeedForward) for p in model.modules())
    assert torch.equal(model.loss(batch), before)
    assert model.post_llm.blocks[0].mlp.gated is liger.liger_geglu
    assert model.pre_buffer.blocks[0].mlp.gated is liger.liger_swiglu


def test_where_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = StageConfig(train=("all",), kernels="liger")
    monkeypatch.setattr(kernels, "installed", lambda: False)
    with pytest.raises(
        ValueError, match=r"stage\.kernels: liger: the package liger-kernel is not installed: pip install"
    ):
        NEOTraining(tiny_model(), wanted)
    monkeypatch.setattr(kernels, "installed", lambda: True)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="its kernels need a GPU, and there is none here"):
            NEOTraining(tiny_model(), wanted)
        assert kernels.use_kernels(tiny_model(), StageConfig(train=("all",), kernels="auto")) == 0
    with pytest.raises(ValueError, match=r"stage\.kernels: got liger, but compiled blocks fuse"):
        StageConfig(train=("all",), kernels="liger", compile=True)

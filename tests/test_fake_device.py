"""Devices without a device: on tensors without values nothing mixes devices, and no shape depends on a value.

``fake_device.py`` makes them. What only exists on CUDA (FlexAttention, the compiled loss) is captured here, and its
code is generated in ``test_sm90.py``.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import random_batch, random_image, random_sample, set_backend, tiny_model
from fake_device import fake_device
from fake_device_child import CASES, NAME
from llm_builders import native_model, text_llm
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException

from neo_components import NEO, Batch, attach, pack
from neo_components.components import flex_attention, masks, token_loss
from neo_components.data import load_tokenizer
from neo_components.evaluation import Question, evaluate
from neo_components.model.attach import export_pre_buffer, image_features
from neo_components.registry import MASKS


@pytest.fixture(autouse=True)
def capture_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured, checked on fake tensors and called; inductor would ask the device how large it is."""
    made = (flex_attention.compiled_flex_attention, masks._create_block_mask, token_loss._compiled_chunk_loss)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    for cached in made:
        cached.cache_clear()
    yield
    torch._dynamo.reset()
    for cached in made:
        cached.cache_clear()


def routed(text: str, backend: str) -> NEO:
    plain = tiny_model(pre={"depth": 1}, post={"depth": 1}, head_width=16)  # FlexAttention takes no narrower heads
    model = NEO(plain.patch_embedding, plain.pre_buffer, plain.post_llm, text=text)
    set_backend(model, backend)
    return model


def check_losses(model: NEO, *batches: Batch) -> None:
    """Computes losses on a fake GPU, without gradients."""
    with fake_device("cuda"), torch.no_grad():
        if model.post_llm.head_weight.device.type == "cpu":
            model.to("cuda")
        for batch in batches:
            nll: list[torch.Tensor] = []
            loss = model.loss(batch.to("cuda"), nll)
            assert loss.shape == () and nll[0].shape == (batch.indices.targets.count,)
            assert all(x.device.type == "cuda" for x in (loss, nll[0], *model.parameters(), *model.buffers()))


@pytest.mark.parametrize("text", ["shared", "bypass"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_losses(backend: str, text: str) -> None:
    model = routed(text, backend)
    check_losses(model, random_batch(model.input_spec, 1)[0])


@pytest.mark.parametrize("rule", sorted(MASKS))
def test_masks_of_flex_attention(rule: str) -> None:
    """They are built by compiled code on CUDA."""
    batch = random_batch(tiny_model().input_spec, 2)[0]
    with fake_device("cuda"):
        there = batch.to("cuda")
        mask = masks.block_mask(there.document_ids, there.image_ids, rule, window=5, token_kinds=there.token_kinds)
    assert mask.kv_indices.device.type == mask.full_kv_num_blocks.device.type == "cuda"
    assert mask.kv_indices.shape == (2, 1, 1, 1)


@pytest.mark.parametrize("text", ["shared", "bypass"])
def test_batches_without_images_or_targets(text: str) -> None:
    model = routed(text, "eager").train()
    words = random_sample(model.input_spec, 3, images=0)
    silent = random_sample(model.input_spec, 3, images=1, learn=False)
    check_losses(model, *(pack([sample], model.input_spec) for sample in (words, silent)))


def test_whatever_needs_a_value_or_mixes_devices_raises() -> None:
    """The checks themselves."""
    model = routed("shared", "eager")
    batch = random_batch(model.input_spec, 1)[0]
    with fake_device("cuda"), torch.no_grad():
        there = batch.to("cuda")
        with pytest.raises(RuntimeError, match="device"):
            model.loss(there)
        model.to("cuda")
        assert there.labels.device.type == "cuda" and torch.equal(there.indices.ids["labels"], batch.labels)
        for wrong in (
            lambda: there.labels.max().item(), lambda: there.labels[there.labels > 0], lambda: there.labels.tolist(),
            lambda: there.labels + batch.labels, lambda: model.loss(batch),
        ):  # fmt: skip
            with pytest.raises((RuntimeError, DataDependentOutputException)):
                wrong()


def test_steps_of_every_stage(tmp_path: Path) -> None:
    """A step of the trainer: forward, backward, clipping, optimizer, schedule and callbacks."""
    child = Path(__file__).with_name("fake_device_child.py")
    ran = subprocess.run([sys.executable, str(child), *CASES], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found == {name: {"steps": 1, "weights": [NAME], "state": [NAME], "loss": NAME} for name in CASES}


def test_attached_models(tmp_path: Path) -> None:
    """Bridges, fitted on the CPU or started at random on the device; the pre-Buffer alone as a vision tower."""
    llm = text_llm(tmp_path / "llm")
    other = text_llm(tmp_path / "other", hidden_size=48, heads=3, kv_heads=1)
    asset = export_pre_buffer(native_model(llm), tmp_path / "asset", llm)
    for text in ("shared", "bypass"):
        model = attach(asset, other, bridge="least_squares", text=text)
        set_backend(model, "sdpa")
        assert model.bridge_out is not None and model.bridge_out.unexplained is not None
        batch = random_batch(model.input_spec, 1, images=1)[0]
        check_losses(model, batch)
        with fake_device("cuda"):
            model = attach(asset, other, bridge="random", text=text, device="cuda")
            images = [random_image(model.input_spec, grid, torch.Generator()) for grid in ((2, 3), (1, 1))]
            features = image_features(model.pre_buffer, images)
        check_losses(model, batch)
        assert [tuple(x.shape[:2]) for x in features] == [(2, 3), (1, 1)]
        assert {x.device.type for x in features} == {"cuda"}


def check_all_but_the_read(model: NEO, ask: Callable[[], object], steps: int) -> None:
    """Prompts, prefill and every step run; it stops where the tokens are read, which have no values here."""
    calls: list[None] = []
    handle = model.post_llm.register_forward_hook(lambda *_: calls.append(None))
    with pytest.raises(DataDependentOutputException) as raised:
        ask()
    handle.remove()
    frames = [f for f in traceback.extract_tb(raised.value.__traceback__) if "neo_components" in f.filename]
    assert "tokens" in str(frames[-1].line) and ".tolist()" in str(frames[-1].line)
    assert len(calls) == steps


@pytest.mark.parametrize("text", ["shared", "bypass"])
def test_generation(text: str) -> None:
    model = routed(text, "auto")
    prompts = [random_sample(model.input_spec, seed, images=1, learn=False) for seed in range(3)]
    with fake_device("cuda"):
        model.to("cuda")
        check_all_but_the_read(model, lambda: model.generate(prompts, 4, stop_token_ids=[1], do_sample=True), 4)


def test_evaluation(tmp_path: Path) -> None:
    folder = text_llm(tmp_path / "llm")
    model, tokenizer = native_model(folder), load_tokenizer(folder)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 8), "red").save(buffer, "PNG")
    questions = [Question("one", "what color is it?", ["red"], image=buffer.getvalue())]
    limits = {"min_pixels": 64, "max_pixels": 4096, "max_new_tokens": 3}
    with fake_device("cuda"):
        check_all_but_the_read(model, lambda: evaluate(model, tokenizer, questions, device="cuda", **limits), 3)

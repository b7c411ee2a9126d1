"""A model exported for transformers: loaded where this library is absent, it computes and answers the same."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import randomize, tiny_model
from llm_builders import native_model, text_llm
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer, pack
from neo_components.chat import Chat
from neo_components.components.bridge import Bridge
from neo_components.components.masks import MASK_RULES, register_mask
from neo_components.data import load_tokenizer
from neo_components.hf.folder import write_hf

CHILD = Path(__file__).parent / "hf_child.py"
SIZES = {"a": (40, 24), "b": (24, 70), "c": (33, 47)}
"""Height and width of the test's pictures."""

QUESTIONS = [
    [("what color is it?", "")],
    [("what is it?", "a")],
    [("are <image> and <image> alike?", "ab")],
    [("what color is it?", "b"), ("no", ""), ("which?", "ca"), ("blue", "c")],
]
"""Batches of a question and its pictures."""


def run_child(job: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """What a process without this library finds."""
    (folder / "job.json").write_text(json.dumps(job | {"out": str(folder / "out.safetensors")}))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, CHILD, folder / "job.json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "right-padding was detected" not in done.stderr
    return load_file(folder / "out.safetensors")


def pictures(folder: Path) -> dict[str, Path]:
    """Noise of several sizes."""
    for number, (name, (height, width)) in enumerate(SIZES.items()):
        noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.byte().numpy()).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in SIZES}


def plain_chat(llm: Path) -> Chat:
    """Tied embeddings, no bridges; the H/W channels count."""
    model = native_model(llm)
    for seed, part in enumerate(model.post_llm.hw_modules()):
        randomize(part, seed)
    return Chat(model, load_tokenizer(str(llm)), 400, 900)


def bridged_chat(llm: Path) -> Chat:
    """All that may differ: a head of its own, bridges, RoPE, a causal post-LLM, image ids that the tokenizer lacks."""
    heads = {"num_heads": 2, "num_kv_heads": 2, "head_width": 12, "feed_forward_size": 40, "rope": "1d"}
    post = PostLLM(
        320, 3, 24, **heads, attention="causal", image_token_id=310, image_start_id=305, image_end_id=317, base_t=1e4
    )
    pre = PreBuffer(2, 20, **heads | {"num_kv_heads": 1})
    patch = PatchEmbedding(20, width=12, patch_size=4, position="sincos")
    model = NEO(patch, pre, post, Bridge(24, 20), Bridge(20, 24))
    randomize(model, 3, 0.3)
    return Chat(model, load_tokenizer(str(llm)), 64, 2000)


MODELS = {"plain": plain_chat, "bridged": bridged_chat}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_llm(tmp_path_factory.mktemp("text") / "llm")


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, the prompts of each batch, a token to stop at, and what the child found in the exported folder."""
    root = tmp_path_factory.mktemp(request.param)
    chat, files = MODELS[request.param](llm), pictures(root)
    write_hf(chat.model, chat.tokenizer, root / "my model-1.0", chat.min_pixels, chat.max_pixels)
    prompts = [[chat.prompt(ask, [files[name] for name in names]) for ask, names in batch] for batch in QUESTIONS]
    free = chat.model.generate(prompts[-1], 10)
    stop = int(free[0][4])
    batches = [[_conversation(ask, [files[name] for name in names]) for ask, names in batch] for batch in QUESTIONS]
    job = {"folder": str(root / "my model-1.0"), "again": str(root / "again"), "batches": batches, "stop": stop}
    return chat, prompts, stop, run_child(job, root), root


def _conversation(question: str, images: list[Path]) -> list[dict[str, Any]]:
    """In transformers' form; pictures with a place in the text are given apart from it."""
    parts = question.split("<image>") if "<image>" in question else [""] * len(images) + [question]
    content: list[dict[str, str]] = [{"type": "text", "text": parts[0]}] if parts[0] else []
    for image, text in zip(images, parts[1:], strict=True):
        content += [{"type": "image", "path": str(image)}, *([{"type": "text", "text": text}] if text else [])]
    return [{"role": "user", "content": content if images else question}]


def test_logits_are_the_same(exported: Any) -> None:
    chat, prompts, _, found, _ = exported
    for number, batch in enumerate(prompts):
        for row, prompt in enumerate(batch):
            assert torch.equal(found[f"{number}.{row}.ids"], prompt.token_ids)
            with torch.no_grad():
                logits = chat.model(pack([prompt], chat.model.input_spec)).logits[0]
            assert float(logits.std()) > 0.05
            assert torch.allclose(found[f"{number}.{row}.logits"], logits, atol=1e-5), (number, row)


def test_generated_ids_are_the_same(exported: Any) -> None:
    """Batched with padding on the left, until each has met the stop token."""
    chat, prompts, stop, found, _ = exported
    lengths = set()
    for number, batch in enumerate(prompts):
        for row, answer in enumerate(chat.model.generate(batch, 10, stop_token_ids=[stop])):
            assert torch.equal(found[f"{number}.answers"][row, : len(answer)], answer), (number, row)
            lengths.add(len(answer))
    assert len(lengths) > 1, "all answers are equally long, so nothing was seen of stopping"


def test_loss_and_half_precision(exported: Any) -> None:
    """transformers' own mean over labelled tokens; bfloat16 rounds alike."""
    chat, prompts, _, found, _ = exported
    labels, batch, losses = found["loss.labels"], prompts[-1], []
    half = copy.deepcopy(chat.model).bfloat16()
    for row, prompt in enumerate(batch):
        with torch.no_grad():
            rounded = half(pack([prompt], half.input_spec)).logits[0].float()
        assert torch.allclose(found["half"][row, -len(rounded) :], rounded, atol=0.05, rtol=0.02)
        logits = found[f"{len(prompts) - 1}.{row}.logits"]
        own = labels[row, : len(logits)]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], own[1:], reduction="none")[own[1:] != -100])
    assert torch.allclose(found["loss"], torch.cat(losses).mean(), atol=1e-5)


def test_files(exported: Any) -> None:
    """Safetensors only, code only of the bundle; equal content gives equal bytes, in whatever folder."""
    chat, _, _, _, root = exported
    kinds = {path.suffix for path in (root / "my model-1.0").iterdir()}
    assert kinds == {".py", ".json", ".jinja", ".md", ".safetensors"}
    again = write_hf(chat.model, chat.tokenizer, root / "second", chat.min_pixels, chat.max_pixels)
    files = {path.name: path.read_bytes() for path in again.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (root / "my model-1.0").iterdir()}
    assert not [
        name for name, data in files.items() if str(root).encode() in data or str(CHILD.parent).encode() in data
    ]
    config = json.loads(files["config.json"])
    assert config["post_llm"]["source"] == ""


def test_code_that_cannot_be_taken_along_is_refused(tmp_path: Path) -> None:
    register_mask("everyone")(lambda query, key: query.document == key.document)
    try:
        model = tiny_model(post={"attention": "everyone"})
        with pytest.raises(
            ValueError, match=r"attention 'everyone' comes from test_hf, which is no part of the library"
        ):
            write_hf(model, None, tmp_path / "out", 64, 64)
    finally:
        del MASK_RULES["everyone"]
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="3 channels, this model reads 1"):
        write_hf(tiny_model(patch={"channels": 1}), None, tmp_path / "out", 64, 64)

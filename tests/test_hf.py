"""A model exported for transformers: loaded where this library is absent, it computes and answers the same."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import randomize, tiny_model
from commands import good
from llm_builders import native_model, text_llm, word_tokenizer
from llm_references import CASES, reference
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer, Sample, pack
from neo_components.components.bridge import Bridge
from neo_components.data import load_tokenizer
from neo_components.export.hf.folder import write_hf
from neo_components.model.chat import Chat
from neo_components.registry import MASKS

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


def run_child(jobs: list[dict[str, Any]], folder: Path) -> None:
    """Runs ``hf_child.py``: a process without this library."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, CHILD, folder / "jobs.json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "right-padding was detected" not in done.stderr


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


FAMILIES = {
    "qwen2": "window", "llama": "dynamic", "phi3": "longrope-partial", "smollm3": "yarn-window", "mistral": "gqa",
    "gemma3_text": "gqa", "olmo2": "gqa", "granite": "gqa", "qwen3_moe": "mixed",
}  # fmt: skip
"""Of each family a case of ``llm_references`` in which it differs most from Qwen3."""

SHORT = {"llama": {"max_position_embeddings": 10}, "phi3": {"original_max_position_embeddings": 10}}
"""So that answers grow beyond the context after which a document turns by other frequencies."""


def family_chat(folder: Path, tokenizer: Any, family: str) -> Chat:
    """A language model of another family behind a pre-Buffer like that of Qwen3; the H/W channels count."""
    reference(family, folder, **CASES[family][FAMILIES[family]] | SHORT.get(family, {}))
    post = PostLLM.from_pretrained(folder)
    for seed, part in enumerate(post.hw_modules()):
        randomize(part, seed)
    width, heads = post.hparams.hidden_size, {"num_heads": 2, "num_kv_heads": 1, "head_width": 8}
    pre = PreBuffer(1, width, **heads, feed_forward_size=16)
    model = NEO(PatchEmbedding(width, width=8, patch_size=4), pre, post)
    randomize(model.pre_buffer, 1)
    return Chat(model, tokenizer, 64, 400)


@dataclass
class Case:
    """A model, its prompts, a token to stop at, its exported folder, and what the child found there."""

    chat: Chat
    prompts: list[list[Sample]]
    stop: int
    folder: Path
    found: dict[str, Tensor] = field(default_factory=dict)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All models, exported and studied by one child."""
    root = tmp_path_factory.mktemp("hf")
    llm, files, words = text_llm(root / "llm"), pictures(root), word_tokenizer()
    chats = {"plain": plain_chat(llm), "bridged": bridged_chat(llm)}
    chats |= {family: family_chat(root / "llms" / family, words, family) for family in FAMILIES}
    made, jobs = {}, []
    for name, chat in chats.items():
        folder = root / name / "my model-1.0"
        write_hf(chat.model, chat.tokenizer, folder, chat.min_pixels, chat.max_pixels)
        asked = QUESTIONS if name in ("plain", "bridged") else QUESTIONS[-1:]
        prompts = [[chat.prompt(ask, [files[name] for name in names]) for ask, names in batch] for batch in asked]
        stop = int(chat.model.generate(prompts[-1], 10)[0][4])
        made[name] = Case(chat, prompts, stop, folder)
        batches = [[_conversation(ask, [files[name] for name in names]) for ask, names in batch] for batch in asked]
        again = str(root / name / "again") if len(asked) > 1 else ""
        out = str(root / f"{name}.safetensors")
        jobs.append({"folder": str(folder), "again": again, "batches": batches, "stop": stop, "out": out})
    run_child(jobs, root)
    for name, case in made.items():
        case.found = load_file(root / f"{name}.safetensors")
    return made


def _conversation(question: str, images: list[Path]) -> list[dict[str, Any]]:
    """In transformers' form; pictures with a place in the text are given apart from it."""
    parts = question.split("<image>") if "<image>" in question else [""] * len(images) + [question]
    content: list[dict[str, str]] = [{"type": "text", "text": parts[0]}] if parts[0] else []
    for image, text in zip(images, parts[1:], strict=True):
        content += [{"type": "image", "path": str(image)}, *([{"type": "text", "text": text}] if text else [])]
    return [{"role": "user", "content": content if images else question}]


ALL = ["plain", "bridged", *FAMILIES]


@pytest.mark.parametrize("name", ALL)
def test_logits_are_the_same(name: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    for number, batch in enumerate(case.prompts):
        for row, prompt in enumerate(batch):
            assert torch.equal(case.found[f"{number}.{row}.ids"], prompt.token_ids)
            with torch.no_grad():
                logits = case.chat.model(pack([prompt], case.chat.model.input_spec)).logits[0]
            assert float(logits.std()) > 0.05
            near = 1e-5 * max(1.0, float(logits.abs().max()))  # float32 rounds large logits more coarsely
            assert torch.allclose(case.found[f"{number}.{row}.logits"], logits, atol=near), (number, row)


@pytest.mark.parametrize("name", ALL)
def test_generated_ids_are_the_same(name: str, cases: dict[str, Case]) -> None:
    """Batched with padding on the left, until each has met the stop token."""
    case, lengths = cases[name], set()
    for number, batch in enumerate(case.prompts):
        for row, answer in enumerate(case.chat.model.generate(batch, 10, stop_token_ids=[case.stop])):
            assert torch.equal(case.found[f"{number}.answers"][row, : len(answer)], answer), (number, row)
            lengths.add(len(answer))
    assert len(lengths) > 1, "all answers are equally long, so nothing was seen of stopping"


def test_documents_grow_from_one_regime_into_another(cases: dict[str, Case]) -> None:
    """So that the two tests above saw a cache become void."""
    for name in ("llama", "phi3"):
        case = cases[name]
        ends = [int(pack([prompt], case.chat.model.input_spec).positions[..., 0].max()) for prompt in case.prompts[-1]]
        assert any(case.chat.model.length_buckets(end + 1) != case.chat.model.length_buckets(end + 10) for end in ends)


@pytest.mark.parametrize("name", ["plain", "bridged"])
def test_loss_and_half_precision(name: str, cases: dict[str, Case]) -> None:
    """transformers' own mean over labelled tokens; bfloat16 rounds alike."""
    case = cases[name]
    labels, losses = case.found["loss.labels"], []
    half = copy.deepcopy(case.chat.model).bfloat16()
    for row, prompt in enumerate(case.prompts[-1]):
        with torch.no_grad():
            rounded = half(pack([prompt], half.input_spec)).logits[0].float()
        assert torch.allclose(case.found["half"][row, -len(rounded) :], rounded, atol=0.05, rtol=0.02)
        logits = case.found[f"{len(case.prompts) - 1}.{row}.logits"]
        own = labels[row, : len(logits)]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], own[1:], reduction="none")[own[1:] != -100])
    assert torch.allclose(case.found["loss"], torch.cat(losses).mean(), atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "qwen3_moe"])
def test_files(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    """Safetensors only, and the code; equal content gives equal bytes, and nothing tells of this machine."""
    case = cases[name]
    files = {path.name: path.read_bytes() for path in case.folder.iterdir()}
    assert {Path(name).suffix for name in files} == {".py", ".json", ".jinja", ".md", ".safetensors"}
    limits = case.chat.min_pixels, case.chat.max_pixels
    again = write_hf(case.chat.model, case.chat.tokenizer, tmp_path / "second", *limits)
    assert files == {path.name: path.read_bytes() for path in again.iterdir()}
    places = [str(case.folder.parent.parent), str(CHILD.parent.parent)]
    assert not [name for name, data in files.items() for place in places if place.encode() in data]


def test_code_that_cannot_be_taken_along_is_refused(tmp_path: Path) -> None:
    MASKS.register("everyone")(lambda query, key: query.document == key.document)
    try:
        model = tiny_model(post={"attention": "everyone"})
        with pytest.raises(
            ValueError, match=r"attention 'everyone' comes from test_hf, which is no part of the library"
        ):
            write_hf(model, None, tmp_path / "out", 64, 64)
    finally:
        MASKS.remove("everyone")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="3 channels, this model reads 1"):
        write_hf(tiny_model(patch={"channels": 1}), None, tmp_path / "out", 64, 64)


def test_weights_keep_the_type_that_they_are_stored_in(world: Path, tmp_path: Path) -> None:
    chat = Chat.from_pretrained(world / "neo")
    chat.model.bfloat16()
    chat.save_pretrained(tmp_path / "half")
    good("export", tmp_path / "half", "--to", "hf", "-o", tmp_path / "out", "--max-new-tokens", "7", "--license", "mit")
    files = load_file(tmp_path / "out" / "model.safetensors")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {name.removeprefix("model.") for name in files} == set(stored)
    assert all(torch.equal(tensor, stored[name.removeprefix("model.")]) for name, tensor in files.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 7
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    good("export", tmp_path / "half", "--to", "hf", "-o", tmp_path / "whole", "--dtype", "float32")
    assert {t.dtype for t in load_file(tmp_path / "whole" / "model.safetensors").values()} == {torch.float32}

"""``--device`` and ``--dtype``: what they stand for, and that commands and functions compute there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_model
from commands import SIDE, good

from neo_components import attach, load_recipe
from neo_components.cli.models import open_chat
from neo_components.data.packing import pack
from neo_components.devices import (
    describe,
    find_device,
    find_dtype,
    find_training_device,
    trainer_overrides,
    training_precision,
)
from neo_components.export.torch_export import ImageProgram, _input_program
from neo_components.model.chat import Chat
from neo_components.quickstart.findings import Findings
from neo_components.quickstart.main import GPU_WORKERS, _recipe
from neo_components.storage.weights import TensorFiles, read_json
from neo_components.types import LISTS

ROOT = Path(__file__).parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


# --- names


def test_auto_is_the_fastest_device_there_is() -> None:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    assert find_device() == torch.device("cuda", 0) if cuda else torch.device("mps" if mps else "cpu")
    assert find_training_device() == torch.device("cuda", 0) if cuda else CPU
    assert find_device("cpu") == find_training_device("cpu") == CPU
    assert describe(CPU).startswith("cpu (") and describe(CPU).endswith(f", {torch.get_num_threads()} threads)")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", r"device must be auto, cpu, cuda, cuda:N \(the N-th GPU, from 0\) or mps \(Apple\), got 'gpu'"),
        ("cuda:-1", r"device must be auto, .*, got 'cuda:-1'"),
        ("cuda:99", r"device 'cuda:99' is not there: .* \(torch [\d.]+\S*\); available: cpu \(.* threads\)"),
    ],
)
def test_a_device_that_is_not_there(name: str, message: str) -> None:
    for find in (find_device, find_training_device):
        with pytest.raises(ValueError, match=message):
            find(name)


@pytest.mark.skipif(torch.backends.mps.is_built(), reason="a Mac")
def test_a_device_that_torch_is_built_without() -> None:
    with pytest.raises(ValueError, match=r"device 'mps' is not there: this build of torch is made without it"):
        find_device("mps")


@pytest.mark.parametrize(
    ("name", "device", "saved", "found"),
    [
        ("auto", CPU, "float32", torch.float32),
        ("auto", CPU, "bfloat16", torch.bfloat16),
        ("auto", CPU, "float16", torch.float32),
        ("auto", GPU, "float16", torch.float16),
        ("float16", GPU, "float32", torch.float16),
        ("bfloat16", CPU, "float32", torch.bfloat16),
        ("float32", CPU, "float16", torch.float32),
    ],
)
def test_types(name: str, device: torch.device, saved: str, found: torch.dtype) -> None:
    assert find_dtype(name, device, saved) is found


def test_types_that_a_device_does_not_compute_in() -> None:
    with pytest.raises(ValueError, match=r"dtype 'float16' on device 'cpu': .* give float32, or bfloat16"):
        find_dtype("float16", CPU)
    with pytest.raises(ValueError, match=r"dtype must be one of auto, float32, bfloat16, float16, got 'int8'"):
        find_dtype("int8", CPU)


def test_precision_of_training() -> None:
    assert [training_precision(name, CPU) for name in ("auto", "bfloat16", "float32")] == [
        "bf16-mixed", "bf16-mixed", "32-true",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"dtype 'float16' cannot train: .* give float32 or bfloat16"):
        training_precision("float16", GPU)


# --- recipes


def test_a_device_overrides_the_devices_of_a_recipe() -> None:
    for device, chosen in ((GPU, ("cuda", [1])), (torch.device("mps"), ("mps", 1)), (CPU, ("cpu", 1))):
        trainer = load_recipe("neo_2b/pretrain", trainer_overrides(device)).trainer
        assert (trainer["accelerator"], trainer["devices"]) == chosen and trainer["num_nodes"] == 1


def test_the_quickstart_hands_device_and_precision_to_its_recipes(tmp_path: Path) -> None:
    """The same stages on every device; beside a GPU more workers prepare the data, which does not change it."""
    for name in ("pretrain", "midtrain", "sft", "attach", "attach_random"):
        found = {
            device: _recipe(name, tmp_path, Findings(3, scale, device, precision))
            for device, precision, scale in ((CPU, "32-true", 1.0), (GPU, "bf16-mixed", 1.0))
        }
        cpu, gpu = found[CPU], found[GPU]
        assert cpu.stage == gpu.stage and cpu.seed == gpu.seed == 3
        assert {key for key in cpu.data if cpu.data[key] != gpu.data[key]} <= {"workers"}
        assert gpu.data["workers"] == max(1, min(GPU_WORKERS, (os.cpu_count() or 1) - 1))
        assert cpu.trainer == {
            "precision": "32-true", "accelerator": "cpu", "devices": 1, "num_nodes": 1, "limit_val_batches": 8
        }  # fmt: skip
        assert gpu.trainer == cpu.trainer | {"precision": "bf16-mixed", "accelerator": "cuda", "devices": [1]}


def test_python_of_the_page(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "quickstart").symlink_to(world)
    (tmp_path / "X.png").symlink_to(world / "red.png")
    monkeypatch.chdir(tmp_path)
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "devices.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/devices.md", "exec"), names)
    assert names["chat"].model.dtype is torch.bfloat16 and names["model"].device == names["device"]
    assert names["logits"].shape == (1, 3, names["model"].post_llm.hparams.vocab_size)


def test_train_on_a_device(world: Path, tmp_path: Path) -> None:
    run = [world / "run.yaml", f"output={tmp_path}/run", "stage.steps=1", "trainer.precision=bf16-mixed"]
    good("train", *run, "--device", "cpu")
    trainer = load_recipe(tmp_path / "run" / "recipe.yaml").trainer
    assert trainer == {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": "bf16-mixed"}


# --- commands


def test_models_are_opened_on_the_device_and_in_the_type(world: Path, tmp_path: Path) -> None:
    for saved, computed in (("bfloat16", torch.bfloat16), ("float16", torch.float32)):
        folder = tmp_path / saved
        Chat.from_pretrained(world / "neo", dtype=saved).save_pretrained(folder)
        assert {p.dtype for p in open_chat(str(folder), "cpu", "auto").model.parameters()} == {computed}
        assert open_chat(str(folder), "cpu", "float32").model.dtype is torch.float32
        written = open_chat(str(folder), "cpu", "auto", computes=False)
        assert written.model.dtype is getattr(torch, saved) and written.model.device == CPU
    chat = Chat.from_pretrained(world / "neo", device="meta")
    assert all(tensor.is_meta for tensor in chat.model.parameters())
    assert Chat.from_pretrained(world / "neo").to("meta").model.device == torch.device("meta")


def test_chat_and_evaluate_compute_in_the_type(world: Path, tmp_path: Path) -> None:
    asked = ["what is it?", "--image", world / "red.png", "--max-new-tokens", "6", "--device", "cpu"]
    for dtype in ("float32", "bfloat16"):
        chat = Chat.from_pretrained(world / "neo", dtype=dtype)
        assert good("chat", world / "neo", *asked, "--dtype", dtype) == f"{chat.ask('what is it?', asked[2:3], 6)}\n"
    options = ["--max-new-tokens", "3", "--limit", "3", "--device", "cpu"]
    scores = []
    for dtype in ("auto", "float32"):
        good("evaluate", world / "neo", world / "shards", *options, "--dtype", dtype, "-o", tmp_path / f"{dtype}.json")
        scores.append(read_json(tmp_path / f"{dtype}.json"))
    assert scores[0] == scores[1] and scores[0]["counts"]["overall"] == 3


def test_types_of_what_export_and_attach_write(world: Path, tmp_path: Path) -> None:
    where = ["--device", "cpu", "--dtype"]
    for to in ("pre-buffer", "hf-llm"):
        good("export", world / "neo", "-o", tmp_path / to, "--to", to, *where, "float16")
        assert TensorFiles(tmp_path / to).dtype() == "float16"
    for dtype, written in (("bfloat16", "bfloat16"), ("auto", "float32")):
        good("attach", tmp_path / "pre-buffer", world / "other", "-o", tmp_path / dtype, *where, dtype)
        files = TensorFiles(tmp_path / dtype)
        assert {files.get(name).dtype for name in files.names()} == {getattr(torch, written)}


def test_attached_parts_are_on_one_device(world: Path) -> None:
    asset = Chat.from_pretrained(world / "neo").model.pre_buffer
    model = attach(asset, world / "other", "random", device="meta", text="shared")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.bridge_in is not None and model.bridge_in.proj.weight.shape == (32, 48)


def test_the_default_device_is_never_used(world: Path) -> None:
    """Prompts are made on the CPU whatever torch's default device is, and moved as a batch."""
    chat = Chat.from_pretrained(world / "neo")
    question = "<image> or <image>?"
    images = [world / "red.png"] * 2
    plain = pack([chat.prompt(question, images)] * 2, chat.model.input_spec)
    with torch.device("meta"):
        other = pack([chat.prompt(question, images)] * 2, chat.model.input_spec)
    tensors = {name: value for name, value in vars(plain).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) >= 10 and not set(LISTS) & set(tensors)
    assert all(torch.equal(value, getattr(other, name)) for name, value in tensors.items())
    assert plain.patches.shape == (2 * 2 * (SIDE // 4) ** 2, 3 * 16)


def test_a_program_computes_on_the_device_of_the_model() -> None:
    """Exported on the meta device, the only one beside this one that is everywhere: nothing in it is on the CPU."""
    model = tiny_model().to("meta").eval()
    nodes = list(_input_program(model).graph.nodes)
    tensors = [node.meta["val"] for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert len(tensors) > 100 and {tensor.device.type for tensor in tensors} == {"meta"}
    assert {str(node.kwargs["device"]) for node in nodes if node.kwargs.get("device") is not None} == {"meta"}
    with torch.no_grad():
        image = ImageProgram(model.pre_buffer)(torch.zeros(3, 24, 40, device="meta"))
    assert image.is_meta and image.shape == (3, 5, model.pre_buffer.hparams.hidden_size)

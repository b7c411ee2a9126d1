"""Folders that are not what they should be: each fault is named, and no pickle is ever opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    Edit,
    edit_config,
    expressible,
    llm_folder,
    tiny_model,
    weights_of,
)
from safetensors.torch import save_file
from torch import Tensor

from neo_components import NEO, PostLLM, PreBuffer


def own_folder(folder: Path) -> Path:
    return tiny_model().save_pretrained(folder)


def released_folder(folder: Path) -> Path:
    return expressible().save_pretrained(folder, layout="released")


def asset_folder(folder: Path) -> Path:
    return tiny_model().pre_buffer.save_pretrained(folder)


KINDS: dict[str, tuple[Callable[[Path], Path], Any, str]] = {
    "own": (own_folder, NEO, "post_llm.norm.weight"),
    "released": (released_folder, NEO, "language_model.model.norm.weight"),
    "pre-buffer": (asset_folder, PreBuffer, "patch_embedding.token_proj.weight"),
    "llm": (llm_folder, PostLLM, "model.norm.weight"),
}


@pytest.fixture(params=KINDS)
def checkpoint(request: Any, tmp_path: Path) -> Iterator[tuple[Path, Any, str]]:
    """A good folder, the class that reads it and the name of one of its tensors."""
    make, reader, name = KINDS[request.param]
    folder = make(tmp_path / "checkpoint")
    reader.from_pretrained(folder)
    yield folder, reader, name


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    state = weights_of(folder)
    change(state)
    save_file(state, folder / "model.safetensors")


def test_missing_extra_and_misshapen_tensors_are_named(checkpoint: tuple[Path, Any, str]) -> None:
    folder, reader, name = checkpoint
    good = weights_of(folder)[name]
    rewrite(folder, lambda state: state.pop(name))
    with pytest.raises(ValueError, match=rf"does not fit the model:\n  missing: {name}$"):
        reader.from_pretrained(folder)
    rewrite(folder, lambda state: state.update({name: good, "rotary.inv_freq": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"does not fit the model:\n  unexpected: rotary\.inv_freq$"):
        reader.from_pretrained(folder)
    rewrite(folder, lambda state: state.update({name: good[:-1].clone()}) or state.pop("rotary.inv_freq"))
    with pytest.raises(ValueError, match=rf"does not fit the model:\n  misshapen: {name} is \({len(good) - 1},"):
        reader.from_pretrained(folder)


def test_all_faults_are_told_together(checkpoint: tuple[Path, Any, str]) -> None:
    folder, reader, name = checkpoint
    rewrite(folder, lambda state: state.update({f"extra.{n}": torch.ones(1) for n in range(30)}) or state.pop(name))
    with pytest.raises(ValueError) as error:
        reader.from_pretrained(folder)
    assert f"missing: {name}\n  unexpected: extra.0\n" in str(error.value)
    assert str(error.value).endswith("... and 11 more")


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_a_pickle_alone_is_not_opened(checkpoint: tuple[Path, Any, str], name: str, tmp_path: Path) -> None:
    folder, reader, _ = checkpoint
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Evil(tmp_path / "proof")}, folder / name)
    with pytest.raises(FileNotFoundError, match=rf"has no model.safetensors; it has {name}, but pickles can run code"):
        reader.from_pretrained(folder)
    assert not (tmp_path / "proof").exists()
    torch.load(folder / name, weights_only=False)
    assert (tmp_path / "proof").exists(), "the test's pickle is harmless, so the test proves nothing"


def test_a_pickle_by_another_name_is_not_opened(checkpoint: tuple[Path, Any, str], tmp_path: Path) -> None:
    folder, reader, _ = checkpoint
    torch.save({"weight": Evil(tmp_path / "proof")}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"model.safetensors is no readable safetensors file .* a pickle by another name"
    ):
        reader.from_pretrained(folder)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 0.999])
def test_a_file_cut_short(checkpoint: tuple[Path, Any, str], kept: float) -> None:
    folder, reader, _ = checkpoint
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"model.safetensors is no readable safetensors file .* cut short"):
        reader.from_pretrained(folder)


@pytest.mark.parametrize("reader", [NEO, PreBuffer, PostLLM])
def test_folders_that_are_no_checkpoint(reader: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no checkpoint: it has no config\.json"):
        reader.from_pretrained(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"is no folder; give a folder with config\.json or a hub id 'owner/name'"
    ):
        reader.from_pretrained(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        reader.from_pretrained(tmp_path / "file")
    with pytest.raises(
        FileNotFoundError, match="'nobody/nothing' is no folder here and not complete in the hub's cache"
    ):
        reader.from_pretrained("nobody/nothing")
    for content, message in (("{", "is not valid JSON"), ("[1]", "must hold a JSON object, got list")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            reader.from_pretrained(tmp_path)


def test_one_kind_of_folder_is_not_read_as_another(tmp_path: Path) -> None:
    """The message says what the folder is and, where it can be read, by what."""
    folders = {name: make(tmp_path / name) for name, (make, _, _) in KINDS.items()}
    for folder, reader, message in (
        ("llm", NEO, r"is no NEO checkpoint \(config.json states 'qwen3'\); .*load it by PostLLM.from_pretrained"),
        ("pre-buffer", NEO, r"is no NEO checkpoint .*'pre_buffer'.*load it by PreBuffer.from_pretrained and attach it"),
        ("own", PreBuffer, "holds no pre-Buffer but 'neo'"),
        ("llm", PreBuffer, "holds no pre-Buffer but 'qwen3'"),
        ("released", PostLLM, "model_type 'neo_chat' is unknown; registered: gemma3, "),
    ):
        with pytest.raises(ValueError, match=message):
            reader.from_pretrained(folders[folder])


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("own", lambda c: c.update(format_version=2), "has format_version 2, this library reads up to 1; upgrade"),
        ("pre-buffer", lambda c: c.update(format_version=2), "has format_version 2, this library reads up to 1"),
        ("own", lambda c: c.pop("format_version"), "has format_version None"),
        ("own", lambda c: c.pop("post_llm"), "does not describe a NEO model: 'post_llm'"),
        ("own", lambda c: c["pre_buffer"].update(colour="red"), "does not describe a NEO model: .*'colour'"),
        ("pre-buffer", lambda c: c.pop("patch_embedding"), "does not describe a pre-Buffer: 'patch_embedding'"),
        ("pre-buffer", lambda c: c["pre_buffer"].update(colour="red"), "does not describe a pre-Buffer: .*'colour'"),
        ("own", lambda c: c["post_llm"].update(rope="spiral"), "rope 'spiral' is unknown; registered: "),
    ],
)
def test_configs_that_do_not_describe_a_model(kind: str, edit: Edit, message: str, tmp_path: Path) -> None:
    make, reader, _ = KINDS[kind]
    folder = make(tmp_path / kind)
    edit_config(folder, edit)
    with pytest.raises(ValueError, match=message):
        reader.from_pretrained(folder)

"""The asset's folder: what it holds, that it goes on opening, and what is refused in one that someone crafted."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edit_config, same_tensors, weights_of
from llm_builders import native_model, text_llm

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer, Sample, attach, pack
from neo_components.components.pre_buffer import AssetInfo
from neo_components.model.attach import export_pre_buffer
from neo_components.storage.weights import save_tensors

FROZEN = Path(__file__).parent / "data" / "asset_1"
STAGE = {"stage": "one", "steps": 3, "trained": ["all"], "data": ["a"], "metrics": {"val/loss": 0.5}, "seed": 7}
INFO = AssetInfo(
    {"min_pixels": 64, "max_pixels": 4096, "image_mean": [0.5], "image_std": [0.25]},
    {"stages": [STAGE], "neo_components": "0.1.0"},
    "mit",
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_llm(tmp_path_factory.mktemp("files") / "llm")


@pytest.fixture
def asset(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FROZEN, tmp_path / "asset"))


def test_same_content_same_bytes(llm: Path, tmp_path: Path) -> None:
    one, two = (export_pre_buffer(native_model(llm), tmp_path / name, llm, info=INFO) for name in ("one", "two"))
    names = sorted(path.name for path in one.iterdir())
    assert names == ["README.md", "anchors.safetensors", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert [(one / name).read_bytes() for name in names] == [(two / name).read_bytes() for name in names]
    again = PreBuffer.from_pretrained(one).save_pretrained(tmp_path / "again")
    assert [(again / name).read_bytes() for name in names] == [(one / name).read_bytes() for name in names]


def test_files_tell_what_others_need(llm: Path, tmp_path: Path) -> None:
    folder = export_pre_buffer(native_model(llm), tmp_path / "asset", llm, info=INFO)
    assert json.loads((folder / "preprocessor_config.json").read_text()) == {
        **INFO.image, "patch_size": 4, "fold": 2, "channels": 3,
    }  # fmt: skip
    text = (folder / "README.md").read_text()
    assert "license: mit" in text and "attach(PreBuffer.from_pretrained" in text
    assert "| one | 3 | all | a | 7 | val/loss 0.5 |" in text and "- neo_components: 0.1.0" in text


# --- an asset written by version 0.1.0


def test_a_frozen_asset_opens_and_computes_the_same() -> None:
    part = PreBuffer.from_pretrained(FROZEN)
    expected = weights_of(FROZEN.parent / "asset_1_expected")
    assert part.patch_embedding is not None and part.anchors is not None
    assert part.info.license == "apache-2.0" and part.info.image["max_pixels"] == 4096
    assert part.anchors.tokens[:3] == ["word0", " word1", "word2"] and part.anchors.vectors.shape == (20, 8)
    h = part.hparams
    post = PostLLM(40, 1, h.hidden_size, h.num_heads, h.num_kv_heads, h.head_width, 8)
    spec = NEO(part.patch_embedding, part, post).input_spec
    ids = torch.tensor([41, 40, 40, 42])
    batch = pack([Sample(ids, None, [expected["image"]])], spec)
    with torch.no_grad():
        tokens = part.patch_embedding(batch.patches, batch.patch_positions)
        x = torch.cat([part.boundary[:1], tokens, part.boundary[1:]])[None]
        out = part(x, batch.positions, batch.document_ids, batch.image_ids)
    assert torch.allclose(out, expected["out"], atol=1e-5)
    assert same_tensors(part.state_dict(), weights_of(FROZEN))


def test_a_newer_format_is_refused_with_advice(asset: Path) -> None:
    for version in (2, 0, "1", None):
        edit_config(asset, lambda config, v=version: config.update(format_version=v))  # type: ignore[misc]
        with pytest.raises(ValueError, match=r"format_version .* reads up to 1; upgrade neo-components to open it"):
            PreBuffer.from_pretrained(asset)


# --- crafted folders


def header(path: Path, edit: Callable[[dict[str, Any]], Any], size: int | None = None) -> None:
    """Rewrites the header of a safetensors file; ``size`` is what it claims to be long."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    told = json.loads(data[8 : 8 + length])
    edit(told)
    text = json.dumps(told).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data[8 + length :])


def overlap(told: dict[str, Any]) -> None:
    one, two = [name for name in told if told[name].get("shape") == [8]][:2]
    told[two]["data_offsets"] = told[one]["data_offsets"]


def beyond(told: dict[str, Any]) -> None:
    told["boundary"]["data_offsets"] = [2**40, 2**40 + 64]


@pytest.mark.parametrize("file", ["model", "anchors"])
@pytest.mark.parametrize("edit, size", [(len, 2**62), (len, 10**8), (overlap, None), (beyond, None)])
def test_crafted_headers(asset: Path, file: str, edit: Any, size: int | None) -> None:
    if file == "anchors" and size is None:
        edit = lambda told: told["vectors"].update(data_offsets=[2**40, 2**40 + 320])  # noqa: E731
    header(asset / f"{file}.safetensors", edit, size)
    with pytest.raises(ValueError, match=rf"{file}\.safetensors is no readable safetensors file"):
        PreBuffer.from_pretrained(asset)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "a/b.safetensors", "", 5, "../../etc"])
def test_an_index_leads_nowhere_else(asset: Path, name: Any) -> None:
    shutil.move(asset / "model.safetensors", asset.parent / "model.safetensors")
    index = {"weight_map": {"boundary": name}}
    (asset / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which is no file of its own folder"):
        PreBuffer.from_pretrained(asset)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["pre_buffer"].update(depth=10**9), "pre_buffer.depth is 1000000000, more than"),
        (lambda c: c["pre_buffer"].update(depth=2), "claims depth 2, the tensors have 1 layers"),
        (lambda c: c["pre_buffer"].update(head_width=4000), "claims 2 heads of width 4000, stored: 8"),
        (lambda c: c["pre_buffer"].update(rope="os.system"), "rope 'os.system' is unknown"),
        (lambda c: c["pre_buffer"].update(attention="../../x"), "is unknown; registered"),
        (lambda c: c["pre_buffer"].update(__class__="x"), "does not describe a pre-Buffer"),
        (lambda c: c["patch_embedding"].update(width="$(id)"), "does not describe a pre-Buffer"),
        (lambda c: c["patch_embedding"].update(patch_size=-4), "misshapen: patch_embedding.patch_proj.weight"),
        (lambda c: c.update(patch_embedding="/etc/passwd"), "does not describe a pre-Buffer"),
        (lambda c: c.update(pre_buffer=[]), "does not describe a pre-Buffer"),
        (lambda c: c.update(image=["min_pixels"]), r"image must be a dict, got \['min_pixels'\]"),
        (lambda c: c.update(provenance="stages"), "provenance must be a dict, got 'stages'"),
        (lambda c: c.update(license={}), "license must be a str, got {}"),
    ],
)
def test_crafted_configs(asset: Path, edit: Any, message: str) -> None:
    edit_config(asset, edit)
    with pytest.raises(ValueError, match=message):
        PreBuffer.from_pretrained(asset)


def test_a_config_of_endless_depth(asset: Path) -> None:
    (asset / "config.json").write_text('{"a":' * 200_000)
    with pytest.raises(ValueError, match="not valid JSON"):
        PreBuffer.from_pretrained(asset)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"vectors": torch.zeros(2, 8)}, "must hold 'tokens' and 'vectors', got vectors"),
        ({"vectors": torch.zeros(2, 8), "tokens": torch.zeros(3)}, "'tokens' as bytes"),
        ({"vectors": torch.zeros(2, 8), "tokens": torch.tensor([255], dtype=torch.uint8)}, "are not UTF-8"),
        ({"vectors": torch.zeros(2, 8), "tokens": torch.tensor([97], dtype=torch.uint8)}, r"shape \(2, 8\); wanted"),
        ({"vectors": torch.zeros(1, 9), "tokens": torch.tensor([97], dtype=torch.uint8)}, r"shape \(1, 9\); wanted"),
    ],
)
def test_crafted_anchors(asset: Path, state: dict[str, torch.Tensor], message: str) -> None:
    save_tensors(asset / "anchors.safetensors", state)
    with pytest.raises(ValueError, match=message):
        PreBuffer.from_pretrained(asset)


def test_code_and_pickles_beside_it_are_not_touched(asset: Path) -> None:
    ran = asset / "ran"
    code = f"import pathlib; pathlib.Path({str(ran)!r}).touch()"
    for name in ("modeling_neo.py", "__init__.py", "conftest.py", "sitecustomize.py"):
        (asset / name).write_text(code)
    evil = b"cposix\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR."
    for name in ("pytorch_model.bin", "weights.pkl", "anchors.pt", "model.ckpt"):
        (asset / name).write_bytes(evil)
    edit_config(asset, lambda c: c.update(auto_map={"AutoModel": "modeling_neo.X"}, architectures=["modeling_neo.X"]))
    assert same_tensors(PreBuffer.from_pretrained(asset).state_dict(), weights_of(FROZEN))
    assert not ran.exists()
    (asset / "model.safetensors").write_bytes(evil)
    with pytest.raises(ValueError, match="no readable safetensors file"):
        PreBuffer.from_pretrained(asset)
    assert not ran.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "anchors.safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 0.5, -1])
def test_files_cut_short(asset: Path, file: str, kept: float) -> None:
    data = (asset / file).read_bytes()
    (asset / file).write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=f"{file} is no readable safetensors file .* cut short"):
        PreBuffer.from_pretrained(asset)


def test_a_card_that_is_no_text_does_no_harm(asset: Path) -> None:
    (asset / "README.md").write_bytes(b"\xff\xfe" * 10)
    assert same_tensors(PreBuffer.from_pretrained(asset).state_dict(), weights_of(FROZEN))


def test_damaged_tensors_are_named(asset: Path) -> None:
    state = weights_of(asset)
    state["renamed"] = state.pop("boundary")
    save_tensors(asset / "model.safetensors", state)
    with pytest.raises(ValueError, match="missing: boundary") as refused:
        PreBuffer.from_pretrained(asset)
    assert "unexpected: renamed" in str(refused.value)


# --- hand-made here, so that one look shows what an asset needs at least


def test_an_asset_without_anchors_attaches_by_random_bridges(tmp_path: Path, llm: Path) -> None:
    part = PreBuffer(1, 16, 2, 1, 8, 24)
    part.adopt(PatchEmbedding(16, width=8, patch_size=4))
    folder = part.save_pretrained(tmp_path / "asset")
    assert not (folder / "anchors.safetensors").exists()
    assert attach(folder, llm, bridge="random").bridge_out is not None

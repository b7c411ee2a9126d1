"""The pre-Buffer asset: out of one model, onto other language models."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edit_config, random_batch, randomize, same_outputs, same_tensors, weights_of
from llm_builders import EMBEDDING, native_model, relate_embeddings, text_llm

from neo_components import NEO, PostLLM, PreBuffer, attach, build, load_recipe
from neo_components.components.pre_buffer import Anchors, AssetInfo
from neo_components.data import load_tokenizer
from neo_components.model.attach import export_pre_buffer, shared_embeddings
from neo_components.model.vocabulary import token_strings

WIDTH, OTHER_WIDTH = 32, 48
OTHER: dict[str, Any] = {
    "question": "name the hue of this thing", "hidden_size": OTHER_WIDTH, "heads": 3, "kv_heads": 1, "vocab_size": 290,
    "seed": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model, one of another width and vocabulary, one of the same width, and a model's exported asset."""
    root = tmp_path_factory.mktemp("assets")
    llm, other = text_llm(root / "llm"), text_llm(root / "other", **OTHER)
    twin = text_llm(root / "twin", seed=9)
    asset = export_pre_buffer(native_model(llm), root / "asset", llm)
    return {"llm": llm, "other": other, "twin": twin, "asset": asset}


@pytest.fixture
def pre_buffer(folders: dict[str, Path]) -> PreBuffer:
    return PreBuffer.from_pretrained(folders["asset"])


def unexplained(caplog: pytest.LogCaptureFixture) -> tuple[int, float, float]:
    """Shared tokens and the two shares of variance that ``attach`` told."""
    number = r"([\d.]+)"
    pattern = rf"fitted on {number} shared tokens; variance left unexplained: in {number} .*, out {number} "
    [found] = re.findall(pattern, caplog.text)
    return int(found[0]), float(found[1]), float(found[2])


# --- export


def test_an_asset_stands_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    """What comes back is what was exported, and all of it lies in the folder."""
    model = native_model(folders["llm"])
    info = AssetInfo({"min_pixels": 64, "max_pixels": 4096}, {"stages": [{"stage": "one", "steps": 3}]}, "mit")
    folder = export_pre_buffer(model, tmp_path / "asset", folders["llm"], info=info)
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "model.safetensors", "anchors.safetensors", "preprocessor_config.json", "README.md"
    }  # fmt: skip
    loaded = PreBuffer.from_pretrained(folder)
    assert same_tensors(loaded.state_dict(), model.pre_buffer.state_dict())
    assert loaded.hparams == model.pre_buffer.hparams
    assert (loaded.info.image, loaded.info.provenance, loaded.info.license) == (info.image, info.provenance, "mit")
    assert "license: mit" in loaded.info.card
    vocabulary = token_strings(folders["llm"])
    assert loaded.anchors is not None and loaded.anchors.tokens == list(vocabulary)
    expected = weights_of(folders["llm"])[EMBEDDING][list(vocabulary.values())]
    assert torch.equal(loaded.anchors.vectors, expected.half().float())


def test_most_used_tokens_are_anchors_first(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = export_pre_buffer(native_model(folders["llm"]), tmp_path / "asset", folders["llm"], anchors=20)
    loaded = PreBuffer.from_pretrained(folder)
    assert loaded.anchors is not None and loaded.anchors.tokens == list(token_strings(folders["llm"]))[:20]
    assert loaded.anchors.vectors.shape == (20, WIDTH)


def test_anchors_of_a_bridged_model_lie_on_the_pre_buffers_side(folders: dict[str, Path], tmp_path: Path) -> None:
    """So an asset can be taken from an attached model, and fits the language model that it was attached to."""
    model = attach(folders["asset"], folders["other"], bridge="least_squares", text="shared")
    assert model.bridge_in is not None
    randomize(model.bridge_in, seed=3)
    again = PreBuffer.from_pretrained(export_pre_buffer(model, tmp_path / "again", folders["other"]))
    mine, theirs = shared_embeddings(again, model.post_llm)
    assert torch.allclose(mine, model.bridge_in(theirs).half().float(), atol=1e-3)
    refitted = attach(again, folders["other"], text="shared")
    assert refitted.bridge_in is not None
    assert torch.allclose(refitted.bridge_in(theirs), model.bridge_in(theirs), atol=0.02)


def test_anchors_are_word_embeddings_as_the_first_block_gets_them(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of a language model with a factor on them: scaled, and compared with the scaled ones of another."""
    model = native_model(folders["llm"])
    model.post_llm.hparams["embedding_multiplier"] = model.post_llm.embedding_multiplier = 3.0
    asset = PreBuffer.from_pretrained(export_pre_buffer(model, tmp_path / "asset", folders["llm"]))
    rows = list(token_strings(folders["llm"]).values())
    assert asset.anchors is not None
    assert torch.equal(asset.anchors.vectors, (3 * weights_of(folders["llm"])[EMBEDDING][rows]).half().float())
    assert attach(asset, model.post_llm).bridge_in is None
    assert attach(asset, folders["llm"]).bridge_in is not None


def test_tokens_are_compared_as_they_read(folders: dict[str, Path]) -> None:
    strings = token_strings(folders["llm"])
    tokenizer = load_tokenizer(str(folders["llm"]))
    [row] = tokenizer.encode(" color")
    assert strings[" color"] == row
    assert list(strings.values()) == sorted(strings.values())


# --- attach


def test_on_the_same_language_model_nothing_changes(folders: dict[str, Path]) -> None:
    model, joined = native_model(folders["llm"]), attach(folders["asset"], folders["llm"])
    assert joined.bridge_in is None and joined.bridge_out is None
    batch, _ = random_batch(model.input_spec, seed=4, images=1)
    with torch.no_grad():
        before, after = model(batch, output_hidden_states=True), joined(batch, output_hidden_states=True)
    assert before.hidden_states is not None and after.hidden_states is not None
    assert set(before.hidden_states) == {"embed", "layer_0", "layer_1", "layer_2", "final_norm"}
    assert same_tensors(before.hidden_states, after.hidden_states)
    assert torch.equal(before.logits, after.logits)


def test_least_squares_finds_a_known_relation(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Embeddings of the other language model are an affine map of ours, so both bridges can be exact."""
    ours = text_llm(tmp_path / "ours")
    other = text_llm(tmp_path / "theirs", **OTHER)
    weight, bias = torch.randn(OTHER_WIDTH, WIDTH) / WIDTH**0.5, torch.randn(OTHER_WIDTH)
    relate_embeddings(ours, other, weight, bias)
    asset = export_pre_buffer(native_model(ours), tmp_path / "asset", ours)
    with caplog.at_level(logging.INFO):
        model = attach(asset, other, bridge="least_squares")
    shared, left_in, left_out = unexplained(caplog)
    assert shared == len(set(token_strings(ours)) & set(token_strings(other))) > 256
    assert left_in < 0.002 and left_out < 0.002
    assert model.bridge_in is not None and model.bridge_out is not None
    assert torch.allclose(model.bridge_out.proj.weight, weight, atol=0.01)
    assert torch.allclose(model.bridge_out.proj.bias, bias, atol=0.01)
    mine, theirs = shared_embeddings(model.pre_buffer, model.post_llm)
    assert torch.allclose(model.bridge_in(theirs), mine, atol=0.03 * mine.std().item())


def test_unrelated_embeddings_are_told(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    """Least squares explain about as much of random vectors as there are unknowns; the log says how little."""
    with caplog.at_level(logging.INFO):
        attach(folders["asset"], folders["other"], text="shared")
    assert re.search(r"loses 1\.\d\d of the variance .* text='bypass' leads words around the pre-Buffer", caplog.text)
    shared, left_in, left_out = unexplained(caplog)
    assert left_in == pytest.approx(1 - OTHER_WIDTH / shared, abs=0.06)
    assert left_out == pytest.approx(1 - WIDTH / shared, abs=0.06)
    unseen = [float(share) for share in re.findall(r"left out ([\d.]+)", caplog.text)]
    assert len(unseen) == 2 and min(unseen) > 1.0  # a fit to what is not related is worse than the mean


def test_random_bridges_need_no_anchors(folders: dict[str, Path], pre_buffer: PreBuffer) -> None:
    pre_buffer.anchors = None
    model = attach(pre_buffer, folders["other"], bridge="random", text="shared")
    assert model.bridge_in is not None and model.bridge_out is not None
    assert model.bridge_in.proj.weight.shape == (WIDTH, OTHER_WIDTH)
    assert model.bridge_out.proj.weight.shape == (OTHER_WIDTH, WIDTH)
    assert model.bridge_in.proj.weight.std().item() == pytest.approx(OTHER_WIDTH**-0.5, rel=0.1)
    assert not model.bridge_in.proj.bias.any()


def test_auto_tells_the_same_language_model_from_another(
    folders: dict[str, Path], pre_buffer: PreBuffer, caplog: pytest.LogCaptureFixture
) -> None:
    same, twin, other = (attach(pre_buffer, folders[name], text="shared") for name in ("llm", "twin", "other"))
    assert same.bridge_in is None and same.bridge_out is None
    assert twin.bridge_in is not None and twin.bridge_in.proj.weight.shape == (WIDTH, WIDTH)
    assert other.bridge_in is not None
    pre_buffer.anchors = None
    assert attach(pre_buffer, folders["twin"]).bridge_in is None
    assert "has no anchors to compare; equal widths are taken as the same language model" in caplog.text


def test_a_language_model_takes_rope_and_mask_of_the_asset(folders: dict[str, Path], tmp_path: Path) -> None:
    sizes = PreBuffer.from_pretrained(folders["asset"]).hparams | {"rope": "1d", "attention": "causal", "base_h": 50.0}
    pre_buffer = PreBuffer(**sizes)
    pre_buffer.adopt(native_model(folders["llm"]).patch_embedding)
    post = attach(pre_buffer.save_pretrained(tmp_path / "a"), folders["other"], bridge="random").post_llm.hparams
    assert (post.rope, post.attention, post.base_h, post.base_w) == ("1d", "causal", 50.0, 1e4)


def test_orthogonal_bridges_find_a_known_rotation(folders: dict[str, Path], tmp_path: Path) -> None:
    """Embeddings of the other language model are ours turned into more room, twice as long, and moved."""
    ours, other = text_llm(tmp_path / "ours"), text_llm(tmp_path / "theirs", **OTHER)
    turn = torch.linalg.qr(torch.randn(OTHER_WIDTH, WIDTH))[0]
    relate_embeddings(ours, other, 2 * turn, torch.randn(OTHER_WIDTH))
    asset = export_pre_buffer(native_model(ours), tmp_path / "asset", ours)
    model = attach(asset, other, bridge="orthogonal")
    assert model.bridge_in is not None and model.bridge_out is not None
    assert max(model.bridge_in.unexplained or 1.0, model.bridge_out.unexplained or 1.0) < 1e-4
    assert torch.allclose(model.bridge_out.proj.weight, 2 * turn, atol=0.01)
    assert torch.allclose(model.bridge_in.proj.weight, turn.T / 2, atol=0.01)
    unrelated = attach(folders["asset"], folders["other"], bridge="orthogonal").bridge_out
    assert unrelated is not None
    weight = unrelated.proj.weight
    scale = weight.square().sum(0).mean()
    assert torch.allclose(weight.T @ weight, scale * torch.eye(WIDTH), atol=1e-4)
    assert 0.5 < (unrelated.unexplained or 0.0) <= 1.0


# --- faults


def test_faults_are_told_with_a_way_out(folders: dict[str, Path], pre_buffer: PreBuffer, tmp_path: Path) -> None:
    llm, other = folders["llm"], folders["other"]
    with pytest.raises(
        ValueError, match=r"bridge 'linear' is unknown; registered: .*identity, least_squares, orthogonal, random"
    ):
        attach(pre_buffer, llm, bridge="linear")
    with pytest.raises(ValueError, match=r"has no patch embedding; load an asset, or adopt\(PatchEmbedding"):
        attach(PreBuffer(**pre_buffer.hparams), llm)
    with pytest.raises(ValueError, match=r"bridge 'identity' needs equal widths, got 48 and 32"):
        attach(pre_buffer, other, bridge="identity")
    nameless = PostLLM(**dict(PostLLM.from_pretrained(other).hparams) | {"source": ""})
    with pytest.raises(
        ValueError, match=r"tokenizer is not known: give tokenizer=folder_or_hub_id; use bridge='random"
    ):
        attach(pre_buffer, nameless)
    assert attach(pre_buffer, nameless, tokenizer=other).bridge_out is not None
    one_dimensional = PostLLM.from_pretrained(llm, rope="1d")
    with pytest.raises(
        ValueError, match=r"rope 'native', and this PostLLM has '1d', .* another rule; give attach the "
    ):
        attach(pre_buffer, one_dimensional)
    assert attach(pre_buffer, llm).post_llm.hparams.rope == "native"  # the way out
    edit_config(Path(shutil.copytree(llm, tmp_path / "odd")), lambda c: c.update(head_dim=18))
    with pytest.raises(ValueError, match=r"multiple of 4 .*, got 18: .* one with such heads cannot be widened, so not"):
        attach(pre_buffer, tmp_path / "odd")
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_width": 20, "depth": 1, "feed_forward_size": 8}
    wider = PostLLM(vocab_size=30, hidden_size=WIDTH, **sizes)  # head widths need not agree
    assert attach(pre_buffer, wider, bridge="identity").post_llm.hparams.head_width == 20
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*bare; give a folder that holds tokenizer.json"):
        attach(pre_buffer, nameless, tokenizer=bare)
    with pytest.raises(FileNotFoundError, match=r"no/such/folder"):
        attach(tmp_path / "no/such/folder", llm)
    with pytest.raises(ValueError, match="holds no pre-Buffer but 'qwen3'"):
        attach(llm, other)
    pre_buffer.anchors = None
    with pytest.raises(
        ValueError, match=r"no anchors .* export it with its tokenizer; use bridge='random' .* and train"
    ):
        attach(pre_buffer, other)


@pytest.mark.parametrize("strange", [False, True])
def test_too_few_shared_tokens(folders: dict[str, Path], tmp_path: Path, strange: bool) -> None:
    """15 tokens are too few to fit from, however many there are that the other side does not know."""
    anchors = 16 if strange else 15
    folder = export_pre_buffer(native_model(folders["llm"]), tmp_path / "asset", folders["llm"], anchors)
    pre_buffer = PreBuffer.from_pretrained(folder)
    if strange:
        assert pre_buffer.anchors is not None
        pre_buffer.anchors = Anchors([*pre_buffer.anchors.tokens[:15], "unheard of"], pre_buffer.anchors.vectors)
    with pytest.raises(
        ValueError, match=r"shares only 15 of these tokens; 16 are needed .*; use bridge='random' .* and train"
    ):
        attach(pre_buffer, folders["other"])


# --- what is attached is a model like any other


def test_attached_models_are_saved_and_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    model = attach(folders["asset"], folders["other"], text="shared")
    loaded = NEO.from_pretrained(model.save_pretrained(tmp_path / "own"))
    assert same_tensors(loaded.state_dict(), model.state_dict())
    assert same_outputs(loaded, model)
    with pytest.raises(ValueError, match='cannot hold this model; use layout="neo_components"') as refused:
        model.save_pretrained(tmp_path / "released", layout="released")
    assert "bridge_in is not None" in str(refused.value) and "hidden_size: pre-Buffer 32" in str(refused.value)
    assert not (tmp_path / "released").exists()


def test_an_attached_model_learns(folders: dict[str, Path]) -> None:
    model = attach(folders["asset"], folders["other"], text="shared")
    batch, _ = random_batch(model.input_spec, seed=4, images=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.loss(batch)
    before.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for parameter in model.groups()["bridge"]:
        assert parameter.grad is not None and parameter.grad.any()
    optimizer.step()
    assert model.loss(batch) < before


def test_reset_leaves_all_but_the_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    """The control arm: the same shapes, sizes and bridges, other weights in patch embedding and pre-Buffer."""
    path = tmp_path / "attach.yaml"
    parts = {"pre_buffer": {"from_pretrained": str(folders["asset"])}}
    parts["post_llm"] = {"from_pretrained": str(folders["other"])}
    path.write_text(json.dumps({"model": parts}))
    kept, fresh = (build(load_recipe(path, [f"model.pre_buffer.reset={arm}"]).model) for arm in ("false", "true"))
    one, two = kept.state_dict(), fresh.state_dict()
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in two.items()}
    torch.manual_seed(0)
    same_seed = PreBuffer(**kept.pre_buffer.hparams).state_dict()
    torch.manual_seed(0)
    new = build(load_recipe(path, ["model.pre_buffer.reset=true"]).model).pre_buffer.state_dict()
    drawn = [name for name in same_seed if "q_proj.weight" in name]
    assert drawn and not any(torch.equal(same_seed[name], new[name]) for name in drawn)
    for name in one:
        # The fit solves a linear system, whose last digits may differ from run to run.
        assert torch.allclose(one[name], two[name], atol=1e-6) != name.startswith("pre_buffer."), name
    assert same_tensors(kept.pre_buffer.state_dict(), PreBuffer.from_pretrained(folders["asset"]).state_dict())

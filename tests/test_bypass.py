"""Text around the pre-Buffer: words reach the language model untouched, each image passes the pre-Buffer alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import SIZES, random_batch, randomize, same_outputs, same_tensors, tiny_model
from llm_builders import native_model, text_llm

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer, Sample, attach, build, load_recipe, pack
from neo_components.components.bridge import Bridge
from neo_components.model.attach import export_pre_buffer
from neo_components.model.generation import generate
from neo_components.types import NO_IMAGE


def around(seed: int = 0, width: int | None = None, backend: str = "auto") -> NEO:
    """A random model whose words go around the pre-Buffer; of another width than the post-LLM if given."""
    sizes = SIZES | ({} if width is None else {"hidden_size": width})
    pre = PreBuffer(depth=2, **sizes, backend=backend)
    post = PostLLM(60, depth=2, image_token_id=57, **SIZES, backend=backend)
    out = None if width is None else Bridge(width, SIZES["hidden_size"])
    embedding = PatchEmbedding(sizes["hidden_size"], width=16, patch_size=4)
    model = NEO(embedding, pre, post, bridge_out=out, text="bypass")
    randomize(model, seed)
    return model


@pytest.mark.parametrize("width", [None, 24])
def test_text_logits_are_the_language_models(width: int | None) -> None:
    model = around(width=width)
    ids = torch.randint(0, 57, (3, 9))
    rows = [pack([Sample(row)], model.input_spec) for row in ids]
    with torch.no_grad():
        for row, one in zip(rows, ids, strict=True):
            assert torch.equal(model(row).logits, model.post_llm.text_logits(one[None]))


def test_words_before_an_image_do_not_change_it_and_words_after_it_do_read_it() -> None:
    """What enters the language model: words as it embeds them; an image is the same wherever it stands."""
    model = around(width=24)
    batch, _ = random_batch(model.input_spec, seed=3, images=2)
    with torch.no_grad():
        states = model(batch, output_hidden_states=True).hidden_states
        assert states is not None
        image = batch.image_ids != NO_IMAGE
        words = ~image & (batch.token_ids < 58)
        assert torch.equal(states["embed"][words], model.post_llm.embed(batch.token_ids)[words])
        [sample] = [Sample(torch.tensor([58, 57, 57, 59]), None, [torch.randn(3, 8, 16)])]
        moved = Sample(torch.tensor([5, 9, 7, 58, 57, 57, 59, 3]), None, sample.images)
        alone = model(pack([sample], model.input_spec), output_hidden_states=True).hidden_states
        later = model(pack([moved], model.input_spec), output_hidden_states=True).hidden_states
    assert alone is not None and later is not None
    assert torch.allclose(alone["embed"][0], later["embed"][0, 3:7], atol=1e-5)
    assert not torch.allclose(alone["embed"][0], model.post_llm.embed(sample.token_ids), atol=0.1)


def test_images_of_a_row_do_not_meet() -> None:
    """Against one pass of the pre-Buffer for each image by itself."""
    model = around()
    spec = model.input_spec
    pictures = [torch.randn(3, 8, 8), torch.randn(3, 16, 8), torch.randn(3, 8, 24)]
    runs = [[spec.image_start_id, *[spec.image_token_id] * n, spec.image_end_id] for n in (1, 2, 3)]
    together = pack(
        [Sample(torch.tensor([1, *runs[0], 2, *runs[1]]), None, pictures[:2]),
         Sample(torch.tensor([*runs[2], 4]), None, pictures[2:])], spec, seq_len=20,
    )  # fmt: skip
    with torch.no_grad():
        found = model(together, output_hidden_states=True).hidden_states
        assert found is not None
        start = 1
        for run, picture in zip(runs, pictures, strict=True):
            one = pack([Sample(torch.tensor(run), None, [picture])], spec)
            x = model.embed(one)
            x = model.pre_buffer(x, one.positions, one.document_ids, one.image_ids)
            assert torch.allclose(found["embed"][0, start : start + len(run)], x[0], atol=1e-5)
            start += len(run) + (1 if run is runs[0] else 0)


def test_cached_generation_equals_recomputation_and_stops_apart() -> None:
    model = around(width=24)
    spec = model.input_spec
    picture = [spec.image_start_id, spec.image_token_id, spec.image_end_id]
    prompts = [Sample(torch.tensor([1, *picture, 2]), None, [torch.randn(3, 8, 8)]), Sample(torch.tensor([4, 5, 6]))]
    first = model.generate(prompts, max_new_tokens=6)
    stop = [int(first[0][1])]
    again = generate(model, pack(prompts, spec), 6, stop_token_ids=stop)
    assert len(again[0]) <= 2
    for prompt, new in zip(prompts, model.generate(prompts, max_new_tokens=6), strict=True):
        ids = prompt.token_ids
        for token in new:
            with torch.no_grad():
                assert model(pack([Sample(ids, None, prompt.images)], spec)).logits[0, -1].argmax() == token
            ids = torch.cat([ids, token[None]])


def test_everything_learns_and_ranks_without_images_have_zeros() -> None:
    model = around(width=24).train()
    batch, _ = random_batch(model.input_spec, seed=4, images=1)
    model.loss(batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.pre_buffer.layers[0].self_attn.q_proj.weight.grad.any()  # type: ignore[union-attr]
    model.zero_grad(set_to_none=True)
    text = Sample(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]))
    model.loss(pack([text], model.input_spec)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not model.pre_buffer.boundary.grad.any()  # type: ignore[union-attr]


def test_backends_agree_and_attention_maps_are_the_language_models() -> None:
    outs = []
    for backend in ("sdpa", "eager", "flex"):
        model = around(width=24, backend=backend)
        batch, _ = random_batch(model.input_spec, seed=6, images=2, padding=0, rows=1)
        with torch.no_grad():
            outs.append(model(batch).logits)
            assert len(model.attention_maps(batch)) == 2
    assert torch.allclose(outs[0], outs[1], atol=1e-4) and torch.allclose(outs[0], outs[2], atol=1e-4)


# --- attached, saved, exported


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bypass")
    llm, other = text_llm(root / "llm"), text_llm(root / "other", hidden_size=48, heads=3, vocab_size=290, seed=5)
    return {"llm": llm, "other": other, "asset": export_pre_buffer(native_model(llm), root / "asset", llm)}


@pytest.mark.parametrize("bridge", ["least_squares", "orthogonal", "random"])
def test_attach_around(folders: dict[str, Path], bridge: str, tmp_path: Path) -> None:
    model = attach(folders["asset"], folders["other"], bridge=bridge, text="bypass")
    assert model.bridge_in is None and model.bridge_out is not None
    assert (model.bridge_out.unexplained is None) == (bridge == "random")
    ids = torch.randint(0, 200, (1, 12))
    with torch.no_grad():
        out = model(pack([Sample(ids[0])], model.input_spec)).logits
        assert torch.equal(out, PostLLM.from_pretrained(folders["other"]).text_logits(ids))
    loaded = NEO.from_pretrained(model.save_pretrained(tmp_path / "own"))
    assert loaded.text == "bypass" and same_tensors(loaded.state_dict(), model.state_dict())
    assert same_outputs(loaded, model)


def test_the_asset_of_an_attached_model_keeps_its_anchors(folders: dict[str, Path], tmp_path: Path) -> None:
    before = PreBuffer.from_pretrained(folders["asset"]).anchors
    model = attach(folders["asset"], folders["other"], text="bypass")
    after = PreBuffer.from_pretrained(export_pre_buffer(model, tmp_path / "asset", folders["other"])).anchors
    assert before is not None and after is not None
    assert after.tokens == before.tokens and torch.equal(after.vectors, before.vectors)


def test_recipes_say_where_text_goes(folders: dict[str, Path], tmp_path: Path) -> None:
    parts = {"pre_buffer": {"from_pretrained": str(folders["asset"])}, "bridge": "orthogonal", "text": "bypass"}
    parts["post_llm"] = {"from_pretrained": str(folders["other"])}
    path = tmp_path / "attach.yaml"
    path.write_text(json.dumps({"model": parts}))
    model = build(load_recipe(path).model)
    assert model.text == "bypass" and model.bridge_out is not None and model.bridge_out.unexplained is not None
    with pytest.raises(
        ValueError, match=r"model\.text: unknown text 'around'; nearest: auto \(registered: auto, bypass, shared\)"
    ):
        load_recipe(path, ["model.text=around"])


def test_what_cannot_be_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from neo_components.export.hf.folder import write_hf

    with pytest.raises(ValueError, match="text must be one of shared, bypass, auto, got 'around'"):
        attach(folders["asset"], folders["llm"], text="around")
    parts = tiny_model()
    with pytest.raises(ValueError, match="text must be one of shared, bypass, got 'x'"):
        NEO(parts.patch_embedding, parts.pre_buffer, parts.post_llm, text="x")
    with pytest.raises(ValueError, match="leads no text into the pre-Buffer, so bridge_in must be None"):
        NEO(parts.patch_embedding, parts.pre_buffer, parts.post_llm, Bridge(32, 32), text="bypass")
    model = attach(folders["asset"], folders["llm"], text="bypass")
    with pytest.raises(ValueError, match="text 'bypass'"):
        model.save_pretrained(tmp_path / "released", layout="released")
    with pytest.raises(ValueError, match="model with text='bypass' is not exported to this form"):
        write_hf(model, None, tmp_path / "hf", 64, 64)

"""Parity with the reference outputs: positions, mask, every hidden state, losses, RoPE, initial weights, generation."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import by_section, image_tokens, text_inputs
from safetensors.torch import load_file
from torch import Tensor

from neo_components import NEO, Batch, InputSpec, PatchEmbedding, PostLLM, PreBuffer, Sample, pack
from neo_components.components.attention import NativeAttention
from neo_components.components.backends import prepare_attention
from neo_components.components.masks import dense_mask
from neo_components.components.patch_embeddings.neo import _rotated
from neo_components.components.rotary import Rotary, rotate
from neo_components.data.packing import patchify
from neo_components.model.layouts import released_of
from neo_components.types import NO_IMAGE

Tensors = dict[str, Tensor]
CASES = ("a_single_square_image", "b_two_nonsquare_images", "c_packed_three_documents")
# The inference layout names no image tokens; these are those of the training layout.
IDS = {"image_token_id": 389, "image_start_id": 390, "image_end_id": 391}


def far(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of two tensors of one shape."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def image_of(pixel_values: Tensor, grid: list[int], patch_size: int = 16) -> Tensor:
    """[3, H, W] from the reference's patches, which lie row by row."""
    patches = pixel_values.unflatten(0, grid).unflatten(-1, (3, patch_size, patch_size))
    return patches.permute(2, 0, 3, 1, 4).reshape(3, grid[0] * patch_size, grid[1] * patch_size)


def images_of(reference: Tensors) -> list[Tensor]:
    grids = reference["grid_hw"].tolist()
    parts = reference["pixel_values"].split([rows * columns for rows, columns in grids])
    return [image_of(part, grid) for part, grid in zip(parts, grids, strict=True)]


def samples_of(reference: Tensors) -> list[Sample]:
    """The reference's packed row as samples."""
    images, factor = images_of(reference), 32
    samples = []
    for start, end in reference["seq_boundaries"].unfold(0, 2, 1).tolist():
        ids = reference["input_ids"][start:end]
        own, left = [], int((ids == IDS["image_token_id"]).sum())
        while left:
            own.append(images.pop(0))
            left -= own[-1].shape[1] * own[-1].shape[2] // factor**2
        samples.append(Sample(ids, reference["labels"][start:end], own))
    assert not images
    return samples


@dataclass
class Case:
    """A model, a reference and the reference's input as a batch."""

    model: NEO
    spec: InputSpec
    reference: Tensors
    batch: Batch


@pytest.fixture(scope="module", params=["config.json", "config_inference_layout.json"])
def model(request: Any, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> NEO:
    """The reference model, read by either kit's config."""
    folder = tmp_path_factory.mktemp("released")
    shutil.copy(data_folder / "model_forward" / "model.safetensors", folder)
    shutil.copy(data_folder / "model_forward" / request.param, folder / "config.json")
    return NEO.from_pretrained(folder).eval()


@pytest.fixture(scope="module", params=CASES)
def case(request: Any, data_folder: Path, model: NEO) -> Case:
    reference = load_file(data_folder / "model_forward" / f"{request.param}.safetensors")
    spec = replace(model.input_spec, **IDS)
    return Case(model, spec, reference, pack(samples_of(reference), spec))


def test_training_layout_names_the_image_tokens(data_folder: Path) -> None:
    spec = NEO.from_pretrained(data_folder / "model_forward").input_spec
    assert {name: getattr(spec, name) for name in IDS} == IDS


def test_batch(case: Case) -> None:
    """Positions, documents, images, labels and mask are the reference's, exactly."""
    batch, reference = case.batch, case.reference
    assert torch.equal(batch.token_ids[0], reference["input_ids"])
    assert torch.equal(batch.positions[0], reference["indexes"])
    assert torch.equal(batch.document_ids[0], reference["document_ids"])
    assert torch.equal(batch.labels[0], reference["labels"])
    numbers = torch.where(batch.image_ids[0] == NO_IMAGE, NO_IMAGE, batch.image_ids[0] + 1)
    assert torch.equal(numbers, reference["modality_indicators"])
    assert torch.equal(dense_mask(batch.document_ids, batch.image_ids)[0], reference["attention_mask"])


def test_forward(case: Case) -> None:
    """Visual tokens, the output of every step and the logits."""
    batch, reference = case.batch, case.reference
    with torch.no_grad():
        assert far(case.model.patch_embedding(batch.patches, batch.patch_positions), reference["pel_output"]) < 1e-4
        out = case.model(batch, output_hidden_states=True)
    expected = {name.removeprefix("hidden_states.") for name in reference if name.startswith("hidden_states.")}
    assert out.hidden_states is not None
    assert set(out.hidden_states) == expected == {"embed", "final_norm", *(f"layer_{n}" for n in range(4))}
    for name, state in out.hidden_states.items():
        assert far(state[0], reference[f"hidden_states.{name}"]) < 1e-4, name
    assert far(out.logits[0], reference["logits"]) < 1e-4
    labels = reference["labels"][1:]
    nll = F.cross_entropy(out.logits[0, :-1], labels, reduction="none", ignore_index=-100)
    assert far(nll, reference["token_nll"]) < 1e-4


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_losses(case: Case, reduction: str) -> None:
    batch = pack(samples_of(case.reference), case.spec, loss_reduction=reduction)
    assert far(batch.loss_weights[0], case.reference[f"loss_weight.{reduction}"]) < 1e-6
    expected = float(case.reference[f"loss.{reduction}"])
    assert float(case.model(batch).loss.detach()) == pytest.approx(expected, abs=1e-5)
    assert float(case.model.loss(batch).detach()) == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def rope(data_folder: Path) -> Tensors:
    return load_file(data_folder / "rope" / "rope_text.safetensors")


def test_rope_tables(rope: Tensors) -> None:
    rotary = Rotary("native", 16, 1e6, 1e4, 1e4)
    assert torch.equal(rotary.frequency, torch.cat([rope[f"inv_freq_{axis}"] for axis in "thw"]))
    cosines, sines = (table[0, :, 0].split((8, 4, 4), dim=-1) for table in rotary(rope["positions"][None]))
    for axis, cosine, sine in zip("thw", cosines, sines, strict=True):
        # The reference repeats its table over both halves of the channels.
        assert far(torch.cat([cosine, cosine], -1), rope[f"cos_{axis}"]) < 1e-6
        assert far(torch.cat([sine, sine], -1), rope[f"sin_{axis}"]) < 1e-6


@pytest.mark.parametrize("kind", ["q", "k"])
def test_rotated_channels(rope: Tensors, kind: str) -> None:
    tables = Rotary("native", 16, 1e6, 1e4, 1e4)(rope["positions"][None])
    turned = rotate([rope[f"{kind}_{axis}_in"].transpose(0, 1)[None] for axis in "thw"], *tables)
    for axis, part in zip("thw", by_section(turned[0].transpose(0, 1), 16), strict=True):
        assert far(part, rope[f"{kind}_{axis}_out"]) < 1e-6


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("backend", ["sdpa", "flex", "eager"])
def test_native_attention(data_folder: Path, backend: str) -> None:
    """One attention module step by step, under a plain causal mask."""
    reference = load_file(data_folder / "rope" / "attention_causal.safetensors")
    settings = json.loads((data_folder / "rope" / "settings.json").read_text())["llm"]
    attention = NativeAttention(
        settings["hidden_size"], settings["num_attention_heads"], settings["num_key_value_heads"],
        settings["head_dim"], settings["rms_norm_eps"],
    )  # fmt: skip
    prefix = "weight."
    attention.load_state_dict({n.removeprefix(prefix): t for n, t in reference.items() if n.startswith(prefix)})
    document_ids = torch.zeros(1, 25, dtype=torch.int64)
    backbone = prepare_attention(document_ids, document_ids - 1, "causal", backend)
    seen: dict[str, Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        seen.update(query=q, key=k, value=v, out=backbone(q, k, v, scale), scale=scale)
        return seen["out"]

    with torch.no_grad():
        tables = Rotary("native", 16, settings["rope_theta"], settings["rope_theta_hw"], settings["rope_theta_hw"])
        output = attention(reference["hidden_in"][None], text_inputs(tables(reference["positions"][None]), attend))
    assert seen["scale"] == pytest.approx(float(reference["softmax_scale"]))
    for name in ("query", "key"):
        assert far(torch.cat(by_section(seen[name][0].transpose(0, 1), 16), -1), reference[name]) < 1e-5
    assert far(seen["value"][0].transpose(0, 1), reference["value"]) < 1e-5
    assert far(seen["out"][0].transpose(0, 1), reference["attn_out_heads"]) < 1e-5
    assert far(output[0], reference["output"]) < 1e-5


def test_patch_embedding_step_by_step(data_folder: Path) -> None:
    reference = load_file(data_folder / "rope" / "patch_embedding_layer.safetensors")
    layer = PatchEmbedding(64, width=32)
    part = "weight.patch_embedding", "weight.dense_embedding"
    layer.load_state_dict(
        {
            "patch_proj.weight": reference[f"{part[0]}.weight"].flatten(1),
            "patch_proj.bias": reference[f"{part[0]}.bias"],
            "token_proj.weight": reference[f"{part[1]}.weight"].permute(0, 2, 3, 1).flatten(1),
            "token_proj.bias": reference[f"{part[1]}.bias"],
        }
    )
    spec = InputSpec(0, 1, 2, 3, patch_size=16, fold=2, channels=3, index_rule=lambda ids, grids: ids)
    images = images_of(reference)
    patches, places = patchify(images, spec)
    # Where each of our patches stands among the reference's, which lie row by row.
    starts = torch.tensor([0, images[0].shape[1] * images[0].shape[2] // 256])
    columns = torch.tensor([image.shape[2] // 16 for image in images])
    number = (torch.arange(len(places)) >= starts[1]).long()
    order = starts[number] + places[:, 0] * columns[number] + places[:, 1]
    assert sorted(order.tolist()) == list(range(len(order)))
    assert torch.equal(patches, reference["pixel_values"][order])
    assert torch.equal(places, torch.stack([reference["pos_y"], reference["pos_x"]], -1)[order])

    steps: Tensors = {}
    layer.patch_proj.register_forward_hook(lambda module, args, out: steps.update(after_conv1=out))
    layer.token_proj.register_forward_pre_hook(lambda module, args: steps.update(after_rotary=args[0].view(-1, 32)))
    with torch.no_grad():
        output = layer(patches, places)
        turned = _rotated(reference["rotary_in"][order], layer._angles(places))
    assert far(steps["after_conv1"], reference["after_conv1"][order]) < 1e-4
    assert far(F.gelu(steps["after_conv1"]), reference["after_gelu"][order]) < 1e-4
    assert far(steps["after_rotary"], reference["after_rotary"][order]) < 1e-4
    assert far(turned, reference["rotary_out"][order]) < 1e-5
    assert far(output, reference["output"]) < 1e-4


@pytest.fixture(params=["untied", "tied"])
def llm(request: Any, data_folder: Path) -> Path:
    return data_folder / "init_from_llm" / request.param


def widened(llm: Path, depth: int) -> NEO:
    """The model that is made from a language model: a random pre-Buffer of its sizes in front of it."""
    post_llm = PostLLM.from_pretrained(llm / "llm")
    names = ("hidden_size", "num_heads", "num_kv_heads", "head_width", "feed_forward_size", "norm_eps", "base_t")
    pre_buffer = PreBuffer(depth, **{name: post_llm.hparams[name] for name in names})
    return NEO(PatchEmbedding(pre_buffer.hparams.hidden_size, width=16), pre_buffer, post_llm)


def test_initial_weights(llm: Path) -> None:
    """What comes from the language model is exact; the random part has the reference's names, shapes and spread."""
    info = json.loads((llm / "expected_info.json").read_text())
    expected = load_file(llm / "expected_state.safetensors")
    model = widened(llm, info["extra_num_layers"])
    released = released_of(model)
    state = {released.rename(name): tensor for name, tensor in model.state_dict().items()}
    assert ("language_model.lm_head.weight" in state) is not info["tie_word_embeddings"]
    state["language_model.lm_head.weight"] = model.post_llm.head_weight.detach()
    language = {name: list(tensor.shape) for name, tensor in state.items() if name in info["shapes"]}
    assert language == info["shapes"]
    assert set(expected) | set(info["random_part"]) == set(info["shapes"])
    # Beside these there are the two convolutions, with biases, and the vectors of <img> and </img>.
    assert len(state) == len(info["shapes"]) + 5
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    assert info["random_part"]
    for name, told in info["random_part"].items():
        values, n = state[name], state[name].numel()
        if told["all_ones"]:
            assert torch.equal(values, torch.ones_like(values)), name
        else:
            # Five standard errors of a normal(0, 0.02).
            assert abs(float(values.mean())) < 5 * 0.02 / n**0.5, name
            assert abs(float(values.std()) - 0.02) < 5 * 0.02 / (2 * n) ** 0.5, name


def test_widened_llm_reads_text_as_before(llm: Path) -> None:
    """The post-LLM alone, and behind an empty pre-Buffer, gives the language model's own logits."""
    reference = load_file(llm / "llm_logits.safetensors")
    model = widened(llm, 0)
    with torch.no_grad():
        alone = model.post_llm.text_logits(reference["input_ids"][None])[0]
        whole = model(pack([Sample(reference["input_ids"])], model.input_spec)).logits[0]
    assert far(alone, reference["logits"]) < 1e-5
    assert far(whole, reference["logits"]) < 1e-5


GENERATION = ("image_prompt", "text_prompt", "image_prompt_eos")


@pytest.mark.parametrize("name", GENERATION)
def test_generation(data_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Greedy ids are exact; cached logits equal the reference's and those of the whole sequence at once."""
    told = json.loads((data_folder / "generation" / "cases.json").read_text())[name]
    reference = load_file(data_folder / "generation" / f"{name}.safetensors")
    model = NEO.from_pretrained(data_folder / told["model"])
    images = images_of(reference) if "grid_hw" in reference else []
    prompt, ids = Sample(reference["input_ids"], images=images), reference["generated_ids"]
    assert torch.equal(pack([prompt], model.input_spec).positions[0], reference["indexes"])

    head, steps = model.post_llm.logits, []
    monkeypatch.setattr(model.post_llm, "logits", lambda hidden: steps.append(head(hidden)) or steps[-1])
    stop = [told["eos_token_id"]]
    [new] = model.generate([prompt], max_new_tokens=told["max_new_tokens"], stop_token_ids=stop)
    monkeypatch.undo()
    assert new.tolist() == ids.tolist() == told["generated_ids"]
    assert far(torch.cat(steps), reference["step_logits"]) < 1e-4
    assert far(steps[0][0], reference["step0_logits"]) < 1e-4
    with torch.no_grad():
        whole = Sample(torch.cat([prompt.token_ids, new]), images=images)
        logits = model(pack([whole], model.input_spec)).logits[0, len(prompt.token_ids) - 1 : -1]
    assert far(torch.cat(steps), logits) < 1e-4


def test_prompts_generate_together_as_alone(data_folder: Path) -> None:
    """All three prompts in one call give the ids of each."""
    cases = json.loads((data_folder / "generation" / "cases.json").read_text())
    model = NEO.from_pretrained(data_folder / "model_forward")
    prompts = []
    for name in GENERATION:
        reference = load_file(data_folder / "generation" / f"{name}.safetensors")
        images = images_of(reference) if "grid_hw" in reference else []
        assert image_tokens(model.input_spec, (1, 1))[0] in reference["input_ids"] or not images
        prompts.append(Sample(reference["input_ids"], images=images))
    new = model.generate(prompts, max_new_tokens=16, stop_token_ids=[386, 312])
    assert [tokens.tolist() for tokens in new] == [cases[name]["generated_ids"] for name in GENERATION]

"""``docs/extend.md``: every file, recipe and command of the page runs as written; its parts compute what it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import SIZES, VOCAB, edit_config, random_image, randomize, set_backend, weights_of
from commands import good, neo
from llm_builders import word_tokenizer
from llm_references import plain
from shard_builders import png, turns
from test_estimate import saved, told
from test_flops import counted
from torch import Tensor, nn

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer, Sample, pack
from neo_components.components.bridge import LeastSquares
from neo_components.components.image_embedding import ImageEmbedding, Product
from neo_components.components.masks import dense_mask
from neo_components.data import read_shards, write_shards
from neo_components.estimate.flops import step_flops
from neo_components.export.hf.folder import _check_parts
from neo_components.export.torch_export import write_programs
from neo_components.model.attach import image_features
from neo_components.recipe import import_user_modules
from neo_components.registry import (
    BRIDGES,
    CONVERTERS,
    EXPERTS,
    LLM_FAMILIES,
    MASKS,
    METRICS,
    PATCH_EMBEDDINGS,
    ROPES,
    Registry,
)
from neo_components.storage.weights import save_tensors
from neo_components.training.checkpoints import read_checkpoint
from neo_components.training.groups import train_only
from neo_components.types import DocumentTokens, Frame, ImageGrid, TokenKind, kinds_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
FILES = {text[2:].split("\n")[0]: text for kind, text in BLOCKS if kind in ("python", "yaml") and text.startswith("# ")}
COMMANDS = [shlex.split(line, comments=True) for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
PARTS: dict[str, tuple[Registry, str]] = {
    "clock": (ROPES, "rope"),
    "prefix": (MASKS, "attention"),
    "eve": (PATCH_EMBEDDINGS, "patch_embedding"),
    "linear": (PATCH_EMBEDDINGS, ""),
    "visual_ffn": (EXPERTS, "experts"),
    "whitened": (BRIDGES, "bridge"),
    "my_llm": (LLM_FAMILIES, ""),
    "pairs": (CONVERTERS, ""),
    "contains": (METRICS, ""),
}
MODELS = ("clock", "prefix", "eve", "visual_ffn", "whitened")
"""Those that a model is made of."""


def converter() -> str:
    return (ROOT / "docs" / "examples" / "pairs.py").read_text()


def metric() -> str:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    [text] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "METRICS.register" in block]
    return str(text)


def world_of_the_page(folder: Path, world: Path) -> None:
    """Its files, language models, shards (a video among them) and pictures."""
    for name, text in (FILES | {"pairs.py": converter(), "my_metric.py": metric()}).items():
        (folder / name).write_text(text)
    for name in ("llm", "other"):
        (folder / name).symlink_to(world / name)
    plain("llama", folder / "my_llm", attention_bias=True, rms_norm_eps=1e-5)
    state = {name.replace("self_attn", "attention"): t for name, t in weights_of(folder / "my_llm").items()}
    save_tensors(folder / "my_llm" / "model.safetensors", state)
    edit_config(folder / "my_llm", lambda c: c.update(model_type="my_llm", use_bias=c.pop("attention_bias")))
    word_tokenizer().save_pretrained(folder / "my_llm")
    (folder / "photos").mkdir()
    (folder / "photos" / "red.png").write_bytes(png(64, 96, (200, 0, 0)))
    (folder / "pairs.csv").write_text("red.png,What color is it?,red\n")
    samples: list[dict[str, Any]] = [
        {"key": f"s{n}", "images": [png(64, 96, (40 * n, 0, 9))], "conversations": turns("<image>\nHue?", "red")}
        for n in range(4)
    ]
    write_shards(samples, folder / "shards" / "validation")
    frames = [png(64, 64, (40 * n, 0, 9)) for n in range(3)]
    video = {"frames": [3], "frame_times": [0.0, 0.5, 2.0]}
    samples.append({"key": "v", "images": frames, "conversations": turns("<image>\nFast?", "red")} | video)
    write_shards(samples, folder / "shards" / "talk")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Iterator[dict[str, str]]:
    """All commands of the page in their order, in its world, which is the working folder: command -> what it printed.

    The parts stay registered for the tests of this file.
    """
    folder, before, path = tmp_path_factory.mktemp("extend"), Path.cwd(), list(sys.path)
    world_of_the_page(folder, world)
    os.chdir(folder)
    try:
        outputs = {" ".join(words): good(*words[1:]) for words in COMMANDS if words[0] == "neo"}
        import_user_modules(["linear"])
        yield outputs
    finally:
        os.chdir(before)
        sys.path[:] = path
        for name, (registry, _) in PARTS.items():
            if name in registry:
                registry.remove(name)
        for name in (*PARTS, "my_metric"):
            sys.modules.pop(name, None)


def fresh(*words: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, which knows none of the parts."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)


# --- the page


def test_files_are_complete_and_short() -> None:
    """At most 40 lines each, one for each kind of part, and every command is one of ours."""
    files = {name: text for name, text in FILES.items() if name.endswith(".py")} | {
        "pairs.py": converter(), "my_metric.py": metric(),
    }  # fmt: skip
    assert set(files) == {f"{name}.py" for name in PARTS if name != "contains"} | {"my_metric.py"}
    assert {name: lines for name, text in files.items() if (lines := text.count("\n")) > 40} == {}
    assert {words[0] for words in COMMANDS} == {"neo"} and len(COMMANDS) >= 15
    assert '``` {.python}\n--8<-- "docs/examples/pairs.py"\n```' in PAGE


def test_commands_and_what_they_leave(page: dict[str, str]) -> None:
    trained = [words for words in page if words.startswith("neo train")]
    assert len(trained) == 9
    assert all("model: outputs/" in page[words] for words in trained)
    assert page["neo recipes validate clock.yaml --import clock"] == "valid\n"
    assert "neo data pairs pairs.csv --images photos -o shards/pairs --import pairs" in page
    [read] = read_shards("shards/pairs")
    assert read["conversations"][0]["value"] == "<image>\nWhat color is it?"
    [score] = [text for words, text in page.items() if words.startswith("neo evaluate")]
    assert score.split()[0] == "overall" and 0 <= float(score.split()[1]) <= 1


@pytest.mark.parametrize("name", MODELS)
def test_options_are_kept(page: dict[str, str], name: str) -> None:
    """In the model, in the complete recipe, in the checkpoint."""
    registry, key = PARTS[name]
    recipe = (Path("outputs") / name / "recipe.yaml").read_text()
    config = json.loads((Path("outputs") / name / "neo" / "config.json").read_text())
    stored = json.loads(read_checkpoint(Path("outputs") / name / "checkpoints" / "last.ckpt")["model"])
    wanted = {
        "clock": ("seconds_per_step", 0.5), "prefix": ("boundary", True), "eve": ("width", 32),
        "visual_ffn": ("scope", "boundary"), "whitened": ("reweight", 0.5),
    }[name]  # fmt: skip
    where = {"eve": "patch_embedding", "whitened": "bridge_out"}.get(name, "post_llm")
    for one in (config, stored):
        choice = one[where] if where != "post_llm" else one[where][key]
        assert choice["kind"] == name and choice[wanted[0]] == wanted[1]
    assert f"kind: {name}" in recipe and f"{wanted[0]}: " in recipe
    assert registry[name] is not None


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_model_is_loaded_strictly(page: dict[str, str], name: str, tmp_path: Path) -> None:
    """Bit for bit after another save; a tensor of the part that is missing is named."""
    model = NEO.from_pretrained(f"outputs/{name}/neo")
    again = NEO.from_pretrained(model.save_pretrained(tmp_path / "again"))
    assert outputs_equal(model, again)
    state = weights_of(tmp_path / "again")
    own = {"eve": "pre_buffer.patch_embedding.row_end", "visual_ffn": "post_llm.layers.0.mlp.visual.up_proj.weight",
           "whitened": "bridge_out.proj.weight"}  # fmt: skip
    if name in own:
        del state[own[name]]
        save_tensors(tmp_path / "again" / "model.safetensors", state)
        with pytest.raises(ValueError, match=re.escape(own[name])):
            NEO.from_pretrained(tmp_path / "again")


def outputs_equal(one: NEO, other: NEO) -> bool:
    batch = pack([sample_of(one, 0)], one.input_spec)
    with torch.no_grad():
        return torch.equal(one(batch).logits, other(batch).logits)


def test_who_has_not_imported_a_part_is_told(page: dict[str, str]) -> None:
    code = "from neo_components import NEO; NEO.from_pretrained('outputs/clock/neo')"
    done = fresh("-c", code)
    assert "rope 'clock' is unknown; registered: 1d, native; if it is your own, import the module" in done.stderr
    assert fresh("-c", f"import clock; {code}").returncode == 0


@pytest.mark.parametrize(
    ("name", "line", "key", "nearest"),
    [
        ("clock", 4, "model.rope.seconds_per_stp", "model.rope.seconds_per_step"),
        ("prefix", 4, "model.attention.bondary", "model.attention.boundary"),
        ("eve", 4, "model.patch_embedding.widht", "model.patch_embedding.width"),
        ("visual_ffn", 4, "model.experts.scop", "model.experts.scope"),
        ("whitened", 8, "model.bridge.rewigt", "model.bridge.reweight"),
    ],
)
def test_a_wrong_option_is_a_fault_of_its_line(
    page: dict[str, str], name: str, line: int, key: str, nearest: str
) -> None:
    right = nearest.rpartition(".")[2]
    Path("wrong.yaml").write_text(FILES[f"{name}.yaml"].replace(f"{right}: ", f"{key.rpartition('.')[2]}: "))
    done = neo("recipes", "validate", "wrong.yaml", "--import", name)
    assert done.status == 1
    assert f"wrong.yaml:{line}: {key}: is no option of " in done.err and f"nearest: {nearest} (" in done.err


def test_impossible_values_are_faults_too(page: dict[str, str]) -> None:
    done = neo("recipes", "validate", "clock.yaml", "model.rope.seconds_per_step=-1", "--import", "clock")
    assert (
        "override 'model.rope.seconds_per_step=-1': model.rope.seconds_per_step: must be positive, got -1" in done.err
    )
    done = neo("recipes", "validate", "visual_ffn.yaml", "model.experts.scope=words", "--import", "visual_ffn")
    assert "model.experts.scope: got 'words' (str), wanted one of visual, boundary" in done.err


def test_experts_that_are_not_there_cannot_train(page: dict[str, str]) -> None:
    done = neo("recipes", "validate", "visual_ffn.yaml", "model.experts=none", "--import", "visual_ffn")
    assert "stage.train.3: this model has no 'visual_experts': choose an expert routing by model.experts" in done.err


def test_a_run_is_not_resumed_with_another_option(page: dict[str, str]) -> None:
    done = neo("train", "clock.yaml", "model.rope.seconds_per_step=1", "stage.steps=6", "--resume", "last")
    assert done.status == 1 and "pre_buffer.rope is" in done.err and "of another model" in done.err
    assert neo("train", "clock.yaml", "stage.steps=6", "--resume", "last").status == 0


# --- exports and prices


@pytest.mark.parametrize("name", MODELS)
def test_exports(page: dict[str, str], name: str) -> None:
    """The asset always; programs where the page says so; never the folder for transformers, which names the part."""
    asset = PreBuffer.from_pretrained(good("export", f"outputs/{name}", "-o", f"assets/{name}").strip())
    assert [f.shape[:2] for f in image_features(asset, [image_of(NEO.from_pretrained(f"outputs/{name}/neo"))])] == [
        (2, 3)
    ]
    refused = neo("export", f"outputs/{name}", "--to", "hf", "-o", f"hf/{name}")
    kind = PARTS[name][0].kind
    assert refused.status == 1 and f"{kind} '{name}' comes from {name}, which is no part of the library" in refused.err
    assert not Path(f"hf/{name}").exists()
    done = neo("export", f"outputs/{name}", "--to", "program", "-o", f"programs/{name}")
    reason = {"clock": "rope {'kind': 'clock'", "eve": "not for EVEPatchEmbedding", "visual_ffn": "with experts"}
    if name in reason:
        assert done.status == 1 and reason[name] in done.err and not Path(f"programs/{name}").exists()
    else:
        assert done.status == 0, done.err
        assert (Path("programs") / name / "inputs.pt2").is_file()
        image = image_of(NEO.from_pretrained(f"outputs/{name}/neo"))
        program = torch.export.load(f"programs/{name}/images.pt2").module()
        assert torch.allclose(program(image), image_features(asset, [image])[0], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_runs_are_priced(page: dict[str, str], name: str) -> None:
    """Parameters are those of the trained model, and every part has FLOPs and memory."""
    report = json.loads(good("inspect", f"{name}.yaml", "--json", "--image-tokens", "6"))
    model = NEO.from_pretrained(f"outputs/{name}/neo")
    assert report["total"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert all(report["flops"][part]["forward"] > 0 for part in ("patch_embedding", "pre_buffer", "post_llm", "head"))
    assert report["memory"]["activations"] > 0
    if name == "eve":  # 2 x 3 visual tokens, a class token, two row ends
        assert "6 visual (given), 3 added to them, 128 text" in report["assumptions"]["document"]
    if name == "visual_ffn":
        assert report["groups"]["visual_experts"]["trained"] == report["groups"]["visual_experts"]["parameters"] > 0


# --- what the parts compute


class Encoder(ImageEmbedding):
    """A vision encoder with a projector: blocks that attend inside each image."""

    def __init__(self, hidden_size: int, width: int = 8, patch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.patch_size = patch_size
        self.patch_proj = nn.Linear(3 * patch_size**2, width)
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.projector = nn.Linear(width, hidden_size)

    def forward(self, patches: Tensor, patch_positions: Tensor, image_grids: Tensor) -> Tensor:
        x = self.patch_proj(patches.to(self.patch_proj.weight.dtype))
        x = torch.cat([self.block(image) for image in x.split(image_grids.prod(-1).tolist())])
        return self.projector(x)

    def block(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return x + self.out((q @ k.T * q.shape[-1] ** -0.5).softmax(-1) @ v)

    def products(self, image_grids: Tensor) -> list[Product]:
        patches, width = int(image_grids.prod(-1).sum()), self.hparams.width
        scores = [Product(2 * rows * columns, width, rows * columns, True) for rows, columns in image_grids.tolist()]
        first, *rest = (Product.of(patches, layer) for layer in self.modules() if isinstance(layer, nn.Linear))
        return [first, *rest, *scores]


@pytest.fixture
def encoder() -> Iterator[None]:
    PATCH_EMBEDDINGS.register("encoder")(Encoder)
    yield
    PATCH_EMBEDDINGS.remove("encoder")


def own_model(name: str, **blocks: Any) -> NEO:
    """A random model with one part; it cannot say image tokens: their ids lie beyond its vocabulary."""
    chosen = {
        "clock": {"rope": {"kind": "clock", "seconds_per_step": 0.25}},
        "prefix": {"attention": "prefix"},
        "prefix inside": {"attention": {"kind": "prefix", "boundary": False}},
        "visual_ffn": {"experts": {"kind": "visual_ffn", "scope": "boundary"}},
    }.get(name, {})  # fmt: skip
    patches = {"eve": {"width": 16, "patch_size": 4}, "linear": {"patch_size": 8}, "encoder": {}}
    made = (
        PATCH_EMBEDDINGS[name](SIZES["hidden_size"], **patches[name])
        if name in patches
        else PatchEmbedding(SIZES["hidden_size"], width=16, patch_size=4)
    )
    sizes: dict[str, Any] = SIZES | chosen | blocks
    model = NEO(made, PreBuffer(depth=2, **sizes), PostLLM(vocab_size=VOCAB, depth=2, **sizes))
    randomize(model)
    return model


def image_of(model: NEO, seed: int = 0) -> Tensor:
    return random_image(model.input_spec, (2, 3), torch.Generator().manual_seed(seed))


def sample_of(model: NEO, seed: int, images: int = 2) -> Sample:
    """Words, then a video of two frames between its boundary tokens, then words; the last ones are targets."""
    spec = model.input_spec
    pixels = [image_of(model, seed + n) for n in range(images)]
    count = sum(spec.image_tokens(*image.shape[1:]) for image in pixels)
    ids = [3, 5 + seed, spec.image_start_id, *[spec.image_token_id] * count, spec.image_end_id, 7, 11 + seed, 2]
    labels = torch.full((len(ids),), -100)
    labels[-2:] = torch.tensor(ids[-2:])
    return Sample(torch.tensor(ids), labels, pixels, frames=[Frame(0, 0.75 * n) for n in range(images)])


KINDS = ("clock", "prefix", "prefix inside", "eve", "linear", "encoder", "visual_ffn")


@pytest.mark.parametrize("name", KINDS)
def test_cached_generation_equals_full_recomputation(page: dict[str, str], encoder: None, name: str) -> None:
    model = own_model(name)
    prompts = [sample_of(model, seed, images) for seed, images in enumerate((2, 1, 2))]
    found = model.generate(prompts, max_new_tokens=6)
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = prompt.token_ids
        with torch.no_grad():
            for _ in range(6):
                batch = pack([Sample(ids, None, prompt.images, frames=prompt.frames)], model.input_spec)
                ids = torch.cat([ids, model(batch).logits[0, -1].argmax()[None]])
        assert ids[len(prompt.token_ids) :].tolist() == tokens.tolist()


@pytest.mark.parametrize("text", ["shared", "bypass"])
@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_learns_and_backends_agree(page: dict[str, str], encoder: None, name: str, text: str) -> None:
    model = own_model(name)
    model = NEO(model.patch_embedding, model.pre_buffer, model.post_llm, text=text)
    batch = pack([sample_of(model, 0), sample_of(model, 1)], model.input_spec)
    # Behind the last attention no word reads a visual token, and no word is led into a pre-Buffer that it goes around.
    idle = re.compile(
        r"post_llm.layers.1.mlp.visual|pre_buffer.*mlp.(gate|up|down).*bypass" if name == "visual_ffn" else "$^"
    )
    losses = []
    for backend in ("eager", "sdpa"):
        set_backend(model, backend)
        model.zero_grad()
        model.loss(batch).backward()
        losses.append(float(model.loss(batch)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert bool(parameter.grad.any()) != bool(idle.match(parameter_name + text)), parameter_name


@pytest.mark.parametrize("name", KINDS)
def test_estimates_are_those_of_the_code(page: dict[str, str], encoder: None, name: str) -> None:
    """Memory within 15 % of what autograd keeps; forward FLOPs, but for the pairs of attention, exactly torch's."""
    model = own_model(name)
    batch = pack([sample_of(model, seed) for seed in range(6)], model.input_spec)
    assert told(model, batch) == pytest.approx(saved(model, batch), rel=0.15)
    set_backend(model, "eager")
    one = pack([sample_of(model, 0)], model.input_spec)
    real = counted(model, one)
    hidden = sum(
        (one.token_ids.numel() ** 2 - int(dense_mask_of(model, one, rule).sum())) for rule in model.layer_rules
    )
    per_pair = 2 * SIZES["num_heads"] * 3 * SIZES["head_width"]
    mine = sum(part.model for part in step_flops(model, one).values()) + 3 * hidden * per_pair
    assert mine == real


def dense_mask_of(model: NEO, batch: Any, rule: Any) -> Tensor:
    return dense_mask(batch.document_ids, batch.image_ids, *rule, token_kinds=batch.token_kinds)


def test_clock(page: dict[str, str]) -> None:
    """Words 0 and 1; frames at 0, 0.5 and 2 seconds, half a second a step; a still image; a word."""
    variant = ROPES.make({"kind": "clock", "seconds_per_step": 0.5}, base_h=1e4, base_w=1e4)
    ids = torch.tensor([-1, -1, 0, 0, 1, 1, 2, 2, 3, -1])
    frames = [Frame(0, 0.0), Frame(0, 0.5), Frame(0, 2.0), None]
    document = DocumentTokens(ids, kinds_of(ids), [ImageGrid(1, 2, frame) for frame in frames[:3]] + [ImageGrid(1, 1)])
    assert variant.positions(document)[:, 0].tolist() == [0, 1, 2, 2, 3, 3, 6, 6, 7, 8]
    slower = ROPES.make({"kind": "clock", "seconds_per_step": 4.0}, base_h=1e4, base_w=1e4)
    assert slower.positions(document)[:, 0].tolist() == [0, 1, 2, 2, 2.125, 2.125, 2.5, 2.5, 3.5, 4.5]
    assert slower.positions(document)[:, 2].tolist() == [0, 0, 0, 1, 0, 1, 0, 1, 0, 0]


def test_prefix(page: dict[str, str]) -> None:
    """A word, <img>, two visual tokens, </img>, a word."""
    images, b, v = torch.tensor([[-1, -1, 0, 0, -1, -1]]), TokenKind.BOUNDARY, TokenKind.VISUAL
    kinds = torch.tensor([[0, b, v, v, b, 0]])
    from neo_components.components.masks import RuleName

    found = {
        ends: dense_mask(torch.zeros_like(images), images, RuleName("prefix", (("boundary", ends),)), token_kinds=kinds)
        for ends in (True, False)
    }
    assert found[True][0].long().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1] * 6,
    ]  # fmt: skip
    mixed = dense_mask(torch.zeros_like(images), images, "mixed", token_kinds=kinds)
    assert torch.equal(found[False], mixed)


def test_eve(page: dict[str, str]) -> None:
    """Against two convolutions: class token, rows, row ends; H and W of added tokens are 0."""
    model = own_model("eve")
    layer: Any = model.patch_embedding
    image = image_of(model)
    first = layer.patch_proj.weight.view(16, 3, 4, 4)
    second = layer.token_proj.weight.view(32, 2, 2, 16).permute(0, 3, 1, 2)
    features = F.gelu(F.conv2d(image[None], first, layer.patch_proj.bias, stride=4))
    grid = F.conv2d(features, second, layer.token_proj.bias, stride=2)[0].permute(1, 2, 0)
    expected = torch.cat([layer.class_token[None], *[torch.cat([row, layer.row_end[None]]) for row in grid]])
    batch = pack([sample_of(model, 0, images=1)], model.input_spec)
    found = layer(batch.patches, batch.patch_positions, batch.image_grids)
    assert torch.allclose(found, expected, atol=1e-5) and len(found) == 1 + 2 * 4
    assert batch.positions[0, 2:14].tolist() == [
        [2, 0, 0], [3, 0, 0], [3, 0, 0], [3, 0, 1], [3, 0, 2], [3, 0, 0],
        [3, 1, 0], [3, 1, 1], [3, 1, 2], [3, 0, 0], [4, 0, 0], [5, 0, 0],
    ]  # fmt: skip
    assert image_features(model.pre_buffer, [image])[0].shape == (2, 3, 32)


def test_images_of_an_encoder_do_not_see_each_other(page: dict[str, str], encoder: None) -> None:
    model = own_model("encoder")
    batch = pack([sample_of(model, 0)], model.input_spec)
    whole = model.patch_embedding(batch.patches, batch.patch_positions, batch.image_grids)
    alone = model.patch_embedding(batch.patches[6:], batch.patch_positions[6:], batch.image_grids[1:])
    assert torch.allclose(whole[6:], alone, atol=1e-6) and len(alone) == 6


def test_layers_that_cannot_be_counted_are_refused(page: dict[str, str]) -> None:
    class Odd(PATCH_EMBEDDINGS["linear"]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(8, 4)
            self.conv = nn.Conv2d(3, 8, 4)

    with pytest.raises(ValueError, match=r"the FLOPs of a Conv2d are not known: Odd must define products"):
        Odd().products(torch.tensor([[1, 1]]))

    class OddBridge(BRIDGES["random"]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(32, 32)
            self.matrix = nn.Parameter(torch.eye(32))

    model = own_model("prefix")
    model.bridge_out = OddBridge()
    with pytest.raises(ValueError, match=r"the FLOPs of a OddBridge are not known: build it of nn.Linear; matrix "):
        step_flops(model, pack([sample_of(model, 0)], model.input_spec))


def test_experts_keep_an_attention_that_other_code_knows() -> None:
    @EXPERTS.register("swapped")
    def swapped(block: Any) -> list[Any]:
        block.self_attn = nn.Sequential(block.self_attn)
        return []

    try:
        with pytest.raises(ValueError, match=r"experts 'swapped' puts a Sequential in place of block.self_attn"):
            PreBuffer(depth=1, **SIZES, experts="swapped")
    finally:
        EXPERTS.remove("swapped")


def test_visual_experts_start_as_copies_and_train_alone(page: dict[str, str]) -> None:
    """A language model with them computes what it did; a step moves the new weights and no other."""
    llm = PostLLM.from_pretrained("llm", experts="visual_ffn")
    ids = torch.randint(0, 90, (2, 9))
    for block in llm.blocks:
        new, old = block.mlp.visual, block.mlp
        assert all(torch.equal(p, old.get_parameter(n)) for n, p in new.named_parameters())
    with torch.no_grad():
        assert torch.equal(llm.text_logits(ids), PostLLM.from_pretrained("llm").text_logits(ids))
    trained = weights_of(Path("outputs/visual_ffn/neo"))
    moved = [n for n, p in llm.named_parameters() if ".visual." in n and not torch.equal(p, trained[f"post_llm.{n}"])]
    assert len(moved) == 3 * len(llm.blocks)
    kept = [n for n, p in llm.named_parameters() if ".mlp." in n and ".visual." not in n]
    assert all(torch.equal(llm.get_parameter(n), trained[f"post_llm.{n}"]) for n in kept)


def test_whose_tokens_pass_the_second_feed_forward(page: dict[str, str]) -> None:
    """If it gives zero, those tokens alone keep their value; the scope decides about boundary tokens."""
    for scope, boundary in (("visual", False), ("boundary", True)):
        model = own_model("visual_ffn", experts={"kind": "visual_ffn", "scope": scope})
        batch = pack([sample_of(model, 0, images=1)], model.input_spec)
        layer = model.post_llm.blocks[0].mlp
        layer.visual.down_proj.weight.data.zero_()
        seen: list[Tensor] = []
        layer.register_forward_hook(lambda part, given, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model(batch)
        zero = (seen[0] == 0).all(-1)[0]
        assert zero.tolist() == [False] * 2 + [boundary] + [True] * 6 + [boundary] + [False] * 3
    train_only(model, ["visual_experts"])
    assert all((".visual." in name) == p.requires_grad for name, p in model.named_parameters())


def test_whitened(page: dict[str, str]) -> None:
    """All of the weighting is least squares; none of it gives the target's covariance, up to what the ridge adds."""
    mixing = torch.randn(6, 8)
    source = torch.randn(400, 6) @ torch.randn(6, 6) + 3
    target = source @ mixing[:, :5] + 0.5 * torch.randn(400, 5) - 1
    full = BRIDGES.make({"kind": "whitened", "reweight": 1.0, "ridge": 1e-9}, in_width=6, out_width=5)
    least = LeastSquares(6, 5, ridge=0.0)
    full.fit(source, target)
    least.fit(source, target)
    assert torch.allclose(full.proj.weight, least.proj.weight, atol=1e-3)
    none = BRIDGES.make({"kind": "whitened", "reweight": 0.0, "ridge": 1e-9}, in_width=6, out_width=5)
    none.fit(source, target)
    assert torch.allclose(torch.cov(none(source).T), torch.cov(target.T), rtol=1e-2, atol=1e-2)
    assert torch.allclose(none(source).mean(0), target.mean(0), atol=1e-3)
    model = NEO.from_pretrained("outputs/whitened/neo")
    assert type(model.bridge_in) is BRIDGES["whitened"]
    assert (model.bridge_out.hparams.in_width, model.bridge_out.hparams.out_width) == (32, 48)


def test_a_part_derived_from_ours_is_not_taken_for_it(page: dict[str, str], tmp_path: Path) -> None:
    model = own_model("clock")
    with pytest.raises(ValueError, match=r"counts positions by its own Python code, which torch\.export cannot write"):
        write_programs(model, tmp_path / "programs")

    class Louder(PatchEmbedding):
        def forward(self, *args: Any) -> Tensor:
            return 2 * super().forward(*args)

    base = own_model("none")
    louder = NEO(Louder(32, width=16, patch_size=4), base.pre_buffer, base.post_llm)
    with pytest.raises(ValueError, match=r"patch embedding Louder \(only NEO's own\)"):
        louder.save_pretrained(tmp_path / "released", layout="released")
    with pytest.raises(ValueError, match="NEO's own patch embedding only, not for Louder"):
        write_programs(louder, tmp_path / "programs")


def test_a_rule_that_hides_something_from_words_holds_in_generation_too(page: dict[str, str]) -> None:
    def blind(query: Any, key: Any) -> Tensor:
        """A word does not attend to visual tokens, but to all others."""
        words = (query.kind == TokenKind.TEXT) & (key.kind == TokenKind.VISUAL)
        return (query.document == key.document) & (query.position >= key.position) & ~words

    MASKS.register("blind")(blind)
    try:
        model = own_model("none", attention="blind")
        one, other = sample_of(model, 0), sample_of(model, 0)
        text = one.token_ids
        with torch.no_grad():
            ids = text
            for _ in range(6):
                batch = pack([Sample(ids, None, one.images)], model.input_spec)
                ids = torch.cat([ids, model(batch).logits[0, -1].argmax()[None]])
        assert model.generate([other], max_new_tokens=6)[0].tolist() == ids[len(text) :].tolist()
    finally:
        MASKS.remove("blind")


# --- language models


def test_a_family(page: dict[str, str], tmp_path: Path) -> None:
    """transformers' own Llama gives the same logits; what was trained and written loads without the family."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 90, (2, 20))
    reference = plain("llama", tmp_path / "llama", attention_bias=True, rms_norm_eps=1e-5)
    state = {name: t for name, t in weights_of(tmp_path / "llama").items()}
    mine = {name.replace("attention.", "self_attn."): t for name, t in weights_of(Path("my_llm")).items()}
    assert set(state) == set(mine)
    reference.load_state_dict(mine, strict=False)
    with torch.no_grad():
        ours = PostLLM.from_pretrained("my_llm").text_logits(ids)
        assert torch.allclose(ours, reference(ids).logits, atol=1e-4)
        written = AutoModelForCausalLM.from_pretrained("outputs/my_llm_text")
        trained = NEO.from_pretrained("outputs/my_llm/neo").post_llm
        for block in trained.blocks:  # an ordinary language model has no H and W
            block.self_attn.k_proj_hw.weight.zero_()
        assert torch.allclose(written(ids).logits, trained.text_logits(ids), atol=1e-4)
    assert fresh("-c", "from neo_components import NEO; NEO.from_pretrained('outputs/my_llm/neo')").returncode == 0
    assert "model_type 'my_llm' is unknown" in fresh(
        "-c", "from neo_components import PostLLM; PostLLM.from_pretrained('my_llm')"
    ).stderr  # fmt: skip
    good("export", "outputs/my_llm", "--to", "program", "-o", "programs/my_llm")
    _check_parts(NEO.from_pretrained("outputs/my_llm/neo"))  # nothing in it is foreign to --to hf
    edit_config(Path("my_llm"), lambda c: c.update(hidden_act="relu"))
    try:
        with pytest.raises(ValueError, match="this my_llm config is not supported: hidden_act='relu'"):
            PostLLM.from_pretrained("my_llm")
    finally:
        edit_config(Path("my_llm"), lambda c: c.update(hidden_act="silu"))

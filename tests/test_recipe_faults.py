"""All that is wrong with a recipe is reported at once, by file, line, key and nearest name, and no weight is loaded."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
from recipe_texts import ASSET, MODEL, PRETRAINED, RUN, faults, written

from neo_components import load_recipe
from neo_components.errors import ArgumentError, ArgumentErrors
from neo_components.recipe import (
    RecipeError,
    validate_recipe,
)
from neo_components.recipe.schema import CHOICES

ROPE_NAMES = CHOICES["rope"].names()

SINGLE = [
    # unknown keys
    ("modle.rope.kind=native", "modle", "unknown key; nearest: model (valid here: seed, output, model, stage,"),
    ("model.pre_bufer=1", "model.pre_bufer", "unknown key; nearest: model.pre_buffer (valid here: patch_embedding,"),
    ("model.patch_embedding.widht=1", "model.patch_embedding.widht", "is no option of patch_embedding 'neo'; "),
    ("model.patch_embedding.widht=1", "model.patch_embedding.widht", "nearest: model.patch_embedding.width (valid "),
    ("model.rope.base_x=1", "model.rope.base_x", "is no option of rope 'native'; nearest: model.rope.base_"),
    ("model.post_llm.base_t=1e6", "model.post_llm.base_t", "unknown key; nearest: model.rope.base_t"),
    ("stage.warmup=1", "stage.warmup", "unknown key; nearest: stage.warmup_steps"),
    ("data.train.0.shard=a", "data.train.0.shard", "nearest: data.train.0.shards (valid here: shards, weight)"),
    ("trainer.acelerator=cpu", "trainer.acelerator", "unknown key; nearest: trainer.accelerator"),
    # what the components refuse
    (
        "model.post_llm.rope_scaling={rope_type: spiral}",
        "model.post_llm.rope_scaling",
        "of rope_type 'spiral' is not supported (supported: linear, dynamic, llama3, yarn, longrope)",
    ),
    ("model.post_llm.norm_placement=beside", "model.post_llm.norm_placement", "must be one of before, after, both"),
    ("model.post_llm.window=0", "model.post_llm.window", "got 0, must be positive"),
    ("model.post_llm.rotary_width=7", "model.post_llm.rotary_width", "must be even and lie in 0 to head_width"),
    ("model.pre_buffer.qk_norm=most", "model.pre_buffer.qk_norm", "must be one of head, whole, none, got 'most'"),
    # wrong types
    ("stage.lr=fast", "stage.lr", "got 'fast' (str), wanted float (a finite number)"),
    ("stage.lr=.nan", "stage.lr", "got nan (float), wanted float (a finite number)"),
    ("stage.lr=true", "stage.lr", "got True (bool), wanted float (a finite number)"),
    ("stage.steps=true", "stage.steps", "got True (bool), wanted int (a whole number)"),
    ("stage.steps='20'", "stage.steps", "got '20' (str), wanted int (a whole number)"),
    ("seed=", "seed", "got nothing (null), wanted int (a whole number)"),
    ("model.post_llm.tie_embeddings=1", "model.post_llm.tie_embeddings", "got 1 (int), wanted bool (true or false)"),
    ("model.patch_embedding=16", "model.patch_embedding", "got 16 (int), wanted a name or a mapping (kind: "),
    ("stage.train=all", "stage.train", "got 'all' (str), wanted a list of one of patch_embedding, pre_buffer,"),
    ("stage.train=all", "stage.train", "; write [all]"),
    ("stage.betas=[0.9]", "stage.betas", "got [0.9] (list), wanted a list of 2: float (a finite number), float"),
    ("data.tokenizer=3", "data.tokenizer", "got 3 (int), wanted str (text)"),
    ("trainer.devices=1.5", "trainer.devices", "got 1.5 (float), wanted a list of int (a whole number) or str"),
    ("trainer.deterministic=maybe", "trainer.deterministic", "got 'maybe' (str), wanted bool (true or false) or"),
    # names
    ("model.rope=nativ", "model.rope", "unknown rope 'nativ'; nearest: native (registered: 1d, native"),
    ("model.rope.kind=nativ", "model.rope.kind", "unknown rope 'nativ'; nearest: native (registered: 1d, native"),
    ("model.attention=mixd", "model.attention", "unknown attention 'mixd'; nearest: mixed (registered: causal, mixed"),
    ("model.backend=sdp", "model.backend", "unknown attention backend 'sdp'; nearest: sdpa (registered: auto, eager,"),
    ("model.bridge=identiy", "model.bridge", "unknown bridge 'identiy'; nearest: identity"),
    ("model.patch_embedding.position=sincs", "model.patch_embedding.position", "must be one of rotary, sincos, none"),
    ("model.patch_embedding=linaer", "model.patch_embedding", "unknown patch_embedding 'linaer'; nearest: "),
    ("stage.train=[post_llm.hv]", "stage.train.0", "got 'post_llm.hv' (str), wanted one of patch_embedding,"),
    ("stage.train=[post_llm.hv]", "stage.train.0", "; nearest: post_llm.hw"),
    ("data.loss_reduction=squar", "data.loss_reduction", "wanted one of token, sample, square; nearest: square"),
    ("trainer.precision=bf16-mixd", "trainer.precision", "got 'bf16-mixd' (str), wanted one of 64, 32, 16 or one of"),
    ("trainer.precision=bf16-mixd", "trainer.precision", "; nearest: bf16-mixed"),
    # out of range
    ("stage.steps=0", "stage.steps", "got 0, must be 1 or more"),
    ("stage.min_lr_ratio=1.5", "stage.min_lr_ratio", "got 1.5, must be from 0 to 1"),
    ("stage.warmup_steps=21", "stage.warmup_steps", "got 21, must not be more than stage.steps (20)"),
    ("stage.train=[]", "stage.train", "is empty: name at least one group to train, or 'all'"),
    ("stage.betas=[0.9,1]", "stage.betas", "got [0.9, 1.0], both must be 0 or more and less than 1"),
    ("model.post_llm.vocab_size=0", "model.post_llm.vocab_size", "got 0, must be positive"),
    ("model.pre_buffer.depth=-1", "model.pre_buffer.depth", "got -1, must be 0 or more"),
    ("model.rope.base_h=0", "model.rope.base_h", "got 0.0, must be positive"),
    ("data.micro_batch_size=0", "data.micro_batch_size", "must be at least 1, got 0"),
    # what does not go together
    ("model.patch_embedding.width=30", "model.patch_embedding.width", "must be a multiple of 4, half for columns"),
    ("model.post_llm.num_kv_heads=3", "model.post_llm.num_kv_heads", "must divide num_heads, got 3 and 4"),
    ("model.pre_buffer.num_heads=3", "model.pre_buffer.num_heads", "num_kv_heads must divide num_heads, got 2 and 3"),
    ("model.pre_buffer.head_width=6", "model.pre_buffer.head_width", "must be a multiple of 4 to split into T, H and"),
    ("model.pre_buffer.reset=true", "model.pre_buffer.reset", "needs model.pre_buffer.from_pretrained beside it"),
    ("model.bridge=random", "model.bridge", "only an asset (model.pre_buffer.from_pretrained) is attached by a bridge"),
    ("stage.train=[all,bridge]", "stage.train.1", "this model has no 'bridge': only an asset"),
    ("data.min_pixels=5000000", "data.min_pixels", "must be from 1 to max_pixels, got 5000000"),
    ("data.max_pixels=100", "data.max_pixels", "min_pixels must be from 1 to max_pixels, got 65536"),
    ("trainer.max_steps=3", "trainer.max_steps", "cannot be set here: stage.steps decides"),
    ("data.seed=3", "data.seed", "cannot be set here: the seed of the whole recipe is used"),
    # values that are none
    ("output=???", "output", "is ???: the recipe leaves this value to you"),
    ("output=${stage.nam}", "output", "cannot be resolved: Interpolation key 'stage.nam' not found"),
    ("output=${output}", "output", "cannot be resolved: Recursive interpolation detected"),
    ("output=${oc.env:NOT_THERE}", "output", "Environment variable 'NOT_THERE' not found"),
    # overrides that are none
    ("steps", "", "must be written dotted.key=value"),
    ("=3", "", "must be written dotted.key=value"),
    ("stage.steps=[1", "stage.steps", "cannot be set: "),
    ("data.train.7.weight=1", "data.train.7.weight", "cannot be set: list index out of range"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "key", "text"), SINGLE)
def test_one_fault(tmp_path: Path, override: str, key: str, text: str) -> None:
    """Each of these is one fault, reported once, at the location of the override."""
    path = written(tmp_path, MODEL + RUN)
    assert faults(path) == []
    [fault] = validate_recipe(path, [override])
    assert (fault.location, fault.key) == (f"override {override!r}", key)
    assert text in fault.text
    with pytest.raises(RecipeError, match=re.escape(text)):
        load_recipe(path, [override])


def test_a_fault_of_a_list_item_is_reported_at_its_key(tmp_path: Path) -> None:
    path = written(tmp_path, MODEL + RUN)
    assert faults(path, "data.train.1.weight=0") == [("data.train.1.weight", "must be over 0, got 0.0")]
    both = faults(path, "data.train.1.weight=0", "data.workers=-1")
    assert [key for key, _ in both] == ["data.workers", "data.train.1.weight"]


def test_sizes_beside_a_pretrained_language_model(tmp_path: Path) -> None:
    text = "cannot stand beside model.post_llm.from_pretrained, which brings its own; take one of them away"
    path = written(tmp_path, PRETRAINED)
    assert faults(path, "model.post_llm.hidden_size=64", "model.post_llm.depth=2") == [
        ("model.post_llm.hidden_size", text),
        ("model.post_llm.depth", text),
    ]


def test_parts_beside_a_checkpoint(tmp_path: Path) -> None:
    path = written(tmp_path, "model: {from_pretrained: a/b, backend: sdpa, rope: native, pre_buffer: {depth: 2}}")
    text = "cannot stand beside model.from_pretrained, which brings its own; take one of them away"
    assert faults(path) == [("model.rope", text), ("model.pre_buffer", text)]


def test_a_patch_embedding_beside_an_asset(tmp_path: Path) -> None:
    path = written(tmp_path, ASSET + "stage: {train: [bridge]}")
    assert faults(path) == []
    [(key, text)] = faults(path, "model.patch_embedding.width=32")
    assert key == "model.patch_embedding"
    assert text.startswith("cannot stand beside model.pre_buffer.from_pretrained: the asset has its own")


@pytest.mark.parametrize(
    ("text", "key", "lacks"),
    [
        ("seed: 1", "", "lacks model"),
        ("model: {}", "model", "lacks model.pre_buffer, model.post_llm, or model.from_pretrained instead"),
        (
            "model: {pre_buffer: {}, post_llm: {from_pretrained: a/b}}",
            "model.pre_buffer",
            "lacks model.pre_buffer.depth, or model.pre_buffer.from_pretrained instead",
        ),
        (
            "model: {pre_buffer: {depth: 1}, post_llm: {vocab_size: 9, depth: 1, hidden_size: 8, head_width: 8}}",
            "model.post_llm",
            "lacks model.post_llm.num_heads, model.post_llm.num_kv_heads, model.post_llm.feed_forward_size, "
            "or model.post_llm.from_pretrained instead",
        ),
        (PRETRAINED + "data: {tokenizer: a/b}", "data", "lacks data.train"),
        (PRETRAINED + "stage: {steps: 3}", "stage", "lacks stage.train"),
    ],
)
def test_what_is_missing(tmp_path: Path, text: str, key: str, lacks: str) -> None:
    assert faults(written(tmp_path, text)) == [(key, lacks)]


def test_a_misspelt_key_is_not_missing_as_well(tmp_path: Path) -> None:
    path = written(tmp_path, "model: {pre_bufer: {depth: 1}, post_llm: {from_pretraind: a/b}}")
    assert [key for key, _ in faults(path)] == ["model.pre_bufer", "model.post_llm.from_pretraind"]
    assert faults(path)[1][1].startswith("unknown key; nearest: model.post_llm.from_pretrained")


def test_all_faults_together_each_at_its_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole message: two files, an override, and a fault of each kind."""
    monkeypatch.chdir(tmp_path)
    written(
        tmp_path,
        """
model:
  patch_embedding: {width: 30}
  pre_buffer: {depth: 1}
  post_llm:
    from_pretrained: a/b
    hidden_size: 64
stage:
  train: [patch_embedding, post_llm.hv]
  lr: fast
""",
        "base/low.yaml",
    )
    path = written(tmp_path, "extends: base/low.yaml\nmodel:\n  rope:\n    kind: nativ\nseeds: 1\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(path.relative_to(tmp_path), ["stage.steps=true"])
    assert str(error.value) == (
        "7 faults in the recipe:\n"
        "  base/low.yaml:7: model.post_llm.hidden_size: cannot stand beside model.post_llm.from_pretrained, which "
        "brings its own; take one of them away\n"
        "  my.yaml:4: model.rope.kind: unknown rope 'nativ'; nearest: native "
        f"(registered: {', '.join(ROPE_NAMES)})\n"
        "  base/low.yaml:9: stage.train.1: got 'post_llm.hv' (str), wanted one of patch_embedding, pre_buffer, "
        "post_llm, post_llm.hw, post_llm.blocks, post_llm.word_embedding, post_llm.head, visual_experts, bridge, all; "
        "nearest: post_llm.hw\n"
        "  base/low.yaml:10: stage.lr: got 'fast' (str), wanted float (a finite number)\n"
        "  override 'stage.steps=true': stage.steps: got True (bool), wanted int (a whole number)\n"
        "  my.yaml:5: seeds: unknown key; nearest: seed (valid here: seed, output, model, stage, data, trainer, "
        "variables)\n"
        "  base/low.yaml:3: model.patch_embedding.width: must be a multiple of 4, half for columns and half for rows, "
        "got 30"
    )


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("- a\n- b", "my.yaml", "must hold sections (key: value), got a ListConfig"),
        ("seed: 1\nmodel: [1", "my.yaml:3", "no valid YAML"),
        ("seed: 1\nseed: 2", "my.yaml:2", "no valid YAML: found duplicate key seed"),
        ("seed: !!python/object/apply:os.getcwd []", "my.yaml:1", "no valid YAML: could not determine a constructor"),
        ("\nextends: nope.yaml", "my.yaml:2", "'nope.yaml' is no file; looked for"),
        ("extends: [a.yaml]", "my.yaml:1", "got ['a.yaml'], wanted str (the path of one recipe"),
        ("extends: my.yaml", "my.yaml:1", "goes round in a circle: "),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, place: str, message: str) -> None:
    [fault] = validate_recipe(written(tmp_path, text + "\n"))
    assert fault.location.endswith(place)
    assert message in fault.text


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    [fault] = validate_recipe(path)
    assert fault.text.startswith("no valid YAML: 'utf-8'")


def test_errors_of_arguments_pass_between_processes() -> None:
    """As a data worker hands them over: the argument, those beside it and the message stay."""
    one = ArgumentError("num_kv_heads", "must divide num_heads, got 3 and 4", "num_heads")
    several = pickle.loads(pickle.dumps(ArgumentErrors([one, ArgumentError("depth", "must be 0 or more, got -1")])))
    assert [(e.argument, e.others) for e in several.errors] == [("num_kv_heads", ("num_heads",)), ("depth", ())]
    assert str(several) == "num_kv_heads must divide num_heads, got 3 and 4; depth must be 0 or more, got -1"

"""Weights go tensor by tensor into models on the meta device: the same model, in any type, never twice in memory."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import SIZES, llm_folder, random_batch, random_sample, same_tensors, tiny_model, weights_of
from commands import good
from llm_builders import text_llm
from safetensors.torch import save_file
from torch import nn

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer, attach, build, load_recipe
from neo_components.components.rotary import Rotary
from neo_components.model.chat import Chat
from neo_components.storage.deferred import new_weights, unfilled
from neo_components.storage.weights import TensorFiles, as_dtype, load_strict, materialize

ROOT = Path(__file__).parent.parent
READERS = {"NEO": NEO, "PreBuffer": PreBuffer, "PostLLM": PostLLM}


def folder_of(kind: str, folder: Path) -> Path:
    if kind == "PostLLM":
        return llm_folder(folder)
    model = tiny_model()
    return (model if kind == "NEO" else model.pre_buffer).save_pretrained(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", READERS)
def test_any_type_is_the_stored_weights_rounded(kind: str, dtype: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path / kind)
    module: Any = READERS[kind].from_pretrained(folder, dtype=dtype)
    stored, wanted = weights_of(folder), as_dtype(dtype)
    state = module.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {wanted}
    assert module.dtype == wanted and module.device == torch.device("cpu")
    found = {name: tensor for name, tensor in state.items() if name in stored or f"model.{name}" in stored}
    assert len(found) >= len(state) / 2
    for name, tensor in found.items():
        assert torch.equal(tensor, stored.get(name, stored.get(f"model.{name}")).to(wanted))
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("kind", READERS)
def test_tables_are_those_of_a_model_built_in_the_usual_way(kind: str, tmp_path: Path) -> None:
    """Nothing is left on the meta device, and what no file holds is computed: rotary tables, H/W parts."""
    module: Any = READERS[kind].from_pretrained(folder_of(kind, tmp_path / kind), dtype="bfloat16")
    tables = [part for part in module.modules() if isinstance(part, Rotary)]
    assert len(tables) == (2 if kind == "NEO" else 1)
    for part in tables:
        usual = Rotary("native", len(part.axis), 1e6, 1e4, 1e4)
        h = (module.post_llm if kind == "NEO" else module).hparams
        usual = Rotary(h.rope, h.head_width, h.base_t, h.base_h, h.base_w)
        assert torch.equal(part.axis, usual.axis) and torch.equal(part.frequency, usual.frequency)
        assert part.frequency.dtype == torch.float32
    assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])
    if kind == "PostLLM":
        attention = module.layers[0].self_attn
        assert not attention.k_proj_hw.weight.any()
        assert torch.equal(attention.q_norm_h.weight, torch.ones_like(attention.q_norm_h.weight))
        before = attention.q_proj_hw.weight.clone()
        attention.init_hw_from_t()
        assert torch.equal(before, attention.q_proj_hw.weight) and before.any()


def test_a_model_in_bfloat16_computes(tmp_path: Path) -> None:
    """Logits, loss with gradients and generation; the logits differ from float32 by bfloat16's rounding alone.

    The bound: two roundings of 2**-8 in each of four blocks, relative to the logits' own spread.
    """
    folder = tiny_model().save_pretrained(tmp_path)
    exact, rounded = NEO.from_pretrained(folder), NEO.from_pretrained(folder, dtype=torch.bfloat16)
    batch, _ = random_batch(exact.input_spec, seed=3, images=1)
    with torch.no_grad():
        one, other = exact(batch).logits, rounded(batch).logits
    assert other.dtype == torch.bfloat16
    difference = (one - other.float()).std() / one.std()
    assert 0 < difference < 8 * 2**-8
    rounded.loss(batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rounded.parameters())
    [new] = rounded.generate([random_sample(exact.input_spec, 1, images=1, learn=False)], 5)
    assert new.shape == (5,)


@pytest.mark.parametrize("kind", READERS)
def test_loading_draws_no_random_numbers(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path / kind)
    before = torch.get_rng_state()
    READERS[kind].from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


def recipe_file(folder: Path, model: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"model:\n{model}")
    return path


def test_new_parts_depend_on_the_seed_alone(tmp_path: Path) -> None:
    """A new pre-Buffer before a loaded language model is the one that the seed gives without it."""
    llm = llm_folder(tmp_path / "llm")
    model = f"  patch_embedding: {{width: 16}}\n  pre_buffer: {{depth: 1}}\n  post_llm: {{from_pretrained: {llm}}}\n"
    torch.manual_seed(5)
    built = build(load_recipe(recipe_file(tmp_path, model)).model)
    h = PostLLM.from_pretrained(llm).hparams
    names = ("hidden_size", "num_heads", "num_kv_heads", "head_width", "feed_forward_size", "norm_eps", "base_t")
    torch.manual_seed(5)
    patch_embedding = PatchEmbedding(h.hidden_size, width=16)
    alone = new_weights(lambda: PreBuffer(1, **{name: h[name] for name in names}))
    alone.adopt(patch_embedding)
    assert same_tensors(built.pre_buffer.state_dict(), alone.state_dict())
    torch.manual_seed(5)
    rounded = build(load_recipe(recipe_file(tmp_path, model), ["model.dtype=bfloat16"]).model)
    expected = {name: tensor.bfloat16() for name, tensor in built.state_dict().items()}
    assert same_tensors(rounded.state_dict(), expected)


def test_a_checkpoint_and_an_asset_in_bfloat16(tmp_path: Path) -> None:
    model = tiny_model()
    whole, asset = model.save_pretrained(tmp_path / "neo"), model.pre_buffer.save_pretrained(tmp_path / "asset")
    loaded = build(load_recipe(recipe_file(tmp_path, f"  from_pretrained: {whole}\n  dtype: bfloat16\n")).model)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    llm = llm_folder(tmp_path / "llm")
    joined = attach(asset, llm, bridge="random", dtype="bfloat16")
    assert {p.dtype for p in joined.parameters()} == {torch.bfloat16}
    text = (
        f"  pre_buffer: {{from_pretrained: {asset}, reset: true}}\n  post_llm: {{from_pretrained: {llm}}}\n"
        "  bridge: random\n  dtype: bfloat16\n"
    )
    assert {p.dtype for p in build(load_recipe(recipe_file(tmp_path, text)).model).parameters()} == {torch.bfloat16}


def test_types_are_refused_by_name(tmp_path: Path) -> None:
    for dtype in ("float8", torch.int8, torch.float64):
        with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got"):
            PostLLM.from_pretrained(llm_folder(tmp_path / str(dtype)), dtype=dtype)
    with pytest.raises(
        ValueError, match=r"parts must have one type, got \{'pre_buffer': torch.float32, 'post_llm': tor"
    ):
        NEO(PatchEmbedding(32), PreBuffer(1, **SIZES), PostLLM(60, 1, **SIZES).bfloat16())


class Shapes(nn.Module):
    """Weights of every rank, and one that is no floating-point number."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.zeros(()))
        self.vector = nn.Parameter(torch.zeros(37))
        self.matrix = nn.Parameter(torch.zeros(13, 7))
        self.kernel = nn.Parameter(torch.zeros(5, 2, 3, 3))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("block", [1, 40, 100, 10**6])
def test_large_tensors_are_read_in_blocks(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neo_components.storage.weights.BLOCK", block)
    stored = {name: torch.randn(tensor.shape) for name, tensor in Shapes().state_dict().items()}
    stored["count"] = torch.tensor([1, 2**40 + 1, 3])
    save_file(stored, tmp_path / "model.safetensors")
    with unfilled():
        module = Shapes()
    load_strict(module, TensorFiles(tmp_path), dtype=torch.float16)
    materialize(module, torch.float16)
    expected = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    assert same_tensors(module.state_dict(), expected)
    real = Shapes()
    load_strict(real, TensorFiles(tmp_path), dtype=torch.float16)
    assert same_tensors(real.state_dict(), stored), "weights that were real keep their type"


def test_nothing_is_read_when_something_does_not_fit(tmp_path: Path) -> None:
    stored = {name: torch.ones(tensor.shape) for name, tensor in Shapes().state_dict().items() if name != "count"}
    save_file(stored | {"kernel": torch.ones(5, 2, 9)}, tmp_path / "model.safetensors")
    module = Shapes()
    with pytest.raises(ValueError, match=r"missing: count\n  misshapen: kernel is \(5, 2, 9\), needs to fill kernel"):
        load_strict(module, TensorFiles(tmp_path))
    assert not any(tensor.any() for tensor in module.state_dict().values())


def test_a_real_model_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script for real weights, on a small model; a language model that is another one is told."""
    script = benchmark("real_llm")
    folder = text_llm(tmp_path / "llm", steps=30)
    script.ROW = 64
    assert script.compare(folder, "what color is it? red, or blue. " * 20)
    assert "greedy tokens equal, from the first on: 64 of 64" in capsys.readouterr().out
    right = PostLLM.text_logits
    try:
        PostLLM.text_logits = lambda self, ids: right(self, ids) * 1.01  # type: ignore[method-assign]
        assert not script.compare(folder, "what color is it? red, or blue. " * 20)
    finally:
        PostLLM.text_logits = right  # type: ignore[method-assign]


def test_python_of_the_page(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "quickstart").symlink_to(world)
    monkeypatch.chdir(tmp_path)
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "loading.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/loading.md", "exec"), names)
    assert (names["model"].dtype, names["llm"].dtype) == (torch.float32, torch.bfloat16)


def test_commands_take_a_type(world: Path) -> None:
    ask = ("chat", str(world / "neo"), "what is it?", "--max-new-tokens", "2", "--dtype")
    assert good(*ask, "bfloat16").endswith("\n")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'bf16'"):
        Chat.from_pretrained(world / "neo", dtype="bf16")


def test_a_run_in_bfloat16_with_a_template_of_its_own(world: Path, tmp_path: Path) -> None:
    """The recipe's two keys reach the model and the folder that the run leaves, which is asked in the same form."""
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}")
    keys = ["model.dtype=bfloat16", "trainer.precision=bf16-true", f"data.chat_template={template}"]
    good("train", world / "run.yaml", f"output={tmp_path}/run", *keys)
    folder = tmp_path / "run" / "neo"
    assert {tensor.dtype for tensor in weights_of(folder).values()} == {torch.bfloat16}
    chat = Chat.from_pretrained(folder, dtype="bfloat16")
    prompt = chat.tokenizer.decode(chat.prompt("why?").token_ids.tolist())
    assert prompt == f"user: why?{chat.tokenizer.eos_token}assistant:"
    assert isinstance(chat.ask("why?", max_new_tokens=3), str)


def benchmark(name: str) -> Any:
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(("reader", "dtype"), [("PostLLM", "float32"), ("NEO", "bfloat16")])
def test_a_model_is_never_twice_in_memory(reader: str, dtype: str, tmp_path: Path) -> None:
    """The benchmark in small. Mapping the files whole would take 0.3 GB beside the model, half of which is allowed."""
    script = benchmark("load_memory")
    if reader == "PostLLM":
        script.write_llm(tmp_path / "model", 0.3, torch.bfloat16, width=1024)
    else:
        script.write_neo(tmp_path / "model", 0.3, torch.float32, width=1024)
    found = script.measure(reader, tmp_path / "model", dtype)
    assert found["size"] > (0.5e9 if reader == "PostLLM" else 0.13e9)
    room = found["peak"] - found["before"] - found["size"]
    print(f"{room / 1e6:.0f} MB beside the model of {found['size'] / 1e6:.0f} MB", file=sys.stderr)
    assert room < 0.15e9

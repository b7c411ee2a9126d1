"""A decoding step reads nothing back from its device, has fixed shapes, compiles whole, and gives the same tokens."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCAB, MRope, random_sample, tiny_model
from host_reads import HostReads
from llm_references import CASES, reference
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from neo_components import NEO, Batch, PatchEmbedding, PostLLM, PreBuffer, pack
from neo_components.components.cache import CHUNK, attend_to_one, fixed_room
from neo_components.model.decoding import EVERY, Choice, Decoder, Watch
from neo_components.model.generation import _continue, generate, later_positions, start
from neo_components.registry import ROPES

NEW = 12


class MadeOfNumbers(TorchDispatchMode):
    """Counts tensors that are made of Python numbers: on a GPU these are copied there from memory that is not pinned,
    for which the host waits. ``operations``: how many there were of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.found = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self.operations += 1
        self.found += func is torch.ops.aten.lift_fresh.default and args[0].numel() > 0
        return func(*args, **(kwargs or {}))


def speaker(post: dict[str, Any] | None = None, **options: Any) -> NEO:
    """A model that cannot say image tokens: their ids lie beyond its vocabulary."""
    return tiny_model(post={"image_token_id": VOCAB} | (post or {}), **options).eval()


def prompts_of(model: NEO, count: int = 3) -> Batch:
    return pack([random_sample(model.input_spec, n, images=n % 3, learn=False) for n in range(count)], model.input_spec)


def started(
    model: NEO, fixed: bool, choose: Choice | None = None, stop: Sequence[int] = (1, 2), new: int = NEW
) -> Decoder:
    prompts = prompts_of(model)
    with torch.no_grad():
        return start(model, prompts, later_positions(model, prompts, new), choose or Choice(), stop, fixed)


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fold 3, every head its own keys": {"patch": {"fold": 3}, "num_kv_heads": 4},
    "tied, causal": {"post": {"tie_embeddings": True}, "attention": "causal"},
    "one-dimensional": {"rope": "1d"},
    "M-RoPE": {"rope": "m-rope-of-decoding", "head_width": 16},
    "windows": {"post": {"window": 4, "window_layers": [0], "window_base_t": 100.0}, "pre": {"window": 3}},
    "llama3": {"post": {"rope_scaling": LLAMA3}},
    "yarn": {"post": {"rope_scaling": YARN}},
    "Gemma 3": {"post": {"embedding_multiplier": 5.7}, "norm_placement": "both", "norm": "one_plus_weight",
                "activation": "gelu_tanh"},
    "Granite": {"post": {"embedding_multiplier": 3.0, "logits_divisor": 2.0, "residual_multiplier": 0.3,
                         "attention_scale": 0.2}},
    "OLMo 2": {"norm_placement": "after", "qk_norm": "whole"},
    "Qwen2": {"qk_norm": "none", "qkv_bias": True},
    "partial rotation, NoPE": {"post": {"rotary_width": 4, "nope_layers": [1]}},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def m_rope() -> Iterator[None]:
    ROPES.register("m-rope-of-decoding")(MRope)
    yield
    ROPES.remove("m-rope-of-decoding")


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def bypassing() -> NEO:
    model = speaker()
    return NEO(model.patch_embedding, model.pre_buffer, model.post_llm, text="bypass").eval()


def sparse() -> NEO:
    """Experts run in one kernel in bfloat16."""
    return speaker({"num_experts": 4, "experts_per_token": 2, "expert_size": 16}).bfloat16()


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
@pytest.mark.parametrize("name", [*MODELS, "bypass", "experts"])
def test_a_step_reads_nothing_back(name: str, fixed: bool) -> None:
    """Greedy and drawn, of every form of RoPE, mask and block."""
    model = {"bypass": bypassing, "experts": sparse}.get(name, lambda: speaker(**MODELS[name]))()
    for choose in (Choice(), Choice(True, 0.7, 0.9, torch.Generator().manual_seed(0))):
        decoder = started(model, fixed, choose)
        with torch.no_grad(), MadeOfNumbers() as made, HostReads() as reads:
            decoder.step()
        assert reads.found == [] and made.found == 0
        assert made.operations > 100


def test_numbers_are_counted() -> None:
    with MadeOfNumbers() as made:
        torch.tensor(1.0) + torch.ones(1)
    assert made.found == 1 and made.operations > 1


@pytest.mark.parametrize("family", CASES)
def test_a_step_of_every_family(family: str, tmp_path: Path) -> None:
    """Its plainest model; mixtures of experts in bfloat16 and a width of 16, whose experts one kernel computes."""
    [sizes, *_] = CASES[family].values()
    if "moe_intermediate_size" in sizes:
        sizes = sizes | {"moe_intermediate_size": 16}
    reference(family, tmp_path, **sizes)
    llm = PostLLM.from_pretrained(tmp_path)
    h = llm.hparams
    pre_buffer = PreBuffer(1, h.hidden_size, h.num_heads, h.num_kv_heads, h.head_width, h.feed_forward_size)
    model = NEO(PatchEmbedding(h.hidden_size, width=16, patch_size=4), pre_buffer, llm).eval()
    model = model if h.num_experts is None else model.bfloat16()
    decoder = started(model, True, stop=[1])
    with torch.no_grad(), MadeOfNumbers() as made, HostReads() as reads:
        decoder.step()
    assert reads.found == [] and made.found == 0


@pytest.mark.parametrize("name", MODELS)
def test_fixed_shapes_give_the_same_tokens(name: str) -> None:
    """Through a full room of the cache, chunk by chunk, as through the part of it that is used."""
    model = speaker(**MODELS[name])
    growing, fixed = started(model, False), started(model, True)
    with torch.no_grad():
        for _ in range(NEW - 1):
            growing.step()
            fixed.step()
    assert fixed.cache.room == CHUNK and growing.cache.room < 64
    assert len(growing.tokens.unique()) > 5
    assert torch.equal(growing.tokens, fixed.tokens[:, :NEW])


def _has_tensors(value: Any) -> bool:
    ours = type(value).__module__.startswith("neo_components") and hasattr(value, "__dict__")
    return isinstance(value, nn.Module) or ours


ON_CPU = ("_host_later", "_indices")


def fake(value: Any, mode: FakeTensorMode, seen: set[int]) -> Any:
    """An object with all its tensors on a GPU that is not there; what the CPU knows of a batch stays."""
    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
        with mode:
            moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        return nn.Parameter(moved, requires_grad=False) if isinstance(value, nn.Parameter) else moved
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(fake(entry, mode, seen) for entry in value)
    if isinstance(value, dict):
        value.update({key: fake(entry, mode, seen) for key, entry in value.items()})
    elif _has_tensors(value) and id(value) not in seen:
        seen.add(id(value))
        columns = vars(value)
        columns.update(fake({name: x for name, x in columns.items() if name not in ON_CPU}, mode, seen))
    return value


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
@pytest.mark.parametrize("name", ["plain", "windows", "Gemma 3", "experts"])
def test_a_step_on_a_gpu_that_is_not_there(name: str, fixed: bool) -> None:
    """Nothing lies on the CPU by mistake, and no size depends on values."""
    model = sparse() if name == "experts" else speaker(**MODELS[name]).bfloat16()
    decoder = started(model, fixed)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake(decoder, mode, set())
    with mode, torch.no_grad():
        decoder.step()
        decoder.step()
    assert {x.device.type for x in (decoder.tokens, decoder.finished, decoder.cache.lengths)} == {"cuda"}
    assert all(not layer.filled or layer.k.device.type == "cuda" for layer in decoder.cache.layers)


def test_a_step_compiles_whole_and_once(fresh: None) -> None:
    """No graph break, nothing compiled again in ten steps, the same tokens."""
    model = speaker({"depth": 1, "window": 4}, pre={"depth": 1})
    plain, other = started(model, True), started(model, True)
    step = torch.compile(other.step, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(10):
            plain.step()
            step()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert torch.equal(plain.tokens, other.tokens)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
def test_compiled_generation(fresh: None) -> None:
    """The same tokens with and without stop tokens, drawn or not; blocks that are alike share one graph, another number
    of new tokens compiles nothing, and the model is as it was."""
    model = speaker({"depth": 3})
    prompts = prompts_of(model)
    free = generate(model, prompts, NEW)
    assert [x.tolist() for x in generate(model, prompts, NEW, compile=True)] == [x.tolist() for x in free]
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 3 and not counters["graph_break"]
    stop = [int(free[0][3]), int(free[2][6])]
    wanted = generate(model, prompts, 40, stop_token_ids=stop)
    assert [x.tolist() for x in generate(model, prompts, 40, stop_token_ids=stop, compile=True)] == [
        x.tolist() for x in wanted
    ]
    assert counters["stats"]["unique_graphs"] == graphs + 1  # stop ids came in
    drawn = [
        generate(model, prompts, NEW, True, generator=torch.Generator().manual_seed(3), compile=how)
        for how in (True, True, False)
    ]
    assert all(torch.equal(torch.cat(drawn[0]), torch.cat(other)) for other in drawn[1:])
    assert all(block._compiled_call_impl is None for block in model.modules())


def test_lengths_that_select_frequencies_cannot_be_compiled() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 12}
    model = speaker({"rope_scaling": scaling})
    with pytest.raises(ValueError, match=r"compile=True, but the rope_scaling of this model .* compile=False"):
        generate(model, prompts_of(model), 4, compile=True)


def test_stop_tokens_are_seen_two_looks_late() -> None:
    """Where steps do not wait for the host: the tokens are those of a generation that looks at every step."""
    model = speaker()
    prompts, room = prompts_of(model), 20 * EVERY
    free = generate(model, prompts, 4)
    stop = sorted({int(tokens[2]) for tokens in free})
    later = later_positions(model, prompts, room)
    decoder, steps = started(model, True, stop=stop, new=room), []

    def step() -> None:
        steps.append(True)
        decoder.step()

    watch = Watch(len(stop), torch.device("cpu"), fixed=True)
    assert not watch.drops
    with torch.no_grad():
        rows = _continue(model, prompts, decoder, step, later, watch)
    assert len(steps) == 2 * EVERY - 1
    assert bool(decoder.finished.all())
    wanted = generate(model, prompts, room, stop_token_ids=stop)
    for row, tokens in zip(rows, wanted, strict=True):
        assert row[: len(tokens)] == tokens.tolist() and row[len(tokens) - 1] in stop


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("compiling", [False, True], ids=["plain", "compiled"])
def test_attention_of_one_query(chunks: int, compiling: bool, fresh: None) -> None:
    """As torch's SDPA with expanded heads in float64; half precision rounds what it reads and returns, nothing else."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, generator=generator) for shape in ((3, 1, 6, 16), (3, 2, 64, 16), (3, 2, 64, 8)))
    hidden = torch.rand(3, 1, 64, generator=generator) < 0.5
    attend = attend_to_one
    if compiling:
        attend = torch.compile(attend_to_one, fullgraph=True, backend="aot_eager")

    def exact(*inputs: Tensor) -> Tensor:
        q, k, v = (x.double() for x in inputs)
        k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
        return nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, ~hidden[:, None], scale=0.3
        ).transpose(1, 2)

    found = attend(q, k, v, hidden, 0.3, chunks)
    assert found.shape == (3, 1, 6, 8)
    assert torch.allclose(found.double(), exact(q, k, v), atol=1e-6)
    half = [x.bfloat16() for x in (q, k, v)]
    found = attend(*half, hidden, 0.3, chunks)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), exact(*half), atol=6e-3)


def test_rooms_come_in_few_sizes() -> None:
    sizes = sorted({fixed_room(tokens) // CHUNK for tokens in range(1, 40 * CHUNK, 50)})
    assert sizes == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    assert all(tokens <= fixed_room(tokens) < max(CHUNK + 1, 1.5 * tokens + CHUNK) for tokens in range(1, 9000, 7))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_tokens_are_drawn_by_their_probability(top_p: float) -> None:
    """Of .5, .3, .15 and .05; a top_p of .9 drops the last. Each within five standard errors."""
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    count, kept = 4000, weights if top_p == 1.0 else torch.tensor([0.5, 0.3, 0.15, 0.0])
    choose = Choice(True, 1.0, top_p, torch.Generator().manual_seed(0))
    tokens = choose(weights.log().expand(count, -1))
    for number, share in enumerate((kept / kept.sum()).tolist()):
        drawn = int((tokens == number).sum())
        assert abs(drawn - count * share) <= 5 * (count * share * (1 - share)) ** 0.5


def test_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are those of the weights that a token passes and of the cache so far; its share is of their bound."""
    path = Path(__file__).parent.parent / "benchmarks" / "decode.py"
    spec = importlib.util.spec_from_file_location("decode", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "decode", module)
    spec.loader.exec_module(module)
    arguments = ["--tiny", "--batch", "1", "2", "--bandwidth", "10", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", ["decode.py", *arguments, "--output", str(tmp_path / "out")])
    module.main()
    found = json.loads((tmp_path / "out" / "decode.json").read_text())
    # Two blocks: projections 64 x (3 x 64 + 2 x 32 + 32), output 64 x 64, feed-forward 3 x 64 x 192, norms 2 x 64
    # and of queries and keys 64 each; then the final norm and the head.
    projections, feed_forward, norms = 64 * (2 * 64 + 2 * 32 + 32) + 64 * 64, 3 * 64 * 192, 2 * 64 + 4 * 32
    weights = 4 * (2 * (projections + feed_forward + norms) + 64 + 100 * 64)
    for row, batch in zip(found["rows"], (1, 2), strict=True):
        cached = batch * 2 * (2 * 32 + 32) * 4 * (16 + module.WARM + 4)
        assert row["step_bytes"] == weights + cached
        assert row["bytes_per_token"] * batch == row["step_bytes"]
        assert row["bound"] == pytest.approx(batch * 10e9 / row["step_bytes"])
        assert row["bound_share"] == pytest.approx(row["tokens_per_second"] / row["bound"])
        assert row["tokens_per_second"] > 0 and row["same_tokens"] == 1.0 and row["batch"] == batch

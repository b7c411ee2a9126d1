"""Hub ids: what is needed is fetched and no more, the cache serves offline, and each failure says what to do.

A stub of the hub listens on 127.0.0.1, as the network is the point here; each download runs in a process of its own,
because the hub's client reads its settings when it is imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import llm_folder, tiny_model
from hub_stub import Hub, serving
from shard_builders import TOKENIZER

ROOT = Path(__file__).parent.parent
TOKENS = 402
"""In the test tokenizer."""


def sharded_llm(folder: Path) -> None:
    """A tiny language model as transformers saves it, in several files."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=90, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded language model with much that is not needed, a whole model, an asset, and one with pickles only."""
    root = tmp_path_factory.mktemp("repositories")
    llm = root / "some" / "llm"
    sharded_llm(llm)
    for path in Path(TOKENIZER).iterdir():
        shutil.copy(path, llm)
    (llm / "onnx").mkdir()
    for name in ("pytorch_model.bin", "modeling_x.py", "onnx/config.json", "consolidated.safetensors", "picture.png"):
        (llm / name).write_bytes(b"not needed")
    tiny_model().save_pretrained(root / "some" / "neo")
    tiny_model().pre_buffer.save_pretrained(root / "some" / "asset")
    llm_folder(root / "some" / "pickled")
    (root / "some" / "pickled" / "model.safetensors").rename(root / "some" / "pickled" / "pytorch_model.bin")
    return root


@pytest.fixture
def hub(repositories: Path) -> Iterator[Hub]:
    with serving(repositories) as hub:
        yield hub


def run(code: str, cache: Path, endpoint: str, **environment: str) -> tuple[str, str]:
    """What a fresh interpreter prints: (stdout, stderr)."""
    settings = {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    source = f"try:\n    {code}\nexcept Exception as error:\n    print(f'{{type(error).__name__}}: {{error}}')"
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | settings | environment,
        timeout=120,
    )
    return done.stdout.strip(), done.stderr


FOLDER = "from neo_components.storage.hub import resolve; print(resolve('some/llm'))"


def test_only_what_is_needed_is_fetched_and_once(hub: Hub, repositories: Path, tmp_path: Path) -> None:
    shards = sorted(path.name for path in (repositories / "some" / "llm").glob("model-*.safetensors"))
    assert len(shards) > 2
    out, shown = run(FOLDER, tmp_path, hub.address)
    told = (
        "config.json", "generation_config.json", "model.safetensors.index.json", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json",
    )  # fmt: skip
    assert sorted(hub.fetched) == sorted(f"some/llm/{name}" for name in (*told, *shards))
    assert sorted(path.name for path in Path(out).iterdir()) == sorted((*told, *shards))
    # Plain lines, as stderr is no terminal here.
    assert "\r" not in shown and any(line.startswith("Fetching") for line in shown.splitlines())
    hub.fetched.clear()
    assert run(FOLDER, tmp_path, hub.address)[0] == out
    assert hub.fetched == []


def test_every_kind_of_model_comes_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    """A tokenizer too; it alone needs no weights."""
    code = (
        "from neo_components import NEO, PostLLM, PreBuffer; from neo_components.data import load_tokenizer; "
        "print(len(load_tokenizer('some/llm')), len(PostLLM.from_pretrained('some/llm').layers), "
        "type(NEO.from_pretrained('some/neo')).__name__, PreBuffer.from_pretrained('some/asset').hparams.depth)"
    )
    assert run(code, tmp_path, hub.address)[0] == f"{TOKENS} 3 NEO 2"
    first_weights = next(n for n, name in enumerate(hub.fetched) if name.endswith(".safetensors"))
    assert "some/llm/tokenizer.json" in hub.fetched[:first_weights]


def test_offline_the_cache_serves(hub: Hub, tmp_path: Path) -> None:
    folder = run(FOLDER, tmp_path, hub.address)[0]
    hub.fetched.clear()
    assert run(FOLDER, tmp_path, hub.address, HF_HUB_OFFLINE="1")[0] == folder
    assert run(FOLDER, tmp_path, "http://127.0.0.1:9")[0] == folder
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("name", "offline", "says"),
    [
        ("some/nothing", "0", ("the hub shows you no such model: check the spelling", "hf auth login")),
        ("some/gated", "0", ("accept its terms at https://huggingface.co/some/gated", "hf auth login")),
        ("some/pickled", "0", ("it has pytorch_model.bin; pickles can run code", "convert")),
        ("some/llm", "1", ("HF_HUB_OFFLINE is set", "hf download some/llm --local-dir FOLDER")),
        ("some/llm", "down", ("cannot be reached", "check the connection", "hf download some/llm")),
        ("some/ll m", "0", ("no hub id 'owner/name'",)),
    ],
)  # fmt: skip
def test_failures_say_what_to_do(name: str, offline: str, says: tuple[str, ...], hub: Hub, tmp_path: Path) -> None:
    hub.gated.add("some/gated")
    endpoint = "http://127.0.0.1:9" if offline == "down" else hub.address
    code = f"from neo_components.storage.hub import resolve; print(resolve({name!r}))"
    out, _ = run(code, tmp_path, endpoint, HF_HUB_OFFLINE="1" if offline == "1" else "0")
    assert out.startswith("FileNotFoundError: ")
    for words in says:
        assert words in out


def test_half_a_download_is_told_from_a_whole_one(hub: Hub, tmp_path: Path) -> None:
    """The config came, the weights did not: offline this is no model."""
    code = "from neo_components.storage.hub import resolve; print(resolve('some/llm', weights=False))"
    folder = Path(run(code, tmp_path, hub.address)[0])
    assert (folder / "config.json").is_file()
    out, _ = run(FOLDER, tmp_path, hub.address, HF_HUB_OFFLINE="1")
    assert "not complete in the hub's cache" in out and "HF_HUB_OFFLINE is set" in out


def test_a_bar_on_a_terminal(hub: Hub, tmp_path: Path) -> None:
    import pty
    import termios

    ours, terminal = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    environment = os.environ | settings | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", FOLDER], stderr=terminal, check=True, env=environment, stdout=subprocess.DEVNULL
    )
    shown = os.read(ours, 10**6).decode()
    assert "Fetching" in shown and "100%|" in shown and "\r" in shown


def test_an_asset_is_published_and_read_back(repositories: Path, tmp_path: Path) -> None:
    """What ``push_to_hub`` sends is what ``save_pretrained`` writes, byte for byte, and a hub id opens it."""
    asset = str(repositories / "some" / "asset")
    push = (
        f"from neo_components import PreBuffer; p = PreBuffer.from_pretrained({asset!r}); "
        "p.push_to_hub('me/eyes', private=True, token='hf_test')"
    )
    read = (
        "from neo_components import PreBuffer, attach; p = PreBuffer.from_pretrained('me/eyes'); "
        f"p.save_pretrained({str(tmp_path / 'again')!r}); print(p.hparams.depth, p.patch_embedding is not None)"
    )
    with serving(tmp_path / "hub") as hub:
        assert run(push, tmp_path / "mine", hub.address, HF_HUB_DISABLE_XET="1")[0] == ""
        assert hub.options == {"me/eyes": {"visibility": "private"}} and hub.tokens == {"hf_test"}
        assert len(hub.large) == 1
        assert run(read, tmp_path / "theirs", hub.address)[0] == "2 True"
    written = {path.name: path.read_bytes() for path in (repositories / "some" / "asset").iterdir()}
    for folder in (tmp_path / "hub" / "me" / "eyes", tmp_path / "again"):
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == written

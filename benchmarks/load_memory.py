"""Memory of loading: peak resident memory of a fresh process, and the size of the model that it loads.

    python benchmarks/load_memory.py --gigabytes 4

writes random models of that size to a temporary folder (a language model in the Hugging Face layout, in several files,
and a full NEO), loads each in its own process, in the type of the files and in another, reads all weights,
and prints a table. The same language model is loaded by transformers in the same run, for comparison.

Linux only: the peak is ``VmHWM`` of ``/proc/self/status``, which counts pages of mapped files too.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer
from neo_components.llms.family import in_model
from neo_components.model.layouts import own_config
from neo_components.storage.deferred import unfilled
from neo_components.storage.weights import DTYPES

GIGA = 10**9
TARGET = 1.2
"""Gigabytes above the model's own size that the whole process may take."""
VOCAB = 151_936
WIDTH = 2048
READERS = ("PostLLM", "NEO", "transformers")


def sizes(gigabytes: float, dtype: torch.dtype, width: int = WIDTH) -> dict[str, Any]:
    """Arguments of a post-LLM that takes about so many bytes in that type, shaped like Qwen3-1.7B."""
    arguments: dict[str, Any] = {
        "hidden_size": width, "num_heads": width // 128, "num_kv_heads": width // 256, "head_width": 128,
        "feed_forward_size": 3 * width,
    }  # fmt: skip
    block, vocab = 12 * width**2, VOCAB * width // WIDTH
    depth = round((gigabytes * GIGA / dtype.itemsize - vocab * width) / block)
    return arguments | {"depth": max(depth, 1), "vocab_size": vocab, "tie_embeddings": True}


def write_llm(folder: Path, gigabytes: float, dtype: torch.dtype, files: int = 4, width: int = WIDTH) -> None:
    """A random Qwen3 model in the Hugging Face layout."""
    s = sizes(gigabytes, dtype, width)
    with unfilled():
        llm = PostLLM(**s)
    state = {
        in_model(n): t for n, t in llm.state_dict().items() if "_hw" not in n and "_h." not in n and "_w." not in n
    }
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": s["vocab_size"],
        "hidden_size": width, "num_hidden_layers": s["depth"], "num_attention_heads": s["num_heads"],
        "num_key_value_heads": s["num_kv_heads"], "head_dim": s["head_width"],
        "intermediate_size": s["feed_forward_size"], "rope_theta": 1e6, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
    }  # fmt: skip
    _write(folder, state, config, dtype, files)


def write_neo(folder: Path, gigabytes: float, dtype: torch.dtype, width: int = WIDTH) -> None:
    """A random NEO in the library's own layout, its pre-Buffer a quarter as deep as the post-LLM."""
    s = sizes(gigabytes / 1.3, dtype, width)
    blocks = {name: s[name] for name in s if name not in ("depth", "vocab_size", "tie_embeddings")}
    with unfilled():
        model = NEO(PatchEmbedding(width), PreBuffer(max(s["depth"] // 4, 1), **blocks), PostLLM(**s))
    _write(folder, model.state_dict(), own_config(model), dtype, files=1)


def _write(folder: Path, state: Mapping[str, Tensor], config: dict[str, Any], dtype: torch.dtype, files: int) -> None:
    """Random weights of those shapes, one file after the other, so that writing takes little memory too."""
    folder.mkdir(parents=True)
    noise = torch.randn(2**20).to(dtype) * 0.02
    names = [list(state)[number::files] for number in range(files)]
    weight_map = {}
    for number, part in enumerate(names, 1):
        file = f"model-{number:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(part, file)
        tensors = {}
        for name in part:
            count = state[name].numel()
            tensors[name] = noise.repeat(-(-count // len(noise)))[:count].view(state[name].shape)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def measure(reader: str, folder: Path, dtype: str) -> dict[str, float]:
    """Loads a folder in its own process.

    Returns:
        Bytes: ``size`` of all parameters in memory, ``before`` (resident when everything is imported), ``peak``; and
        ``seconds`` of loading and of reading all weights once.
    """
    command = [sys.executable, __file__, "--measure", reader, str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measured(reader: str, folder: str, dtype: str) -> dict[str, float]:
    """What :func:`measure` starts."""
    if reader == "transformers":
        from transformers import AutoModelForCausalLM

        def load() -> Any:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    else:

        def load() -> Any:
            return {"PostLLM": PostLLM, "NEO": NEO}[reader].from_pretrained(folder, dtype=dtype)

    before, began = _status("VmRSS"), time.monotonic()
    model = load()
    # A reader that only maps the files has not read them yet, so every page is touched.
    checksum = sum(float(parameter.detach().flatten()[::1024].float().sum()) for parameter in model.parameters())
    seconds = time.monotonic() - began
    assert math.isfinite(checksum)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {DTYPES[dtype]}
    return {"size": size, "before": before, "peak": _status("VmHWM"), "seconds": seconds}


def _status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def table(gigabytes: float, root: Path) -> bool:
    """Writes the models, prints a line for each way to load them; returns whether all are under the target."""
    stored = torch.bfloat16
    write_llm(root / "llm", gigabytes, stored)
    write_neo(root / "neo", gigabytes, stored)
    print(f"device: {platform.processor() or platform.machine()} CPU, torch {torch.__version__}; files in bfloat16")
    columns = ("loaded by", "as", "size S", "imported", "peak", "peak - S", "seconds")
    print("{:14s} {:10s} {:>8s} {:>9s} {:>8s} {:>9s} {:>8s}   (GB)".format(*columns))
    good = True
    for reader, folder in (("PostLLM", "llm"), ("transformers", "llm"), ("NEO", "neo")):
        for dtype in ("bfloat16", "float32"):
            found = measure(reader, root / folder, dtype)
            size, before, peak = (found[name] / GIGA for name in ("size", "before", "peak"))
            print(
                f"{reader:14s} {dtype:10s} {size:8.2f} {before:9.2f} {peak:8.2f} {peak - size:9.2f} "
                f"{found['seconds']:8.1f}",
                flush=True,
            )
            good &= reader == "transformers" or peak - size < TARGET
    print(f"peak under S + {TARGET} GB in every case of this library: {'yes' if good else 'NO'}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the files of each model")
    parser.add_argument(
        "--folder", type=Path, help="where to write the models for a while (default: the temporary folder)"
    )
    parser.add_argument("--measure", nargs=3, metavar=("READER", "FOLDER", "DTYPE"), help="load one folder, print JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measured(*options.measure)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        sys.exit(not table(options.gigabytes, Path(root)))


if __name__ == "__main__":
    main()

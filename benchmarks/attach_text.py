"""What the bridges of an attached pre-Buffer do to a language model's text, before any training.

    python benchmarks/attach_text.py outputs/quickstart/pre_buffer HuggingFaceTB/SmolLM2-135M-Instruct --noise

Prints for each path of text how much variance the bridges lose (of the tokens that they were fitted on, and of tokens
left out), the perplexity of three plain sentences, and the ten tokens that continue a question. With ``--noise`` also
the perplexity of the language model alone where its word embeddings lose a part of their variance.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from neo_components import PostLLM, PreBuffer, Sample, attach, pack
from neo_components.data import load_tokenizer
from neo_components.model.neo import NEO
from neo_components.types import IGNORED

SENTENCES = (
    "The capital of France is Paris, and the city lies on the river Seine. It is the largest city of the country.",
    "To bake a cake you need flour, sugar, eggs and butter. Mix the butter with the sugar first, then add the eggs.",
    "Photosynthesis is the process by which green plants turn sunlight, water and carbon dioxide into sugar.",
)
QUESTION = "Question: What is the capital of France?\nAnswer: The capital of France is"
LOST = (0.0, 0.01, 0.03, 0.1, 0.2, 0.3)


@torch.no_grad()
def perplexity(model: NEO, tokens: list[Tensor]) -> float:
    """The exponential of the mean negative log likelihood of all tokens but the first of each sentence."""
    batch = pack([Sample(ids, ids) for ids in tokens], model.input_spec, loss_reduction="token")
    nll: list[Tensor] = []
    model.loss(batch, nll)
    assert len(nll[0]) == int((batch.labels[:, 1:] != IGNORED).sum())
    return math.exp(float(nll[0].mean()))


@torch.no_grad()
def with_loss(weight: Tensor, lost: float, shrunk: bool, seed: int) -> Tensor:
    """Word embeddings [V, D] that have lost a part of their variance: noise of that part is added; of ``shrunk`` ones
    what is left is scaled down too, as a ridge regression does that explains the rest."""
    mean = weight.mean(0)
    deviation = (weight - mean).square().mean(0).sqrt()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * deviation
    if shrunk:
        return mean + (1 - lost) * (weight - mean) + math.sqrt(lost * (1 - lost)) * noise
    return weight + math.sqrt(lost) * noise


def print_noise(model: NEO, tokens: list[Tensor]) -> None:
    """The perplexity for each of ``LOST``, for three draws. The head keeps its weights."""
    llm: PostLLM = model.post_llm
    table, embed = llm.word_embedding.weight.detach().clone(), llm.embed
    for lost in LOST:
        found = {}
        for shrunk in (False, True):
            tables = [with_loss(table, lost, shrunk, seed) for seed in range(3 if lost else 1)]
            values = []
            for changed in tables:
                llm.embed = lambda ids, changed=changed: changed[ids.clamp(max=len(changed) - 1)]  # type: ignore[method-assign, misc]
                values.append(perplexity(model, tokens))
            found[shrunk] = ", ".join(f"{value:.1f}" for value in sorted(values))
        print(f"word embeddings lose {lost}: perplexity {found[False]}; shrunk too {found[True]}", flush=True)
    llm.embed = embed  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("asset", help="folder or hub id of a pre-Buffer")
    parser.add_argument("llm", help="folder or hub id of a language model")
    parser.add_argument("--noise", action="store_true")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.llm)
    tokens = [torch.tensor(tokenizer.encode(text)) for text in SENTENCES]
    question = Sample(torch.tensor(tokenizer.encode(QUESTION)))
    asset = PreBuffer.from_pretrained(options.asset)
    chosen = attach(asset, options.llm)
    for text in ("bypass", "shared"):
        model = chosen if text == chosen.text else attach(asset, chosen.post_llm, text=text)
        bridges = [("in", model.bridge_in), ("out", model.bridge_out)]
        lost = [f"{name} {b.unexplained:.2f} ({b.unexplained_left_out:.2f})" for name, b in bridges if b is not None]
        [answer] = model.generate([question], max_new_tokens=10)
        note = " (the choice of auto)" if text == chosen.text else ""
        print(f"text {text}{note}; lost of fitted tokens (of left-out ones): {', '.join(lost) or 'no bridge'}")
        print(f"  perplexity {perplexity(model, tokens):.1f}, answer {tokenizer.decode(answer)!r}", flush=True)
    if options.noise:
        print_noise(attach(asset, chosen.post_llm, text="bypass"), tokens)


if __name__ == "__main__":
    main()

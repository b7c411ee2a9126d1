"""What the bridges of an attached pre-Buffer do to a language model's text, before any training.

    python benchmarks/attach_text.py outputs/quickstart/pre_buffer HuggingFaceTB/SmolLM2-135M-Instruct

Prints how much of left-out tokens the bridges lose, the path of text that ``text="auto"`` chooses, and for each path the
perplexity of three plain sentences and the ten tokens that continue a question.
"""

from __future__ import annotations

import argparse
import math

import torch

from neo_components import NEO, PreBuffer, Sample, attach, pack
from neo_components.data import load_tokenizer
from neo_components.types import IGNORED

SENTENCES = (
    "The capital of France is Paris, and the city lies on the river Seine. It is the largest city of the country.",
    "To bake a cake you need flour, sugar, eggs and butter. Mix the butter with the sugar first, then add the eggs.",
    "Photosynthesis is the process by which green plants turn sunlight, water and carbon dioxide into sugar.",
)
QUESTION = "Question: What is the capital of France?\nAnswer: The capital of France is"


@torch.no_grad()
def perplexity(model: NEO, tokens: list[torch.Tensor]) -> float:
    """The exponential of the mean negative log likelihood of all tokens but the first of each sentence."""
    batch = pack([Sample(ids, ids) for ids in tokens], model.input_spec, loss_reduction="token")
    count = (batch.labels[:, 1:] != IGNORED).sum()
    nll: list[torch.Tensor] = []
    model.loss(batch, nll)
    return math.exp(float(nll[0].sum() / count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("asset", help="folder or hub id of a pre-Buffer")
    parser.add_argument("llm", help="folder or hub id of a language model")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.llm)
    tokens = [torch.tensor(tokenizer.encode(text)) for text in SENTENCES]
    question = Sample(torch.tensor(tokenizer.encode(QUESTION)))
    asset = PreBuffer.from_pretrained(options.asset)
    chosen = attach(asset, options.llm)
    llm = chosen.post_llm
    for text in ("bypass", "shared"):
        model = chosen if text == chosen.text else attach(asset, llm, text=text)
        bridges = {"in": model.bridge_in, "out": model.bridge_out}
        lost = ", ".join(f"{name} {bridge.unexplained_left_out:.2f}" for name, bridge in bridges.items() if bridge)
        [answer] = model.generate([question], max_new_tokens=10)
        note = " (the choice of auto)" if text == chosen.text else ""
        print(f"{text}{note}: lost of left-out tokens: {lost or 'nothing, no bridge'}")
        print(f"  perplexity {perplexity(model, tokens):.1f}, answer {tokenizer.decode(answer)!r}", flush=True)


if __name__ == "__main__":
    main()

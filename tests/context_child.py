"""One process of ``tests/test_context_parallel.py``: ``torchrun ... context_child.py PLAN.json`` computes the cases of
a plan in all processes together and in this one alone, then trains the recipes of the plan."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from builders import image_tokens, random_image, random_sample, tiny_model
from torch import Tensor

from neo_components import NEO, Batch, InputSpec, Sample, load_recipe, pack
from neo_components.training.context_parallel.model import ContextParallel
from neo_components.training.run import train
from neo_components.types import IGNORED

LENGTH = 128


def words(count: int, learn: bool = True) -> Sample:
    """A document of words, all of which are targets if any is."""
    ids = 3 + torch.arange(count) % 50
    return Sample(ids, ids.clone() if learn else None)


def crossing(spec: InputSpec) -> Batch:
    """Two sequences, to be cut at 64, or at 32, 64 and 96. The first has an image of 48 tokens at 30 to 77 between
    documents of words; the second has small images at its start, no other, and targets at every border."""
    generator = torch.Generator().manual_seed(5)
    grid = (6, 8)
    ids = torch.tensor([3, 4, 5, *image_tokens(spec, grid), *range(6, 14)])
    large = Sample(ids, torch.where(ids < 50, ids, IGNORED), [random_image(spec, grid, generator)])
    small = [random_sample(spec, n, images=1, text=(3, 5)) for n in (4, 5)]
    rows = [words(26), large, words(20)], [*small, words(100 - sum(len(one.token_ids) for one in small))]
    return Batch.stack([pack(row, spec, seq_len=LENGTH) for row in rows])


def worded(spec: InputSpec, learn: bool = True) -> Batch:
    """One sequence without any image."""
    return pack([words(50, learn), words(70, learn)], spec, seq_len=LENGTH)


def gradients(model: NEO, batch: Batch, half: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, each target's, and the gradient of every parameter."""
    nll: list[Tensor] = []
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model.loss(batch, nll)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), nll[0], found


def compare(
    group: ContextParallel, sizes: dict[str, Any], batch: str = "crossing", checkpointed: int = 0, half: bool = False
) -> dict[str, float]:
    """How far the loss (relative), each target's and each gradient (absolute) are from those of one process."""
    alone = tiny_model(**sizes)
    for stack in (alone.pre_buffer, alone.post_llm):
        stack.checkpointed_blocks = checkpointed
    together = deepcopy(alone)
    group.apply(together)
    spec = alone.input_spec
    data = {"crossing": crossing, "words": worded, "unlabelled": lambda spec: worded(spec, learn=False)}[batch](spec)
    loss, nll, expected = gradients(alone, data, half)
    seen, seen_nll, mine = gradients(together, data, half)
    for grad in mine.values():
        dist.all_reduce(grad, op=dist.ReduceOp.SUM)
        grad /= group.size
    assert mine.keys() == expected.keys()
    far = {name: float((mine[name] - grad).abs().max()) for name, grad in expected.items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        validation = float(together.eval().loss(data))
    return {
        "loss": abs(float(seen - loss)) / max(float(loss), 1.0),
        "nll": float((seen_nll - nll).abs().max()) if len(nll) else 0.0,
        "targets": len(nll),
        "gradient": max(far.values()),
        "largest": max(float(grad.abs().max()) for grad in expected.values()),
        "validation": abs(validation - float(loss)),
    }


def different(group: ContextParallel) -> str:
    """The message about processes of a group that read different batches."""
    model = tiny_model()
    group.apply(model)
    try:
        model.loss(pack([words(10 + dist.get_rank())], model.input_spec, seq_len=LENGTH))
    except ValueError as error:
        return str(error)
    return "no error"


def trained(file: str, overrides: list[str], resume: str | None = None) -> dict[str, Any]:
    """What a run of a recipe reports."""
    done = train(load_recipe(file, overrides), resume)
    losses = [loss for _, _, loss in done.losses]
    return {"losses": losses, "metrics": done.metrics, "tokens": done.summary.tokens, "images": done.summary.images}


def main(path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    plan = json.loads(path.read_text())
    group = ContextParallel.of_size(plan["size"])
    results = {name: compare(group, **case) for name, case in plan.get("cases", {}).items()}
    results["different"] = different(ContextParallel(group.group))
    results |= {name: trained(**run) for name, run in plan.get("runs", {}).items()}
    path.with_name(f"{path.stem}.rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

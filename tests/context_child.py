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

LENGTH = 128


def crossing(spec: InputSpec) -> Batch:
    """Two sequences: an image of 48 tokens over the borders at 32 and 64, with a document on each side, and documents
    of images of their own behind a border at 96 where no image is; the other is words in its second half."""
    generator = torch.Generator().manual_seed(5)
    grid = (6, 8)
    ids = torch.tensor([3, 4, 5, *image_tokens(spec, grid), *range(6, 14)])
    labels = torch.where(ids < 20, ids, -100)
    large = Sample(ids, labels, [random_image(spec, grid, generator)])
    words = [random_sample(spec, n, images=0, text=(14, 14)) for n in range(2)]
    small = [random_sample(spec, n, images=1, text=(3, 5)) for n in (4, 5)]
    first = pack([words[0], large, random_sample(spec, 3, images=0, text=(30, 30))], spec, seq_len=LENGTH)
    second = pack([*small, words[1], random_sample(spec, 9, images=0, text=(40, 40))], spec, seq_len=LENGTH)
    return Batch.stack([first, second])


def wordy(spec: InputSpec, learn: bool = True) -> Batch:
    """A batch without any image."""
    samples = [random_sample(spec, n, images=0, text=(20, 20), learn=learn) for n in range(4)]
    return pack(samples, spec, seq_len=LENGTH)


def gradients(model: NEO, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, each target's, and the gradient of every parameter."""
    nll: list[Tensor] = []
    model.zero_grad()
    loss = model.loss(batch, nll)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), nll[0], found


def compare(group: ContextParallel, sizes: dict[str, Any], batch: str = "crossing", checkpointed: int = 0) -> Any:
    """How far the loss (relative), each target's and each gradient (absolute) are from those of one process."""
    alone = tiny_model(**sizes)
    for stack in (alone.pre_buffer, alone.post_llm):
        stack.checkpointed_blocks = checkpointed
    together = deepcopy(alone)
    group.apply(together)
    spec = alone.input_spec
    data = {"crossing": crossing, "wordy": wordy, "unlabelled": lambda spec: wordy(spec, False)}[batch](spec)
    loss, nll, expected = gradients(alone, data)
    seen, seen_nll, mine = gradients(together, data)
    for grad in mine.values():
        dist.all_reduce(grad, op=dist.ReduceOp.SUM)
        grad /= group.size
    assert mine.keys() == expected.keys()
    far = {name: float((mine[name] - grad).abs().max()) for name, grad in expected.items()}
    with torch.no_grad():
        validation = float(together.eval().loss(data))
    return {
        "loss": abs(float(seen / loss.clamp(min=1e-9)) - 1) if loss else float(seen),
        "nll": float((seen_nll - nll).abs().max()) if len(nll) else 0.0,
        "targets": len(nll),
        "gradient": max(far.values()),
        "largest": max(float(grad.abs().max()) for grad in expected.values()),
        "validation": abs(validation - float(loss)),
        "value": float(seen),
    }


def main(path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    plan = json.loads(path.read_text())
    group = ContextParallel.of_size(plan["size"])
    results = {name: compare(group, **case) for name, case in plan["cases"].items()}
    for name, (file, *overrides) in plan.get("recipes", {}).items():
        done = train(load_recipe(file, overrides))
        results[name] = {"losses": [loss for _, _, loss in done.losses], "metrics": done.metrics}
    path.with_name(f"{path.stem}.rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What someone does who has transformers and an exported folder, and nothing of this library.

Run as ``python hf_child.py JOBS.json``: per model a folder, batches of conversations, and where to write tensors for
the test.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

ABSENT = ("neo_components", "lightning", "pytorch_lightning", "omegaconf", "webdataset", "torchmetrics")


class Absent:
    """Makes packages look as if they were not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())  # type: ignore[arg-type]
for missing in ABSENT:
    try:
        importlib.import_module(missing)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{missing} can be imported")

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline  # noqa: E402

NEW = 10


def load(folder: str, **options: Any) -> tuple[Any, Any]:
    """Model and processor; every tensor of the files is used, and none is made up."""
    model, told = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def read(processor: Any, conversations: list[Any], **options: Any) -> Any:
    """The inputs of a batch of conversations."""
    return processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True, **options},
    )  # fmt: skip


def answers(model: Any, inputs: Any, **options: Any) -> Tensor:
    """The new tokens [B, at most NEW]."""
    return model.generate(**inputs, max_new_tokens=NEW, **options)[:, inputs["input_ids"].shape[1] :]


def one(inputs: Any, row: int, fold: int, image_token_id: int) -> dict[str, Tensor]:
    """One row of a batch, without its padding."""
    real = inputs["attention_mask"][row].bool()
    alone = {"input_ids": inputs["input_ids"][row, real][None]}
    if "pixel_values" in inputs:
        counts = (inputs["input_ids"] == image_token_id).sum(1) * fold**2
        ends, begins, first, images = counts.cumsum(0), counts.cumsum(0) - counts, 0, []
        for grid in inputs["image_grid_hw"]:
            if begins[row] <= first < ends[row]:
                images.append(grid)
            first += int(grid.prod())
        if images:
            alone |= {
                "image_grid_hw": torch.stack(images), "pixel_values": inputs["pixel_values"][begins[row] : ends[row]]
            }  # fmt: skip
    return alone


def continued(model: Any, alone: dict[str, Tensor], cut: int) -> Tensor:
    """Logits of a row read in two parts: the second without pictures, from the cache."""
    ids = alone["input_ids"]
    first = model(**alone | {"input_ids": ids[:, :cut]}, use_cache=True)
    then = model(input_ids=ids[:, cut:], past_key_values=first.past_key_values)
    return torch.cat([first.logits, then.logits], dim=1)


def study(job: dict[str, Any]) -> dict[str, Tensor]:
    """Everything that one exported model is asked; what the library must agree with is returned."""
    model, processor = load(job["folder"])
    fold, token = model.config.patch_embedding["fold"], model.config.image_token_id
    found: dict[str, Tensor] = {}
    for number, conversations in enumerate(job["batches"]):
        inputs = read(processor, conversations)
        logits = model(**inputs).logits
        found[f"{number}.answers"] = answers(model, inputs, eos_token_id=job["stop"])
        uncached = answers(model, inputs, eos_token_id=job["stop"], use_cache=False)
        assert torch.equal(uncached, found[f"{number}.answers"])
        for row in range(len(conversations)):
            real = inputs["attention_mask"][row].bool()
            found[f"{number}.{row}.ids"] = inputs["input_ids"][row, real]
            found[f"{number}.{row}.logits"] = logits[row, real]
            if job["again"]:
                study_row(model, one(inputs, row, fold, token), logits[row, real])
        if job["again"]:
            study_beams(model, inputs, [one(inputs, row, fold, token) for row in range(len(conversations))])
    if job["again"]:
        found |= study_rest(model, processor, job, found)
    return found


def study_row(model: Any, alone: dict[str, Tensor], expected: Tensor) -> None:
    """Neither the neighbours nor a cache matters."""
    own = model(**alone).logits[0]
    assert torch.allclose(own, expected, atol=1e-5)
    after = continued(model, alone, len(own) - 3)[0]
    assert torch.allclose(after, own, atol=1e-5), (after - own).abs().max()


def study_beams(model: Any, inputs: Any, rows: list[dict[str, Tensor]]) -> None:
    """Two beams and both their answers: in a batch as alone. A row goes on with padding until the longest is done."""
    both = answers(model, inputs, num_beams=2, num_return_sequences=2)
    for row, alone in enumerate(rows):
        beams = answers(model, alone, num_beams=2, num_return_sequences=2)
        assert torch.equal(both[2 * row : 2 * row + 2, : beams.shape[1]], beams)


def study_rest(model: Any, processor: Any, job: dict[str, Any], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Padding on the right, the loss, saving and loading again, half precision."""
    more: dict[str, Tensor] = {}
    config = AutoConfig.from_pretrained(job["folder"], trust_remote_code=True)
    assert model.config.to_dict() == config.to_dict() | {"_name_or_path": model.config.name_or_path}
    last = len(job["batches"]) - 1
    flipped = read(processor, job["batches"][last], padding_side="right")
    assert not flipped["attention_mask"][:, -1].all()
    for row, real in enumerate(flipped["attention_mask"].bool()):
        right = model(**flipped).logits[row, real]
        assert torch.allclose(right, found[f"{last}.{row}.logits"], atol=1e-5)
    labels = flipped["input_ids"].masked_fill(flipped["attention_mask"] == 0, -100)
    more["loss.labels"] = labels.masked_fill(labels >= config.vocab_size, -100)
    more["loss"] = model(**flipped, labels=more["loss.labels"]).loss
    states = model(**flipped, output_hidden_states=True).hidden_states
    assert len(states) == config.num_hidden_layers + 1
    assert torch.equal(model.model.post_llm.logits(states[-1]), model(**flipped).logits)
    model.save_pretrained(job["again"])
    processor.save_pretrained(job["again"])
    again, their = load(job["again"])
    inputs = read(their, job["batches"][last])
    assert torch.equal(again(**inputs).logits, model(**read(processor, job["batches"][last])).logits)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    talk = job["batches"][1][0]
    said = pipe(text=talk, max_new_tokens=NEW, return_full_text=False)[0]["generated_text"]
    assert said == processor.decode(answers(model, read(processor, [talk]))[0], skip_special_tokens=True)
    half, _ = load(job["folder"], dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    more["half"] = half(**inputs).logits.float()
    for mine, theirs in zip(model.buffers(), half.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    return more


def main(jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        for job in jobs:
            save_file({name: tensor.contiguous() for name, tensor in study(job).items()}, job["out"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

"""Steps of the trainer on a device that is not there, in a process that has it as its accelerator.

Called with the name of a case of ``CASES``; the last line of output is JSON: the devices of weights, gradients and
optimizer state after the steps, and how many steps there were.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from builders import random_batch, set_backend, tiny_model
from fake_device import fake_device, own_device
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from neo_components import NEO, Batch
from neo_components.recipe.stage import LoRA, StageConfig
from neo_components.training.callbacks.progress import History, LineProgress
from neo_components.training.module import NEOTraining

NAME = "neogpu"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "stage 1, clipped": (
        {"train": ("patch_embedding", "pre_buffer", "post_llm.hw")},
        {"gradient_clip_val": 1.0},
        "shared",
    ),
    "stages 2 and 3, accumulated": ({"train": ("all",)}, {"accumulate_grad_batches": 2}, "shared"),
    "bypass, checkpointed": ({"train": ("all",), "activation_checkpointing": 1.0}, {}, "bypass"),
    "lora in bfloat16": ({"train": ("pre_buffer",), "lora": LoRA(rank=2)}, {"precision": "bf16-true"}, "shared"),
    "muon": ({"train": ("all",), "optimizer": "muon"}, {}, "shared"),
}
"""Arguments of the stage and of the trainer, and where text goes."""


class Own(Accelerator):
    """One device of that name."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME)]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


class Stay(SingleDeviceStrategy):
    """Weights stay there after the last step: without values they cannot come back."""

    def teardown(self) -> None: ...


class AllSteps(Exception):
    """Raised behind the last step: when a run ends it reads what it has not read yet."""


class UntilEnd(Callback):
    def on_train_end(self, *rest: Any) -> None:
        raise AllSteps


class Stream:
    """Batches of unknown number, as Lightning reads the number of batches back from the device.

    Args:
        batches: in order.
    """

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def steps_of(stage: dict[str, Any], options: dict[str, Any], text: str) -> dict[str, Any]:
    """An optimizer step that nobody logs."""
    plain = tiny_model(pre={"depth": 1}, post={"depth": 1})
    model = NEO(plain.patch_embedding, plain.pre_buffer, plain.post_llm, text=text)
    set_backend(model, "eager")
    batches = [random_batch(model.input_spec, seed)[0] for seed in range(2)]
    trainer = lightning.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        strategy=Stay(NAME, accelerator=Own()), log_every_n_steps=1000,
        callbacks=[History(), LineProgress("steps"), UntilEnd()],
        **options,
    )  # fmt: skip
    module = NEOTraining(model, StageConfig(**{"steps": 1, "lr": 1e-2} | stage))
    with contextlib.suppress(AllSteps):
        trainer.fit(module, Stream(batches))
    state = [x for held in trainer.optimizers[0].state.values() for x in held.values() if isinstance(x, torch.Tensor)]
    return {
        "steps": trainer.global_step,
        "weights": sorted({p.device.type for p in model.parameters()}),
        "state": sorted({x.device.type for x in state if x.dim()}),
        "loss": module.step_loss.device.type if module.step_loss is not None else "",
    }


if __name__ == "__main__":
    own_device(NAME)
    found = {}
    for name in sys.argv[1:]:
        with fake_device(NAME):
            found[name] = steps_of(*CASES[name])
    print(json.dumps(found))

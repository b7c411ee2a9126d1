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
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "stage 1": ({"train": ("patch_embedding", "pre_buffer", "post_llm.hw")}, {"gradient_clip_val": 1.0}, {}),
    "stage 2": ({"train": ("all",)}, {"accumulate_grad_batches": 2}, {}),
    "stage 3, bypass": ({"train": ("all",), "activation_checkpointing": 0.5}, {}, {"text": "bypass"}),
    "lora": ({"train": ("pre_buffer",), "lora": LoRA(rank=2)}, {}, {}),
    "muon": ({"train": ("all",), "optimizer": "muon"}, {}, {}),
    "bfloat16": ({"train": ("all",)}, {"precision": "bf16-mixed"}, {}),
}
"""Arguments of the stage, of the trainer and of the model."""


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


def steps_of(stage: dict[str, Any], options: dict[str, Any], kind: dict[str, Any]) -> dict[str, Any]:
    """Two optimizer steps that nobody logs."""
    plain = tiny_model(**{name: value for name, value in kind.items() if name != "text"})
    model = NEO(plain.patch_embedding, plain.pre_buffer, plain.post_llm, text=kind.get("text", "shared"))
    set_backend(model, "eager")
    batches = [random_batch(model.input_spec, seed)[0] for seed in range(4)]
    trainer = lightning.Trainer(
        max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        strategy=Stay(NAME, accelerator=Own()), log_every_n_steps=1000,
        callbacks=[History(), LineProgress("steps"), UntilEnd()],
        **options,
    )  # fmt: skip
    module = NEOTraining(model, StageConfig(**{"steps": 2, "lr": 1e-2} | stage))
    with contextlib.suppress(AllSteps):
        trainer.fit(module, Stream(batches))
    state = [x for held in trainer.optimizers[0].state.values() for x in held.values() if isinstance(x, torch.Tensor)]
    return {
        "steps": trainer.global_step,
        "weights": sorted({p.device.type for p in model.parameters()}),
        "state": sorted({x.device.type for x in state if x.dim()}),
        "loss": str(module.step_loss.device) if module.step_loss is not None else "",
    }


if __name__ == "__main__":
    own_device(NAME)
    found = {}
    for name in sys.argv[1:]:
        with fake_device(NAME):
            found[name] = steps_of(*CASES[name])
    print(json.dumps(found))

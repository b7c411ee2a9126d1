"""On a GPU: a run of each stage, steps that never wait for the device, and a resumed run.

``--gpu-device cpu`` runs the same tests on a CPU, where the operations that would wait for a device are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from builders import set_backend
from host_reads import HostReads
from lightning.pytorch.callbacks import Callback
from run_builders import pretraining, recipe_file, small_world, started

from neo_components import load_recipe
from neo_components.data import NEODataModule
from neo_components.recipe import build
from neo_components.recipe.stage import StageConfig
from neo_components.training.callbacks.performance import Performance
from neo_components.training.callbacks.progress import History
from neo_components.training.groups import train_only
from neo_components.training.module import NEOTraining
from neo_components.training.run import RunResult, train

pytestmark = pytest.mark.gpu

STAGE_1 = ("patch_embedding", "pre_buffer", "post_llm.hw")
TOLERANCE = {"32-true": 1e-3, "bf16-mixed": 2e-2}
"""Relative, of each loss of a run of six steps beside the same run in float32 on a CPU."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("gpu"))


def run(path: Path, device: str, *overrides: str, resume: str | Path | None = None) -> RunResult:
    """A run of a recipe on one device, without validation."""
    where = [f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}", "trainer.devices=1"]
    return train(load_recipe(path, [*where, "stage.validate_every=0", *overrides]), resume=resume)


def losses_of(result: RunResult) -> list[float]:
    return [loss for _, _, loss in result.losses]


def stage_file(root: Path, stage: str, before: RunResult | None) -> tuple[Path, list[str]]:
    """The recipe of a stage, from scratch or from the model of the stage before, and what it trains."""
    if before is None:
        return pretraining(root, stage), list(STAGE_1)
    more = f"name: {stage}, train: [all], lr: 1.0e-3"
    return recipe_file(root, stage, f"{{from_pretrained: {before.folder}}}", more), ["all"]


@pytest.mark.parametrize(
    ("precision", "stages"),
    [
        pytest.param("32-true", ("pretrain",), id="float32"),
        pytest.param("bf16-mixed", ("pretrain", "midtrain", "sft"), id="bfloat16"),
    ],
)
def test_each_stage(root: Path, precision: str, stages: tuple[str, ...], gpu_device: torch.device) -> None:
    """One stage behind the other: the losses of the same run in float32 on a CPU; frozen weights stay bit-equal, the
    others move and are finite."""
    before: RunResult | None = None
    for stage in stages:
        path, groups = stage_file(root, stage, before)
        exact = run(path, "cpu", f"output={root}/exact-{stage}")
        result = run(path, gpu_device.type, f"trainer.precision={precision}")
        assert losses_of(result) == pytest.approx(losses_of(exact), rel=TOLERANCE[precision])
        first, after = started(path), dict(result.model.named_parameters())
        trainable = {id(weight) for weight in train_only(first, groups)}
        for name, old in first.named_parameters():
            new = after[name].detach().cpu()
            assert bool(new.isfinite().all()), name
            assert torch.equal(old, new) == (id(old) not in trainable), f"{stage}: {name}"
        before = result


def test_a_resumed_run_goes_on_as_the_first(root: Path, gpu_device: torch.device) -> None:
    """Within what the order of atomic additions changes: on a CPU nothing, and there the losses are equal."""
    path = pretraining(root, "whole")
    whole = run(path, gpu_device.type)
    resumed = run(path, gpu_device.type, resume=root / "whole" / "checkpoints" / "step-000003.ckpt")
    assert [step for step, _, _ in resumed.losses] == [4, 5, 6]
    expected = losses_of(whole)[3:]
    assert losses_of(resumed) == (expected if gpu_device.type == "cpu" else pytest.approx(expected, rel=1e-3))


# --- no step waits for the device


EVERY = 4
"""Steps between two entries of the log."""


class Waits:
    """Stretches in which nothing may wait for a device: on a GPU what does is an error where it happens, on a CPU it is
    collected in ``found``."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.found: list[tuple[str, str]] = []

    def begin(self) -> None:
        """Starts a stretch."""
        if self.cuda:
            torch.cuda.set_sync_debug_mode("error")
        else:
            self.reads = HostReads()
            self.reads.__enter__()

    def end(self) -> None:
        """Ends it."""
        if self.cuda:
            torch.cuda.set_sync_debug_mode("default")
        else:
            self.reads.__exit__(None, None, None)
            self.found += self.reads.found


class Guard(Callback):
    """Calls one of two functions at the start or at the end of the batches of all steps that log nothing, the first one
    left out, in which kernels are compiled and states allocated."""

    def __init__(self, enter: Callable[[], None] | None = None, leave: Callable[[], None] | None = None) -> None:
        self.enter, self.leave, self.steps = enter, leave, []
        self.current = 0

    def guarded(self) -> bool:
        return self.current > 0 and (self.current + 1) % EVERY != 0

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Begins."""
        self.current = trainer.global_step
        if self.enter and self.guarded():
            self.steps.append(self.current)
            self.enter()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Ends."""
        if self.leave and self.guarded():
            self.leave()


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("train_groups", [STAGE_1, ("all",)], ids=["stage-1", "stage-3"])
def test_no_step_waits_for_the_device(root: Path, precision: Any, train_groups: Any, gpu_device: torch.device) -> None:
    """Forward, backward, clipping and optimizer step of NEOTraining under Lightning's Trainer, with the callbacks that
    observe each step of a run: whatever waits for the device raises an error."""
    recipe = load_recipe(pretraining(root, "waits"))
    model = build(recipe.model)
    data = NEODataModule(**recipe.data)
    data.input_spec = model.input_spec
    module = NEOTraining(model, StageConfig(train=train_groups, steps=10, lr=1e-4, log_every=EVERY))
    waits = Waits(gpu_device)
    begin, end = Guard(enter=waits.begin), Guard(leave=waits.end)
    observed = [begin, History(), Performance(), end]
    if not waits.cuda:  # the backend of a CPU reads lengths, and Performance the ids that a batch keeps on the CPU
        set_backend(model, "eager")
        observed = [begin, History(), end, Performance()]
    trainer = lightning.Trainer(
        accelerator="gpu" if gpu_device.type == "cuda" else "cpu", devices=1, precision=precision, max_steps=10,
        gradient_clip_val=1.0, log_every_n_steps=EVERY, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=observed,
    )  # fmt: skip
    try:
        trainer.fit(module, datamodule=data)
    finally:
        if gpu_device.type == "cuda":
            waits.end()
    assert not waits.found, sorted(set(waits.found))
    assert begin.steps == [1, 2, 4, 5, 6, 8, 9]
    assert trainer.global_step == 10


def test_what_waits_is_noticed(gpu_device: torch.device) -> None:
    """The test above can fail: each of these is noticed."""
    x = torch.arange(4, device=gpu_device)
    reads: list[Callable[[], Any]] = [x.sum().item, x.nonzero, lambda: x[x > 1], lambda: bool((x > 1).all()), x.unique]
    for number, read in enumerate(reads):
        waits = Waits(gpu_device)
        waits.begin()
        try:
            if waits.cuda:
                with pytest.raises(RuntimeError, match="synchroniz"):
                    read()
            else:
                read()
        finally:
            waits.end()
        assert waits.cuda or waits.found, number

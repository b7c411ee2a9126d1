"""A step that is not finite changes nothing; checkpoints are whole; divided steps have the gradient of whole ones."""

from __future__ import annotations

import copy
import resource
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from builders import random_sample, tiny_model
from torch.utils.data import DataLoader

from neo_components import NEO, Batch, InputSpec, pack
from neo_components.recipe.stage import StageConfig
from neo_components.training.checkpoints import AtomicCheckpointIO, read_checkpoint
from neo_components.training.module import NEOTraining


def rows(spec: InputSpec, count: int, documents: int = 2) -> list[Batch]:
    """Rows of very different numbers of labels."""
    made = []
    for row in range(count):
        samples = [
            random_sample(spec, 100 * (row + 1) + n, images=n, text=(2 + 5 * row, 4 + 9 * row))
            for n in range(documents)
        ]
        made.append(pack(samples, spec, seq_len=160))
    return made


def poisoned(batch: Batch) -> Batch:
    batch = copy.deepcopy(batch)
    batch.patches[0, 0] = float("nan")
    return batch


def fit(model: NEO, batches: list[Batch], **options: Any) -> NEOTraining:
    stage = StageConfig(**{"train": ("all",), "steps": len(batches), "lr": 1e-2} | options.pop("stage", {}))
    module = NEOTraining(model, stage)
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, gradient_clip_val=1.0, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module


def test_a_step_that_is_not_finite_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Weights and moments are those of a run that never saw the batch; the log names its samples."""
    with_it, without = tiny_model(), tiny_model()
    first, bad, last = rows(with_it.input_spec, 3)
    constant: dict[str, Any] = {"min_lr_ratio": 1.0}
    module = fit(with_it, [first, poisoned(bad), last], stage=constant)
    other = fit(without, [first, last], stage=constant)
    for (name, a), b in zip(with_it.named_parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b), name
    moments, others = (m.trainer.optimizers[0].state_dict()["state"] for m in (module, other))
    assert all(torch.equal(moments[n][key], others[n][key]) for n in others for key in others[n])
    assert module.skipped_steps == 1
    assert "step skipped: loss nan" in caplog.text
    assert all(key in caplog.text for key in bad.keys[0])
    assert not any(key in caplog.text for key in first.keys[0])


def test_too_many_in_a_row_stop_the_run() -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    batches = [poisoned(row) for row in rows(model.input_spec, 4)]
    with pytest.raises(ValueError, match=r"3 steps in a row were not finite \(stage.max_skipped_steps\)"):
        fit(model, batches, stage={"max_skipped_steps": 3})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    good = rows(model.input_spec, 4)
    module = fit(model, [batches[0], good[0], batches[1], good[1]], stage={"max_skipped_steps": 2})
    assert module.skipped_steps == 2


def test_accumulated_batches_equal_one_whole() -> None:
    """Whatever the numbers of labels: the loss and the step are those of all rows in one batch."""
    whole, parts = tiny_model(), tiny_model()
    made = rows(whole.input_spec, 4)
    labels = [int((row.labels >= 0).sum()) for row in made]
    assert max(labels) > 3 * min(labels)
    a = fit(whole, [Batch.stack(made)])
    b = fit(parts, made, accumulate_grad_batches=4)
    assert a.trainer.global_step == b.trainer.global_step == 1
    for name in ("train/loss", "train/grad_norm"):
        assert float(a.trainer.callback_metrics[name]) == pytest.approx(
            float(b.trainer.callback_metrics[name]), rel=1e-5
        )
    moments = [m.trainer.optimizers[0].state_dict()["state"] for m in (a, b)]
    for n, state in moments[0].items():
        assert torch.allclose(state["exp_avg"], moments[1][n]["exp_avg"], atol=1e-7, rtol=1e-4)


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    """The limit of this process's files stands for the disk's."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1, "state_dict": {"a": torch.ones(3)}}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written .* earlier checkpoints are unchanged: free space"):
            AtomicCheckpointIO().save_checkpoint({"global_step": 2, "state_dict": {"a": torch.ones(2**16)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert read_checkpoint(path)["global_step"] == 1

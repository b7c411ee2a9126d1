"""A stage trains what it names and nothing else, resumes exactly, and leaves a folder that works."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import time
import zipfile
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from PIL import Image
from run_builders import MUON, picture, pretraining, recipe_file, small_world, started

from neo_components import load_recipe
from neo_components.data import load_image
from neo_components.model.chat import Chat
from neo_components.recipe.stage import StageConfig
from neo_components.training.groups import train_only
from neo_components.training.module import lr_factor
from neo_components.training.optimizers import Joined, build_optimizer
from neo_components.training.run import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("groups", [["patch_embedding", "pre_buffer", "post_llm.hw"], ["all"], ["post_llm.head"]])
@pytest.mark.parametrize("more", ["", MUON], ids=["adamw", "muon"])
def test_frozen_stay_bit_equal_and_trainable_move(root: Path, groups: list[str], more: str) -> None:
    path = pretraining(root, "-".join(groups), "[" + ", ".join(groups) + "]", more)
    before = started(path)
    trainable = {id(p) for p in train_only(before, groups)}
    result = train(load_recipe(path))
    after = dict(result.model.named_parameters())
    for name, old in before.named_parameters():
        if id(old) in trainable:
            assert not torch.equal(old, after[name]), f"{name} did not move"
        else:
            assert torch.equal(old, after[name]), f"{name} moved though frozen"


def test_next_stage_starts_from_the_saved_model_and_trains_all(root: Path) -> None:
    first = train(load_recipe(pretraining(root, "first")))
    path = recipe_file(root, "second", f"{{from_pretrained: {first.folder}}}", "name: second, train: [all], lr: 1.0e-3")
    assert all(torch.equal(a, b) for a, b in zip(started(path).parameters(), first.model.parameters(), strict=True))
    second = train(load_recipe(path))
    stages = json.loads((second.folder / "provenance.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["first", "second"]
    assert stages[1]["trained"] == ["all"] and stages[1]["steps"] == 6
    chat = Chat.from_pretrained(second.folder)
    assert (chat.min_pixels, chat.max_pixels) == (4096, 4096)
    assert isinstance(chat.ask("what color?", [picture("red", 0)], max_new_tokens=4), str)


def test_same_recipe_and_seed_give_the_same_run(root: Path) -> None:
    one, two = train(load_recipe(pretraining(root, "same"))), train(load_recipe(pretraining(root, "same")))
    assert [loss for _, _, loss in one.losses] == [loss for _, _, loss in two.losses]
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


@pytest.mark.parametrize("more", ["", MUON + ", whiten_patches: 2000"], ids=["adamw", "muon, whitened"])
def test_resume_equals_an_uninterrupted_run(root: Path, more: str) -> None:
    recipe = load_recipe(pretraining(root, "whole", more=more))
    whole = train(recipe)
    resumed = train(recipe, resume=root / "whole" / "checkpoints" / "step-000003.ckpt")
    assert [loss for step, _, loss in whole.losses if step > 3] == [loss for _, _, loss in resumed.losses]
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_what_a_run_leaves(root: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(load_recipe(pretraining(root, "left")))
    folder = root / "left"
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last.ckpt", "step-000003.ckpt", "step-000006.ckpt"}
    assert load_recipe(folder / "recipe.yaml").stage == load_recipe(root / "left.yaml").stage
    events = EventAccumulator(str(folder / "logs"), size_guidance={"images": 0})
    events.Reload()
    wanted = {
        "train/loss",
        "lr/adamw",
        "train/grad_norm",
        "perf/tokens_per_s",
        "perf/images_per_s",
        "perf/packing_efficiency",
    }
    assert wanted | {"val/loss", "val/exact_match"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("val/answers")] == [3, 6]
    assert [step for step, _, _ in result.scores] == [3, 6]
    assert len(events.Scalars("train/loss")) == 6


def terminate_after(steps: int, log: Path) -> Thread:
    """Sends this process SIGTERM when the log has that many entries, wherever the run is then."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if log.is_file() and len(log.read_text().splitlines()) > steps:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.01)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    return thread


def states(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_sigterm_saves_and_the_resumed_run_equals_an_uninterrupted_one(root: Path) -> None:
    """Weights, optimizer, schedule and position in the data, after a stop at whatever step the signal meets."""
    steps = ["stage.steps=60", "stage.validate_every=0", "stage.checkpoint_every=60"]
    uninterrupted = train(load_recipe(pretraining(root, "unstopped"), steps))
    recipe = load_recipe(pretraining(root, "stopped"), steps)
    sender = terminate_after(4, root / "stopped" / "logs" / "metrics.csv")
    with pytest.raises(SystemExit) as stop:
        train(recipe)
    sender.join()
    assert stop.value.code == 143
    done = states(root / "stopped")["global_step"]
    assert 0 < done < 60
    resumed = train(recipe, resume="last")
    assert [loss for step, _, loss in uninterrupted.losses if step > done] == [loss for _, _, loss in resumed.losses]
    a, b = states(root / "unstopped"), states(root / "stopped")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "NEODataModule"):
        assert same(a[part], b[part]), part


def test_behind_a_run_signals_do_what_they_did_before(root: Path) -> None:
    """A process that goes on after its training, as ``neo pretrained make`` does, still ends by SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        train(load_recipe(pretraining(root, "heeds signals"), ["stage.steps=1", "stage.validate_every=0"]))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_damaged_checkpoint_is_passed_over(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = load_recipe(pretraining(root, "damaged"))
    whole = train(recipe)
    folder = root / "damaged" / "checkpoints"
    for name, change in (("last.ckpt", lambda data: data[: len(data) // 2]), ("step-000006.ckpt", flipped)):
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    resumed = train(recipe, resume="last")
    assert "last.ckpt is no checkpoint" in caplog.text and "step-000006.ckpt is no checkpoint" in caplog.text
    assert [step for step, _, _ in resumed.losses] == [4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    for file in folder.iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"checkpoints in .* are damaged; start without --resume"):
        train(recipe, resume="last")


def flipped(data: bytes) -> bytes:
    """One bit in the middle of the largest tensor turned."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    name, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
    middle = entry.header_offset + 30 + name + extra + entry.file_size // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def test_resume_without_a_checkpoint_says_so(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="start without --resume"):
        train(load_recipe(pretraining(root, "none")), resume="last")


def test_schedule_warms_up_and_ends_at_the_floor() -> None:
    stage = StageConfig(train=["all"], steps=100, lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    factors = [lr_factor(step, stage) for step in range(101)]
    assert factors[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_unknown_group_names_the_nearest(root: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean 'post_llm\.hw'"):
        train_only(started(pretraining(root, "groups")), ["post_llm.hv"])


def test_muon_takes_the_matrices_of_linear_layers_and_adamw_the_rest(root: Path) -> None:
    model = started(pretraining(root, "muon"))
    stage = StageConfig(train=["all"], optimizer="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.1)
    train_only(model, stage.train)
    optimizer = build_optimizer(model, stage)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, decayed, kept = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert {"pre_buffer.patch_embedding.patch_proj.weight", "post_llm.layers.0.self_attn.k_proj_hw.weight"} <= muon
    assert decayed == {"pre_buffer.boundary", "post_llm.word_embedding.weight"}
    assert muon | decayed | kept == set(names.values())
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 1e-3, 1e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_joined_optimizers_step_as_each_alone() -> None:
    torch.manual_seed(0)
    grads = [(torch.randn(6, 4), torch.randn(4)) for _ in range(5)]

    def parameters() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        torch.manual_seed(1)
        return torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(4))

    (a, b), (c, d) = parameters(), parameters()
    alone = [torch.optim.Muon([a], lr=0.1), torch.optim.AdamW([b], lr=0.1)]
    joined = Joined(torch.optim.Muon([c], lr=0.1), torch.optim.AdamW([d], lr=0.1))
    for step, (x, y) in enumerate(grads):
        a.grad, b.grad, c.grad, d.grad = x.clone(), y.clone(), x.clone(), y.clone()
        for optimizer in alone:
            optimizer.step()
        if step == 2:  # a checkpoint in between
            saved = io.BytesIO()
            torch.save(joined.state_dict(), saved)
            saved.seek(0)
            joined = Joined(torch.optim.Muon([c], lr=9.0), torch.optim.AdamW([d], lr=9.0))
            joined.load_state_dict(torch.load(saved, weights_only=True))
        joined.step()
    assert torch.equal(a, c) and torch.equal(b, d)


def test_a_new_patch_embedding_is_whitened_by_the_training_images(root: Path) -> None:
    means = {}
    for name, more in (("plain", ", lr: 0.0"), ("white", ", lr: 0.0, whiten_patches: 2000")):
        layer = train(load_recipe(pretraining(root, name, more=more))).model.patch_embedding
        pixels = load_image(Image.open(io.BytesIO(picture("red", 0))), min_pixels=4096, max_pixels=4096)
        patches = torch.nn.functional.unfold(pixels[None], 16, stride=16)[0].T
        means[name] = float(layer.patch_proj(patches).mean(0).abs().mean())
    assert means["white"] < 0.5 < 1.0 < means["plain"]  # on white paper all patches are nearly the same number

"""What a run tells of itself is true: losses by part, speed, drift, text perplexity, files and the summary."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import random_sample, tiny_model
from commands import good
from run_builders import MUON, pretraining, recipe_file, small_world, started
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_faults import fit, rows

from neo_components import NEO, Batch, PatchEmbedding, Sample, load_recipe, pack
from neo_components.data import Source
from neo_components.data.module import NEODataModule
from neo_components.data.plan.mixture import source_names
from neo_components.errors import UnknownFlopsError
from neo_components.estimate.flops import step_flops
from neo_components.training.callbacks import progress as callbacks
from neo_components.training.callbacks.drift import SAMPLED, Drift, samples
from neo_components.training.callbacks.loss_parts import LossParts
from neo_components.training.callbacks.performance import Performance, peak_flops
from neo_components.training.callbacks.summary import Summary
from neo_components.training.run import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("run"))


# --- losses by source and by modality


def mixed_batch(model: NEO) -> Batch:
    """Two rows of documents without, with one and with two images, of two sources and of an unknown one."""
    made = []
    for row in range(2):
        documents = []
        for number, (images, source) in enumerate([(0, "text"), (1, "talk"), (2, "talk"), (1, "other")][row:]):
            sample = random_sample(model.input_spec, 10 * row + number, images=images)
            sample.source = source
            documents.append(sample)
        made.append(pack(documents, model.input_spec, seq_len=160))
    return Batch.stack(made)


def sums_by_hand(model: NEO, batch: Batch) -> dict[str, list[float]]:
    """Sum of weighted losses and of weights of each source and modality, token by token from the whole logits."""
    with torch.no_grad():
        logs = model(batch).logits.float().log_softmax(-1)
    found: dict[str, list[float]] = {}
    for row in range(len(batch.labels)):
        for place in range(1, batch.labels.shape[1]):
            label, document = int(batch.labels[row, place]), int(batch.document_ids[row, place])
            if label >= 0:
                weight = float(batch.loss_weights[row, place])
                loss = -float(logs[row, place - 1, label])
                shown = ("text", "image", "images")[batch.image_counts[row][document]]
                for name in (f"loss_by_source/{batch.sources[row][document]}", f"loss_by_modality/{shown}"):
                    total = found.setdefault(name, [0.0, 0.0])
                    total[0] += weight * loss
                    total[1] += weight
    return found


def test_losses_by_source_and_modality_are_those_of_their_tokens() -> None:
    model = tiny_model()
    batch, parts, nll = mixed_batch(model), LossParts(["text", "talk", "silent"]), []  # type: ignore[var-annotated]
    with torch.no_grad():
        loss = model.loss(batch, nll)
    parts.add(batch, nll[0])
    found = parts.take(loss.device, lambda sums: sums)
    expected = sums_by_hand(model, batch)
    unknown = expected.pop("loss_by_source/other")
    assert unknown[1] > 0
    assert found == pytest.approx({name: total / weight for name, (total, weight) in expected.items()}, abs=1e-5)
    whole = [sum(column) for column in zip(*(v for n, v in expected.items() if "modality" in n), strict=True)]
    assert float(loss) == pytest.approx(whole[0] / whole[1], abs=1e-5)
    assert parts.take(loss.device, lambda sums: sums) == {}


def test_losses_by_part_do_not_depend_on_how_a_step_is_divided() -> None:
    """They are means over all tokens since the last entry, of steps put together from batches as of whole ones."""
    found = []
    for batches, accumulate in ((lambda made: [Batch.stack(made)], 1), (lambda made: made, 4)):
        model = tiny_model()
        made = [mixed_batch(model), *(Batch.stack(rows(model.input_spec, 2)) for _ in range(3))]
        module = fit(model, batches(made), accumulate_grad_batches=accumulate, log_every_n_steps=1)
        found.append(module.losses_by_part)
    assert found[0].keys() == {f"loss_by_modality/{name}" for name in ("text", "image", "images")}
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_short_names_of_sources() -> None:
    def names(*folders: str) -> list[str]:
        return source_names([Source(folder) for folder in folders])

    assert names("/data/a", "s3://bucket/b/") == ["a", "b"]
    assert names("/data/a/train", "/data/b/train", "/data/c") == ["a/train", "b/train", "c"]
    assert names("/data/a", "/data/a", "a") == ["data/a", "data/a", "a"]


def test_batches_name_the_sources_of_their_samples(root: Path) -> None:
    data = NEODataModule(
        str(root / "llm"), [Source(str(root / "train")), Source(str(root / "text"))], seq_len=256, workers=0,
        min_pixels=4096, max_pixels=4096,
    )  # fmt: skip
    data.input_spec = started(pretraining(root, "names")).input_spec
    seen = set()
    for _, batch in zip(range(4), data.train_dataloader(), strict=False):
        for keys, sources, counts in zip(batch.keys, batch.sources, batch.image_counts, strict=True):
            seen |= {(key.rstrip("0123456789"), s, n) for key, s, n in zip(keys, sources, counts, strict=True)}
    assert seen == {("train", "train", 1), ("text", "text", 0)}


# --- a run


TEXT = "\n  text_validation: [{{shards: {root}/text}}]"


def watched(root: Path, name: str, more: str = ", lr: 1.0e-2") -> Path:
    """A recipe whose language model is watched on text."""
    path = pretraining(root, name, "[all]", more)
    text = path.read_text()
    path.write_text(text.replace("\n  seq_len", TEXT.format(root=root) + "\n  seq_len"))
    return path


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def figures(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    with (folder / "logs" / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def test_everything_is_logged_to_tensorboard_and_csv(root: Path) -> None:
    result = train(load_recipe(watched(root, "told", MUON)))
    board, table = scalars(root / "told"), figures(root / "told")
    groups = [
        "patch_embedding",
        "pre_buffer",
        "post_llm",
        "post_llm.hw",
        "post_llm.blocks",
        "post_llm.word_embedding",
        "post_llm.head",
    ]
    wanted = {
        "train/loss", "train/grad_norm", "train/skipped_steps", "lr/adamw", "lr/muon",
        "loss_by_source/train", "loss_by_source/text", "loss_by_modality/text", "loss_by_modality/image",
        "perf/tokens_per_s", "perf/images_per_s", "perf/packing_efficiency", "perf/data_wait", "perf/tflops",
        "memory/process_gb", "data/skipped",
        "visual/norm", "visual/mean_share", "visual/effective_rank", "words/norm",
        "val/loss", "val/exact_match", "val/text_perplexity", "val/text_perplexity_of_llm",
        *(f"grad_norm/{group}" for group in groups), *(f"drift/{group}" for group in groups),
    }  # fmt: skip
    assert set(board) - {"epoch"} == wanted == set(table)
    for name in wanted:
        assert [step for step, _ in board[name]] == [step for step, _ in table[name]], name
        assert [v for _, v in board[name]] == pytest.approx([v for _, v in table[name]], rel=1e-6), name
    assert_the_reference_names(wanted)
    assert len(board["train/loss"]) == 6 and len(board["val/text_perplexity"]) == 3
    assert [value for _, value in board["data/skipped"]] == [0.0] * 6
    assert all(0 < value <= 1 for _, value in board["perf/packing_efficiency"])
    assert result.summary.metrics["val/text_perplexity"] == pytest.approx(board["val/text_perplexity"][-1][1], rel=1e-5)


def assert_the_reference_names(logged: set[str]) -> None:
    """Every value that is logged, and no other but those of a GPU, of several images and of skipped samples."""
    page = (Path(__file__).parent.parent / "docs" / "reference" / "logged_values.md").read_text(encoding="utf-8")
    named: set[str] = set()
    for line in page.splitlines():
        if re.match(r"\| `\w+/", line):
            words = re.findall("`([^`]+)`", line.split("|")[1])
            named |= {word if not word.startswith("/") else words[0].split("/")[0] + word for word in words}
    patterns = {name: re.sub("GROUP|NAME|REASON", "[a-z_.]+", name) for name in named}
    assert [name for name in logged if not any(re.fullmatch(p, name) for p in patterns.values())] == []
    rest = {name for name, p in patterns.items() if not any(re.fullmatch(p, seen) for seen in logged)}
    assert rest == {
        "loss_by_modality/images", "perf/mfu", "memory/device_gb", "data/skipped_REASON", "val/answers"
    }  # fmt: skip


def text_perplexity(root: Path, model: NEO) -> float:
    """By hand, from the logits of each sample of the text shards alone."""
    data = NEODataModule(str(root / "llm"), [], [Source(str(root / "text"))], seq_len=64, micro_batch_size=1, workers=0)
    data.input_spec = model.input_spec
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            logs = model(batch).logits.log_softmax(-1)[:, :-1]
            labels = batch.labels[:, 1:]
            learnt = labels >= 0
            total -= float(logs[learnt].gather(1, labels[learnt][:, None]).sum())
            count += int(learnt.sum())
    return math.exp(total / count)


def test_text_perplexity_before_after_and_of_the_language_model_alone(root: Path) -> None:
    path = watched(root, "read")
    before = started(path)
    result = train(load_recipe(path))
    summary = result.summary
    assert summary.before["val/text_perplexity"] == pytest.approx(text_perplexity(root, before), rel=1e-4)
    assert summary.metrics["val/text_perplexity"] == pytest.approx(text_perplexity(root, result.model), rel=1e-4)
    alone = before.post_llm
    total, count = 0.0, 0
    data = NEODataModule(str(root / "llm"), [], [Source(str(root / "text"))], seq_len=64, workers=0)
    data.input_spec = before.input_spec
    for batch in data.val_dataloader():
        for number in range(int(batch.document_ids.max()) + 1):
            mine = batch.document_ids[0] == number
            ids, labels = batch.token_ids[0][mine], batch.labels[0][mine]
            with torch.no_grad():
                logs = alone.text_logits(ids[None])[0].log_softmax(-1)
            for place in (labels >= 0).nonzero()[:, 0].tolist():
                total -= float(logs[place - 1, labels[place]])
                count += 1
    assert summary.before["val/text_perplexity_of_llm"] == pytest.approx(math.exp(total / count), rel=1e-4)
    second = recipe_file(root, "later", f"{{from_pretrained: {result.folder}}}", "train: [post_llm.head]")
    second.write_text(second.read_text().replace("\n  seq_len", TEXT.format(root=root) + "\n  seq_len"))
    later = train(load_recipe(second)).summary.before
    assert set(later) == {"val/text_perplexity"}
    assert later["val/text_perplexity"] == pytest.approx(summary.metrics["val/text_perplexity"], rel=1e-4)


def test_held_out_text_alone_is_a_validation_and_has_no_images(root: Path) -> None:
    path = watched(root, "only")
    path.write_text(path.read_text().replace(f"  validation: [{{shards: {root}/validation}}]\n", ""))
    result = train(load_recipe(path))
    assert "val/loss" not in result.metrics and "val/text_perplexity" in result.metrics
    with pytest.raises(ValueError, match=r"data.text_validation holds text alone, but .*train has samples with images"):
        train(load_recipe(path, [f"data.text_validation.0.shards={root}/train"]))


def test_a_resumed_run_goes_on_telling(root: Path) -> None:
    """Tokens, drift and the CSV file are those of the uninterrupted run; entries behind the checkpoint are new."""
    recipe = load_recipe(watched(root, "whole"))
    whole = train(recipe)
    told = figures(root / "whole")
    resumed = train(recipe, resume=root / "whole" / "checkpoints" / "step-000003.ckpt")
    again = figures(root / "whole")
    same = [n for n in told if not n.startswith(("perf/tok", "perf/im", "perf/data", "perf/tf", "memory"))]
    assert {name: told[name] for name in same} == {name: again[name] for name in same}
    assert again.keys() == told.keys() and len(told["train/loss"]) == 6
    for name in ("steps", "tokens", "images", "before"):
        assert getattr(resumed.summary, name) == getattr(whole.summary, name), name
    assert [step for step, _, _ in resumed.summary.losses] == [4, 5, 6]


def test_speed_counts_tokens_images_and_flops_over_the_time_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is read twice a batch; here each reading is a second after the one before."""
    seconds = iter(range(1, 1000))
    monkeypatch.setattr("neo_components.training.callbacks.performance.time.perf_counter", lambda: float(next(seconds)))
    model = tiny_model()
    made = rows(model.input_spec, 4)
    for row in made:
        row.document_ids = torch.where(torch.arange(160) < 150, row.document_ids, -1)
    module = fit(model, made, accumulate_grad_batches=2, log_every_n_steps=2, callbacks=[Performance()])
    metrics = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    # start, end, and once more behind the callback: each batch takes 1 s, and the next one begins 1 s later.
    tokens, flops = (
        sum(int((row.document_ids >= 0).sum()) for row in made),
        sum(part.model for row in made for part in step_flops(model, row).values()),
    )
    assert metrics["perf/tokens_per_s"] == pytest.approx(tokens / 7)
    assert metrics["perf/images_per_s"] == pytest.approx(4 / 7)
    assert metrics["perf/data_wait"] == pytest.approx(3 / 7)
    assert metrics["perf/packing_efficiency"] == pytest.approx(tokens / (4 * 160))
    assert metrics["perf/tflops"] == pytest.approx(flops / 7 / 1e12)
    assert "perf/mfu" not in metrics


def test_a_part_whose_flops_are_unknown_trains_without_that_figure(caplog: pytest.LogCaptureFixture) -> None:
    class Depthwise(PatchEmbedding):
        def products(self, image_grids: torch.Tensor) -> Any:
            raise UnknownFlopsError("the FLOPs of a Depthwise are not known")

    model = tiny_model()
    model.patch_embedding.__class__ = Depthwise
    module = fit(model, rows(model.input_spec, 2), log_every_n_steps=1, callbacks=[Performance()])
    assert {"perf/tokens_per_s", "perf/data_wait"} <= {*module.trainer.callback_metrics}
    assert not {"perf/tflops", "perf/mfu"} & {*module.trainer.callback_metrics}
    told = [record.getMessage() for record in caplog.records if "perf/tflops" in record.getMessage()]
    assert told == ["perf/tflops and perf/mfu are not logged: the FLOPs of a Depthwise are not known"]


def test_peaks_are_of_known_devices_and_half_precision() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16-mixed") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16-true") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "16-mixed") == 312e12
    assert peak_flops("NVIDIA A10", "bf16-mixed") == 125e12
    assert peak_flops("NVIDIA L4", "bf16-mixed") == 121e12 and peak_flops("NVIDIA L40S", "bf16-mixed") == 362e12
    for name, precision in (("NVIDIA A10G", "bf16-mixed"), ("", "bf16-mixed"), ("NVIDIA H200", "32-true")):
        assert peak_flops(name, precision) is None


def test_drift_is_the_relative_distance_from_the_start() -> None:
    """Exact for tensors of up to 4,096 weights; a sample of a larger one stands for the whole."""
    model = tiny_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    drift = Drift(every=1, last=3)
    module = fit(model, rows(model.input_spec, 3), callbacks=[drift])
    names = {id(p): name for name, p in model.named_parameters()}
    for group, parameters in model.groups().items():
        old = torch.cat([start[names[id(p)]].flatten() for p in parameters])
        new = torch.cat([p.detach().flatten() for p in parameters])
        largest = max(p.numel() for p in parameters)
        exact = float((new - old).norm() / old.norm())
        assert drift.values[f"drift/{group}"] == pytest.approx(exact, rel=1e-4 if largest <= SAMPLED else 0.1), group
        assert 0 < exact < 1
    assert all(len(sample) <= SAMPLED for sample in samples(module).values())


def test_predictions_are_those_of_the_averaged_weights(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, torch.Tensor]] = []
    usual = callbacks.evaluate

    def seen(model: NEO, *rest: Any, **options: Any) -> Any:
        asked.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return usual(model, *rest, **options)

    monkeypatch.setattr(callbacks, "evaluate", seen)
    result = train(load_recipe(pretraining(root, "averaged", more=", lr: 1.0e-2, ema: 0.9")))
    assert len(asked) == 2
    for name, parameter in result.model.named_parameters():
        assert torch.equal(asked[-1][name], parameter), name


# --- the end


def test_neo_train_ends_with_a_table(root: Path) -> None:
    """Its figures are those of the run, and every place that it names is there."""
    output = good("train", str(watched(root, "table")))
    lines = dict(line.split(":", 1) for line in output.splitlines())
    lines = {name.strip(): value.strip() for name, value in lines.items()}
    told, folder = figures(root / "table"), root / "table"
    losses = [value for _, value in told["train/loss"]]
    assert lines["training loss"] == f"{losses[0]:.4f} at step 1, {losses[-1]:.4f} at step 6"
    values = [value for _, value in told["val/loss"]]
    assert lines["validation loss"] == f"{values[0]:.4f} at step 3, {values[-1]:.4f} at step 6"
    before, _, after = (value for _, value in told["val/text_perplexity"])
    assert lines["text perplexity"].startswith(f"{before:.4g} before, {after:.4g} after (original language model")
    assert lines["steps"] == "6" and int(lines["tokens"].replace(",", "")) > 6 * 100
    assert lines["skipped samples"] == lines["skipped steps"] == "0"
    assert "post_llm.hw" in lines["weight drift"]
    for name in ("time", "final speed", "peak memory", "exact match", "images"):
        assert lines[name]
    places = {"model": "neo", "checkpoints": "checkpoints", "curves": "logs", "metrics": "logs/metrics.csv",
              "figures": "figures", "recipe": "recipe.yaml"}  # fmt: skip
    for name, place in places.items():
        assert lines[name].split("   ")[0] == str(folder / place) and (folder / place).exists()
    stages = json.loads((folder / "neo" / "provenance.json").read_text())["stages"]
    assert stages[0]["metrics"]["val/text_perplexity"] == pytest.approx(after, abs=1e-4)


def test_a_summary_leaves_out_what_was_not_measured() -> None:
    names = [name for name, _ in Summary(steps=2, tokens=30, seconds=60.0, losses=[(1, 0.0, 2.0)]).rows()]
    assert names == ["training loss", "steps", "tokens", "images", "time"]
    bad = Summary(metrics={"data/skipped": 3.0, "data/skipped_empty": 3.0}).rows()
    assert ("skipped samples", "3 (empty: 3)") in bad


def test_a_sample_needs_no_source() -> None:
    model = tiny_model()
    ids = torch.tensor([1, 2, 3])
    batch = pack([Sample(ids, ids)], model.input_spec)
    parts, nll = LossParts(["a"]), []  # type: ignore[var-annotated]
    model.loss(batch, nll)
    parts.add(batch, nll[0])
    assert set(parts.take(nll[0].device, lambda sums: sums)) == {"loss_by_modality/text"}

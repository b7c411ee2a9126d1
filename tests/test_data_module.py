"""The DataModule: the same batches each time, exact resume, mixtures, ranks, Lightning's Trainer."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from shard_builders import SPEC, TOKENIZER, keys, mixed_samples, module, take, write

from neo_components.data import NEODataModule, Source
from neo_components.data.image.augment import Augment
from neo_components.types import Batch

OPTIONS: dict[str, Any] = {"seq_len": 128, "micro_batch_size": 2, "shuffle": 30}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("module")
    pictures = write(base / "pictures", mixed_samples(60, "p"), max_per_shard=16)
    return pictures, write(base / "text", mixed_samples(20, "t", images=False), max_per_shard=16)


def sources(folders: tuple[Path, Path]) -> list[Source]:
    return [Source(str(folders[0]), 0.7), Source(str(folders[1]), 0.3)]


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """The state after a way through a checkpoint file that admits plain values only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resume_equals_an_uninterrupted_run(folders: tuple[Path, Path], workers: int) -> None:
    def fresh() -> NEODataModule:
        return module(*sources(folders), workers=workers, **OPTIONS)

    whole = take(fresh(), 14)
    assert (
        len({key for batch in whole for sequence in batch.keys for key in sequence}) > 60
    )  # into the second epoch of text
    for cut in (1, 6, 7):
        first = fresh()
        begun = take(first, cut)
        second = fresh()
        second.load_state_dict(saved(first.state_dict()))
        rest = take(second, 14 - cut)
        assert keys(begun + rest) == keys(whole)
        assert torch.equal(rest[-1].patches, whole[-1].patches)
        assert torch.equal(rest[-1].token_ids, whole[-1].token_ids)
        state = second.state_dict()
        assert state["batches"] == 14
        # A second interruption.
        third = fresh()
        third.load_state_dict(saved(state))
        longer = fresh()
        take(longer, 14)
        assert keys(take(third, 3)) == keys(take(longer, 3))


def test_the_same_seed_gives_the_same_batches(folders: tuple[Path, Path]) -> None:
    first, again = (keys(take(module(*sources(folders), **OPTIONS), 5)) for _ in range(2))
    assert first == again
    assert first == keys(take(module(*sources(folders), workers=1, **OPTIONS), 5))
    assert first != keys(take(module(*sources(folders), seed=1, **OPTIONS), 5))


def test_skipped_samples_are_counted_on_after_a_resume(folders: tuple[Path, Path]) -> None:
    short = {**OPTIONS, "seq_len": 45, "max_skipped": 0.9}
    first = module(*sources(folders), **short)
    take(first, 10)
    second = module(*sources(folders), **short)
    second.load_state_dict(saved(first.state_dict()))
    take(second, 10)
    whole = module(*sources(folders), **short)
    take(whole, 20)
    assert whole.describe()["train"]["skipped"]["too_long"] > 0
    assert second.describe()["train"] == whole.describe()["train"]


def test_weights_are_those_of_the_samples(folders: tuple[Path, Path]) -> None:
    data = module(*sources(folders), **OPTIONS)
    counts = Counter[str]()
    for batch in take(data, 40):
        counts.update(key[0] for sequence in batch.keys for key in sequence)
        # Exact but for what fills the last sequence.
        assert abs(counts["t"] - 0.3 * counts.total()) <= 4
    assert counts.total() > 200


def test_a_ratio_of_text_and_a_temperature(folders: tuple[Path, Path]) -> None:
    """60 samples with images and 20 of text, whose weights are 0.7 and 0.3."""

    def fraction_of_text(**options: Any) -> float:
        batches = take(module(*sources(folders), **OPTIONS, **options), 60)
        counts = Counter(key[0] for batch in batches for sequence in batch.keys for key in sequence)
        return counts["t"] / counts.total()

    assert abs(fraction_of_text(text_fraction=0.6) - 0.6) < 0.01
    assert abs(fraction_of_text(temperature=1.0) - 0.3 * 20 / (0.3 * 20 + 0.7 * 60)) < 0.01
    with pytest.raises(ValueError, match=r"text_fraction is 0.5, but all of data.train .* are sources of text alone"):
        module(folders[1], text_fraction=0.5).train_dataloader()


def test_augmentation_changes_training_alone_and_resumes(folders: tuple[Path, Path]) -> None:
    def fresh(**options: Any) -> NEODataModule:
        return module(*sources(folders), validation=[folders[0]], **OPTIONS, **options)

    change = Augment(color=0.5, jpeg_quality=(20, 80))
    plain, changed = take(fresh(), 6), take(fresh(augment=change), 6)
    assert keys(plain) == keys(changed)
    assert all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(plain, changed, strict=True))
    assert not any(torch.equal(a.patches, b.patches) for a, b in zip(plain, changed, strict=True))
    assert all(
        torch.equal(a.patches, b.patches)
        for a, b in zip(take(fresh(augment=change, workers=2), 6), changed, strict=True)
    )
    first = fresh(augment=change)
    take(first, 3)
    second = fresh(augment=change)
    second.load_state_dict(saved(first.state_dict()))
    assert all(torch.equal(a.patches, b.patches) for a, b in zip(take(second, 3), changed[3:], strict=True))
    loaders = fresh().val_dataloader(), fresh(augment=change).val_dataloader()
    assert all(torch.equal(a.patches, b.patches) for a, b in zip(*loaders, strict=True))


def test_weights_may_be_those_of_tokens(folders: tuple[Path, Path]) -> None:
    batches = take(module(*sources(folders), weight_unit="tokens", **OPTIONS), 60)
    tokens = Counter[str]()
    for batch in batches:
        for sequence, names in enumerate(batch.keys):
            for number, name in enumerate(names):
                tokens[name[0]] += int((batch.document_ids[sequence] == number).sum())
    assert abs(tokens["t"] / tokens.total() - 0.3) < 0.01


def test_validation_is_the_same_each_time(folders: tuple[Path, Path]) -> None:
    for workers in (0, 2):
        data = module(folders[0], validation=folders, workers=workers, **OPTIONS)
        loader = data.val_dataloader()
        passes = [keys(list(loader)) for _ in range(2)]
        assert passes[0] == passes[1]
        counts = Counter(key for batch in passes[0] for sequence in batch for key in sequence)
        assert len(counts) == 80 and set(counts.values()) == {1}
        assert data.describe()["validation"] == {"read": 80, "skipped": {}}


class OfRank(NEODataModule):
    """One of some ranks, without processes."""

    number, ranks = 0, 2

    def _rank(self) -> tuple[int, int]:
        return self.number, self.ranks


def test_ranks_share_the_samples(tmp_path: Path) -> None:
    folder = Source(str(write(tmp_path / "shards", mixed_samples(200), max_per_shard=50)))
    counts = Counter[str]()
    trained, steps = [], []
    for number in range(2):
        data = OfRank(TOKENIZER, [folder], [folder], min_pixels=4096, max_pixels=16384, workers=2, **OPTIONS)
        data.number, data.input_spec = number, SPEC
        batches = list(data.val_dataloader())
        steps.append(len(batches))
        counts.update(key for batch in batches for sequence in batch.keys for key in sequence)
        trained.append({key for batch in take(data, 4) for sequence in batch.keys for key in sequence})
    assert len(counts) == 200 and set(counts.values()) == {1}
    assert steps[0] == steps[1] > 10
    assert len(trained[0]) > 10 and not trained[0] & trained[1]


def test_every_rank_validates_the_same_number_of_steps(tmp_path: Path) -> None:
    """Even if there are fewer samples than ranks: the others get a sequence of padding."""
    folder = Source(str(write(tmp_path / "shards", mixed_samples(1))))
    batches = []
    for number in range(2):
        data = OfRank(TOKENIZER, [folder], [folder], min_pixels=4096, max_pixels=16384, workers=0, **OPTIONS)
        data.number, data.input_spec = number, SPEC
        batches.append(list(data.val_dataloader()))
    assert [keys(one) for one in batches] == [[[["s0000"]]], [[[]]]]
    (empty,) = batches[1]
    assert (empty.document_ids[0, 1:] == -1).all() and (empty.labels == -100).all()
    assert empty.loss_weights.sum() == 0 and empty.token_ids.shape == (1, 128)


@pytest.mark.parametrize("changed", [{"seq_len": 120}, {"seed": 5}, {"shuffle": 3}])
def test_resume_with_other_data_is_refused(folders: tuple[Path, Path], changed: dict[str, Any]) -> None:
    first = module(*sources(folders), **OPTIONS)
    take(first, 2)
    second = module(*sources(folders), **{**OPTIONS, **changed})
    second.load_state_dict(first.state_dict())
    (name,) = changed
    with pytest.raises(ValueError, match=f"its data differs .{name}: "):
        second.train_dataloader()


def test_checkpoints_of_version_0_1_are_resumed(folders: tuple[Path, Path]) -> None:
    """Their data state has other names for some settings."""
    data = module(*sources(folders), **OPTIONS)
    expected = keys(take(module(*sources(folders), **OPTIONS), 5))[2:]
    take(data, 2)
    state = data.state_dict()
    old = {"seq_len": "row_length", "weights": "shares", "weight_unit": "share_of"}
    settings = {old.get(name, name): value for name, value in state["settings"].items()}
    assert set(old.values()) <= settings.keys()
    resumed = module(*sources(folders), **OPTIONS)
    resumed.load_state_dict(saved({**state, "settings": settings}))
    assert keys(take(resumed, 3)) == expected
    other = module(*sources(folders), **{**OPTIONS, "seq_len": 120})
    other.load_state_dict(saved({**state, "settings": settings}))
    with pytest.raises(ValueError, match=r"seq_len: \d+ then, 120 now\); use the settings of then"):
        other.train_dataloader()


def test_faults_are_reported(folders: tuple[Path, Path], tmp_path: Path) -> None:
    message = r"micro_batch_size must be at least 1, got 0; .*loss_reduction.*'mean'; weight of x must be over 0"
    with pytest.raises(ValueError, match=message):
        module(Source("x", 0.0), micro_batch_size=0, loss_reduction="mean")
    with pytest.raises(FileNotFoundError, match="no shards"):
        module(tmp_path).setup()
    with pytest.raises(ValueError, match="lists no source"):
        module().train_dataloader()
    assert module(folders[0]).val_dataloader() == []
    data = module(folders[0])
    data.input_spec = None
    with pytest.raises(ValueError, match="set input_spec"):
        data.train_dataloader()


class Recorder(lightning.LightningModule):
    """Learns nothing; notes the keys of each batch that reaches the training step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[list[list[str]]] = []
        self.validated: list[list[list[str]]] = []

    def training_step(self, batch: Batch) -> torch.Tensor:
        self.trained.append(batch.keys)
        return self.weight * batch.loss_weights.sum()

    def validation_step(self, batch: Batch) -> None:
        self.validated.append(batch.keys)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class RankRecorder(Recorder):
    """Leaves what each rank trained on in a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"rank{self.global_rank}.json").write_text(json.dumps(self.trained))


def fit(
    folder: Path, data: NEODataModule, checkpoint: Path | None = None, recorder: Recorder | None = None, **options: Any
) -> Recorder:
    """A run that saves every fourth step."""
    recorder = recorder or Recorder()
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(recorder, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return recorder


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_trainer_resumes_exactly(folders: tuple[Path, Path], tmp_path: Path, workers: int) -> None:
    def fresh() -> NEODataModule:
        return module(*sources(folders), validation=[folders[1]], workers=workers, **OPTIONS)

    checking = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    whole = fit(tmp_path / "whole", fresh(), max_steps=11, **checking)
    assert len(whole.trained) == 11
    assert whole.trained == keys(take(fresh(), 11))  # nothing is lost to Lightning's look-ahead
    for step in (4, 8):
        resumed = fit(tmp_path / "resumed", fresh(), tmp_path / "whole" / f"step={step}.ckpt", max_steps=11, **checking)
        assert resumed.trained == whole.trained[step:]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_stream_continues_over_lightnings_epochs(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data = module(*sources(folders), **OPTIONS)
    recorder = fit(tmp_path, data, max_epochs=3, limit_train_batches=3, num_sanity_val_steps=0)
    assert recorder.trained == keys(take(module(*sources(folders), **OPTIONS), 9))


def rank_of(number: int, ranks: int, size: int, folders: tuple[Path, Path], workers: int) -> OfRank:
    options = {"seq_len": 128, "min_pixels": 4096, "max_pixels": 16384, "shuffle": 30}
    data = OfRank(TOKENIZER, sources(folders), micro_batch_size=size, workers=workers, **options)
    data.number, data.ranks, data.input_spec = number, ranks, SPEC
    return data


def test_other_ranks_and_workers_continue_and_repeat_nothing(folders: tuple[Path, Path]) -> None:
    """Each sample once per epoch although ranks, micro-batch size and workers change twice within a block of steps."""
    counts = Counter[str]()
    state: dict[str, Any] | None = None
    for ranks, size, workers, steps in ((2, 1, 2, 5), (3, 1, 0, 3), (1, 2, 1, 60)):
        states = []
        for number in range(ranks):
            data = rank_of(number, ranks, size, folders, workers)
            if state is not None:
                data.load_state_dict(saved(state))
            counts.update(key for batch in take(data, steps) for sequence in batch.keys for key in sequence)
            states.append(data.state_dict())
        assert all(one["place"] == states[0]["place"] for one in states)  # every rank knows the position of all
        state = states[0] | {"tallies": [one["tallies"][0] for one in states]}
    assert counts.total() == sum(one["read"] for one in state["tallies"]) if state else False
    for prefix, size in (("p", 60), ("t", 20)):
        own = [counts[f"{prefix}{number:04d}"] for number in range(size)]
        assert min(own) >= 1 and max(own) - min(own) <= 2
    # Of what the block held, nothing was lost or doubled: the sequences of the block were dealt exactly once.
    whole = Counter(
        key for batch in take(rank_of(0, 1, 1, folders, 0), 13) for sequence in batch.keys for key in sequence
    )
    begun = Counter[str]()
    for number in range(2):
        data = rank_of(number, 2, 1, folders, 0)
        begun.update(key for batch in take(data, 5) for sequence in batch.keys for key in sequence)
    assert sum(begun.values()) < sum(whole.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_ranks_resume_exactly(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def run(name: str, checkpoint: Path | None = None) -> list[list[list[list[str]]]]:
        data = module(*sources(folders), workers=1, **OPTIONS)
        options = {"max_steps": 7, "devices": 2, "strategy": "ddp_fork"}
        fit(tmp_path / name, data, checkpoint, RankRecorder(tmp_path / name), **options)
        return [json.loads((tmp_path / name / f"rank{rank}.json").read_text()) for rank in range(2)]

    whole = run("whole")
    assert whole[0] != whole[1] and len(whole[0]) == len(whole[1]) == 7
    assert run("resumed", tmp_path / "whole" / "step=4.ckpt") == [rank[4:] for rank in whole]

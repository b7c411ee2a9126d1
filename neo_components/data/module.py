"""The data of a run as a LightningDataModule: shards in, packed batches out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import lightning
import torch

from neo_components.data.conversation import load_tokenizer
from neo_components.data.loader import Progress, RowDataset, RowLoader
from neo_components.data.rows import RowStream
from neo_components.data.samples import SampleMaker
from neo_components.data.shard_folder import ShardFolder
from neo_components.data.stream import SampleStream, check_divisible
from neo_components.packing import REDUCTIONS
from neo_components.types import Batch, InputSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE_VERSION = 1


@dataclass
class Source:
    """A folder of shards and its part in the mixture.

    Args:
        shards: a local folder of shards.
        share: of the samples, relative to the other sources; any positive number.
    """

    shards: str
    share: float = 1.0


@dataclass
class _Streams:
    """What the row streams of one loader have in common; a worker process gets a copy."""

    folders: list[ShardFolder]
    shares: list[float]
    maker: SampleMaker
    order: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    rank: int = 0
    ranks: int = 1
    workers: int = 0

    def stream(self, number: int, place: Mapping[str, Any] | None) -> RowStream:
        streams = max(self.workers, 1)
        consumer, consumers = self.rank * streams + number, self.ranks * streams
        samples = SampleStream(self.folders, self.shares, consumer=consumer, consumers=consumers, **self.order)
        return RowStream(self.folders, samples, self.maker, state=place, **self.rows)


class NEODataModule(lightning.LightningDataModule):
    """Reads folders of shards, packs their samples into rows, and goes on exactly where a run stopped.

    The training stream is endless: bound the run by ``max_steps``. It is the same for the same arguments, number of
    workers and number of ranks. Validation gives each sample once, in the same order each time.

    Set ``input_spec = model.input_spec`` before a loader is asked for.

    Args:
        tokenizer: folder or hub id of the tokenizer.
        chat_template: how conversations are written: ``auto``, ``chatml`` or a file (see ``load_tokenizer``).
        train: sources of training, mixed by their shares.
        validation: sources of validation, one after the other; shares do not count.
        row_length: tokens of a row, L. A longer sample is skipped.
        rows: rows of a step on each device, B.
        min_pixels: smallest area of an image after resizing, in pixels; a smaller image is scaled up.
        max_pixels: largest area of a sample's single image, in pixels; each of n images may have ``2 / n`` of it.
        max_length: a longer sample is cut to this many tokens; ``None`` cuts none.
        workers: worker processes for each loader; 0 reads in the training process.
        shuffle: samples among which the order is mixed, as with a shuffle buffer of that many; 0 keeps the order.
        max_skipped: largest share of samples that may be skipped because they are unusable.
        loss_reduction: weight of a learnt token: ``token``, ``sample`` or ``square`` (see ``pack``).
        seed: of shuffling.

    Raises:
        ValueError: if an argument is out of its range; all such faults together.
    """

    def __init__(
        self,
        tokenizer: str,
        train: list[Source],
        validation: list[Source] = [],  # noqa: B006 - copied, never changed; a recipe shows this default
        row_length: int = 4096,
        rows: int = 1,
        min_pixels: int = 65536,
        max_pixels: int = 4194304,
        max_length: int | None = None,
        workers: int = 1,
        shuffle: int = 10000,
        max_skipped: float = 0.01,
        loss_reduction: Literal["token", "sample", "square"] = "square",
        chat_template: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer_name, self.chat_template = tokenizer, chat_template
        self.train_sources, self.validation_sources = list(train), list(validation)
        self.row_length, self.rows, self.workers = row_length, rows, workers
        self.min_pixels, self.max_pixels, self.max_length = min_pixels, max_pixels, max_length
        self.shuffle, self.seed = shuffle, seed
        self.max_skipped, self.loss_reduction = max_skipped, loss_reduction
        self._check()
        self.input_spec: InputSpec | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._folders: dict[str, ShardFolder] = {}
        self._progress = {"train": Progress(), "validation": Progress()}
        self._restored: Mapping[str, Any] | None = None

    def _check(self) -> None:
        wrong = [
            f"{name} must be {rule}, got {getattr(self, name)!r}"
            for name, rule, right in (
                ("row_length", "at least 2", self.row_length >= 2),
                ("rows", "at least 1", self.rows >= 1),
                ("min_pixels", "from 1 to max_pixels", 1 <= self.min_pixels <= self.max_pixels),
                ("max_length", "at least 2 or None", self.max_length is None or self.max_length >= 2),
                ("workers", "at least 0", self.workers >= 0),
                ("shuffle", "at least 0", self.shuffle >= 0),
                ("max_skipped", "from 0 to 1", 0 <= self.max_skipped <= 1),
                ("loss_reduction", f"one of {', '.join(REDUCTIONS)}", self.loss_reduction in REDUCTIONS),
            )
            if not right
        ]
        sources = [*self.train_sources, *self.validation_sources]
        wrong += [f"share of {s.shards} must be over 0, got {s.share}" for s in sources if not s.share > 0]
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with its image tokens; loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name, self.chat_template)
        return self._tokenizer

    def setup(self, stage: str | None = None) -> None:
        """Opens every source, so that a missing one is told before a run begins."""
        for source in [*self.train_sources, *self.validation_sources]:
            self._folder(source)

    def train_dataloader(self) -> RowLoader:
        """Endless; begins behind the batches that were taken before.

        Raises:
            ValueError: if there is no source or no ``input_spec``, or a resumed run was started with other settings.
        """
        if not self.train_sources:
            raise ValueError("there is nothing to train on: data.train lists no source")
        if self._restored is not None:
            self._apply(self._restored)
        # Under a trainer a batch counts when the trainer takes it, because Lightning fetches one batch ahead.
        return self._loader("train", self.train_sources, endless=True, keep=self.trainer is None)

    def val_dataloader(self) -> RowLoader | list[Any]:
        """One pass over the validation sources; an empty list if there are none."""
        if not self.validation_sources:
            return []
        return self._loader("validation", self.validation_sources, endless=False, keep=False)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Lightning's hook: counts a training batch as taken."""
        if self.trainer is not None and self.trainer.training and self._progress["train"].handed:
            self._progress["train"].take()
        return batch

    def describe(self) -> dict[str, dict[str, Any]]:
        """Samples read, and skipped by reason, of this rank's ``train`` and (last or current) ``validation`` stream.

        Up to the last batch that left the loader; samples that wait for their row are among those read.
        """
        return {name: progress.tally().state() for name, progress in self._progress.items()}

    def state_dict(self) -> dict[str, Any]:
        """The place of the training stream behind the last batch that the trainer took: all ranks, plain values."""
        progress = self._progress["train"]
        places = [progress.places]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            places = [{} for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(places, progress.places)
        return {
            "state_version": STATE_VERSION,
            "batches": progress.batches,
            "rows": progress.batches * self.rows,
            "settings": self._settings(),
            "places": [{str(stream): place for stream, place in rank.items()} for rank in places],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on behind the batches of :meth:`state_dict`, from the next ``train_dataloader()`` on."""
        self._restored = state_dict

    def _apply(self, state: Mapping[str, Any]) -> None:
        if state["state_version"] != STATE_VERSION:
            raise ValueError(
                f"the checkpoint's data state has version {state['state_version']}, known is {STATE_VERSION}"
            )
        then, now = state["settings"], self._settings()
        if then != now:
            changed = ", ".join(f"{k}: {then.get(k)} then, {now[k]} now" for k in now if then.get(k) != now[k])
            raise ValueError(f"the run cannot go on exactly where it stopped, because its data differs ({changed})")
        places = state["places"][self._rank()[0]]
        self._progress["train"] = Progress(state["batches"], {int(stream): place for stream, place in places.items()})
        self._restored = None

    def _settings(self) -> dict[str, Any]:
        """What must be equal for a place to mean the same samples."""
        return {
            "workers": max(self.workers, 1),
            "ranks": self._rank()[1],
            "seed": self.seed,
            "shuffle": self.shuffle,
            "samples": [len(self._folder(source)) for source in self.train_sources],
        }

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _folder(self, source: Source) -> ShardFolder:
        if source.shards not in self._folders:
            self._folders[source.shards] = ShardFolder(source.shards)
        return self._folders[source.shards]

    def _loader(self, name: str, sources: Sequence[Source], endless: bool, keep: bool) -> RowLoader:
        if self.input_spec is None:
            raise ValueError("set input_spec = model.input_spec before asking for a loader")
        rank, ranks = self._rank()
        folders = [self._folder(source) for source in sources]
        if endless:  # told here, before any worker is started
            check_divisible(folders, ranks * max(self.workers, 1))
        streams = _Streams(
            folders,
            [source.share for source in sources],
            SampleMaker(self.tokenizer, self.input_spec, self.min_pixels, self.max_pixels, self.max_length),
            order={"shuffle": self.shuffle, "seed": self.seed, "endless": endless},
            rows={
                "row_length": self.row_length,
                "loss_reduction": self.loss_reduction,
                "max_skipped": self.max_skipped,
            },
            rank=rank,
            ranks=ranks,
            workers=self.workers,
        )
        progress = self._progress[name] if endless else Progress()
        self._progress[name] = progress
        return RowLoader(RowDataset(partial(_Streams.stream, streams), self.rows), self.workers, progress, keep)

"""The data of a run as a LightningDataModule: shards in, packed batches out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import lightning
import torch

from neo_components.data.image.augment import Augment
from neo_components.data.limits import MAX_PIXELS, MIN_PIXELS
from neo_components.data.loader import Progress, RowDataset, RowLoader
from neo_components.data.packing import REDUCTIONS
from neo_components.data.plan.lengths import Lengths, folder_lengths
from neo_components.data.plan.mixture import Source, mixture, source_names
from neo_components.data.plan.row_plan import RowPlan, Supply, check_usable
from neo_components.data.plan.step_plan import StepPlan
from neo_components.data.rows import RowMaker
from neo_components.data.samples import SampleMaker
from neo_components.data.shards.folder import ShardFolder, open_folder
from neo_components.data.skip_counts import SkipCounts
from neo_components.data.text.conversation import load_tokenizer
from neo_components.types import Batch, InputSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE_VERSION = 3


@dataclass
class _Plan:
    """What the plan of a loader is made from; a worker process gets a copy."""

    supplies: list[Supply]
    shares: list[float]
    options: dict[str, Any]
    ranks: int
    rows: int

    def __call__(self, place: Mapping[str, Any] | None) -> StepPlan:
        return StepPlan(RowPlan(self.supplies, self.shares, **self.options), self.ranks, self.rows, place)


class NEODataModule(lightning.LightningDataModule):
    """Reads folders of shards, packs their samples into rows, and goes on exactly where a run stopped.

    The training stream is endless: bound the run by ``max_steps``. It is the same for the same arguments and number of
    ranks, whatever the number of workers. Validation gives each sample once, in the same order each time.

    Rows are planned from the length of each sample in tokens. Lengths are counted when a run begins, kept beside the
    shards, and read from there afterwards (``neo data index`` counts them ahead).

    Set ``input_spec = model.input_spec`` before a loader is asked for.

    Args:
        tokenizer: folder or hub id of the tokenizer.
        chat_template: how conversations are written: ``auto``, ``chatml`` or a file (see ``load_tokenizer``).
        train: sources of training, mixed by their shares.
        validation: sources of validation, one after the other; shares do not count.
        text_validation: sources of held-out text, on which the language model is watched; a sample with an image is
            refused.
        seq_len: tokens of a row, L. A longer sample is skipped.
        micro_batch_size: packed sequences of a step on each device, B.
        min_pixels: smallest area of an image after resizing, in pixels; a smaller image is scaled up.
        max_pixels: largest area of a sample's single image, in pixels; each of n images may have ``2 / n`` of it.
        max_length: a longer sample is cut to this many tokens, inside an answer or behind one; ``None`` cuts none.
        workers: worker processes for each loader; 0 reads in the training process.
        shuffle: samples among which the order is mixed; 0 keeps the order.
        max_skipped: largest share of samples that may be skipped because they are unusable.
        loss_reduction: weight of a learnt token: ``token``, ``sample`` or ``square`` (see ``pack``).
        temperature: T multiplies the share of each source by ``size ** (1 / T)``; ``None`` leaves the shares.
        text_share: share of all sources without images together, 0.3 is 3:7 of text to multimodal; ``None`` leaves it.
        share_of: what shares count, ``samples`` or ``tokens``.
        cache: folder of local copies of remote shards; ``None`` is ``NEO_COMPONENTS_CACHE``, or
            ``~/.cache/neo_components``.
        cache_gb: gigabytes of copies of each source to keep at most; ``None`` keeps all, 0 none: each sample is fetched
            by itself.
        allow_pipe: run the command of a source ``pipe:COMMAND``, which writes a tar.
        exact_pixels: resize the images of training and validation as the released model's code does, bit by bit;
            otherwise in less time, and fewer than 1 in 100 values differ, by 1 or 2 of 255.
        augment: random changes to the images of training; ``None`` makes none.
        seed: of shuffling and augmentation.

    Raises:
        ValueError: if an argument is out of its range; all such faults together.
    """

    def __init__(
        self,
        tokenizer: str,
        train: list[Source],
        validation: list[Source] = [],  # noqa: B006 - copied, never changed; a recipe shows this default
        text_validation: list[Source] = [],  # noqa: B006 - as above
        seq_len: int = 4096,
        micro_batch_size: int = 1,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        max_length: int | None = None,
        workers: int = 1,
        shuffle: int = 10000,
        max_skipped: float = 0.01,
        loss_reduction: Literal["token", "sample", "square"] = "square",
        temperature: float | None = None,
        text_share: float | None = None,
        share_of: Literal["samples", "tokens"] = "samples",
        cache: str | None = None,
        cache_gb: float | None = None,
        allow_pipe: bool = False,
        exact_pixels: bool = False,
        augment: Augment | None = None,
        chat_template: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer_name, self.chat_template = tokenizer, chat_template
        self.train_sources, self.validation_sources = list(train), list(validation)
        self.text_sources = list(text_validation)
        self.seq_len, self.micro_batch_size, self.workers = seq_len, micro_batch_size, workers
        self.min_pixels, self.max_pixels, self.max_length = min_pixels, max_pixels, max_length
        self.shuffle, self.seed = shuffle, seed
        self.max_skipped, self.loss_reduction = max_skipped, loss_reduction
        self.temperature, self.text_share, self.share_of = temperature, text_share, share_of
        self.exact_pixels, self.augment = exact_pixels, augment
        self.cache, self.cache_gb, self.allow_pipe = cache, cache_gb, allow_pipe
        self._check()
        self.input_spec: InputSpec | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._folders: dict[str, ShardFolder] = {}
        self._lengths: dict[str, Lengths] = {}
        self._progress = {"train": Progress(), "validation": Progress(), "text_validation": Progress()}
        self._restored: Mapping[str, Any] | None = None
        self._now: dict[str, Any] = {}  # settings of the training loader

    def _check(self) -> None:
        text, heat = self.text_share, self.temperature
        wrong = [
            f"{name} must be {rule}, got {getattr(self, name)!r}"
            for name, rule, right in (
                ("seq_len", "at least 2", self.seq_len >= 2),
                ("micro_batch_size", "at least 1", self.micro_batch_size >= 1),
                ("min_pixels", "from 1 to max_pixels", 1 <= self.min_pixels <= self.max_pixels),
                ("max_length", "at least 2 or None", self.max_length is None or self.max_length >= 2),
                ("workers", "at least 0", self.workers >= 0),
                ("shuffle", "at least 0", self.shuffle >= 0),
                ("max_skipped", "from 0 to 1", 0 <= self.max_skipped <= 1),
                ("loss_reduction", f"one of {', '.join(REDUCTIONS)}", self.loss_reduction in REDUCTIONS),
                ("temperature", "over 0 or None", heat is None or heat > 0),
                ("text_share", "between 0 and 1 or None", text is None or 0 < text < 1),
                ("cache_gb", "at least 0 or None", self.cache_gb is None or self.cache_gb >= 0),
                ("share_of", "one of samples, tokens", self.share_of in ("samples", "tokens")),
            )
            if not right
        ]
        wrong += [f"share of {s.shards} must be over 0, got {s.share}" for s in self.sources if not s.share > 0]
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def sources(self) -> list[Source]:
        """All sources: of training, validation and held-out text."""
        return [*self.train_sources, *self.validation_sources, *self.text_sources]

    @property
    def source_names(self) -> list[str]:
        """Short names of the training sources, which batches tell with their samples."""
        return source_names(self.train_sources)

    @property
    def validation_names(self) -> list[str]:
        """What each loader of :meth:`val_dataloader` is: ``validation`` or ``text_validation``."""
        named = {"validation": self.validation_sources, "text_validation": self.text_sources}
        return [name for name, sources in named.items() if sources]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with its image tokens; loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name, self.chat_template)
        return self._tokenizer

    def prepare_data(self) -> None:
        """Counts the lengths that are not kept yet. Lightning calls it in one process of each node."""
        for source in self.sources:
            self._length_of(source)

    def setup(self, stage: str | None = None) -> None:
        """Opens every source, so that a missing one is told before a run begins."""
        for source in self.sources:
            self._folder(source)
        for source in self.text_sources:
            if self._folder(source).has_images:
                raise ValueError(f"data.text_validation is of text alone, but {source.shards} has samples with images")

    def train_dataloader(self) -> RowLoader:
        """Endless; begins behind the batches that were taken before.

        Raises:
            ValueError: if there is no source or no ``input_spec``, a source has no usable sample or all have too few,
                or a resumed run was started with other settings.
        """
        if not self.train_sources:
            raise ValueError("there is nothing to train on: data.train lists no source")
        self._now = self._settings()
        if self._restored is not None:
            self._apply(self._restored, self._now)
        # Under a trainer a batch counts when the trainer takes it, because Lightning fetches one batch ahead.
        return self._loader("train", self.train_sources, endless=True, keep=self.trainer is None)

    def val_dataloader(self) -> RowLoader | list[RowLoader]:
        """One pass over the validation sources; with held-out text a list of two, as :attr:`validation_names` tells; an
        empty list if there are none."""
        loaders = [self.validation_dataloader(name) for name in self.validation_names]
        return loaders[0] if len(loaders) == 1 else loaders

    def validation_dataloader(self, name: str) -> RowLoader:
        """One pass over the sources of ``validation`` or ``text_validation``."""
        sources = {"validation": self.validation_sources, "text_validation": self.text_sources}[name]
        return self._loader(name, sources, endless=False, keep=False)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Lightning's hook: counts a training batch as taken."""
        if self.trainer is not None and self.trainer.training and self._progress["train"].handed:
            self._progress["train"].take()
        return batch

    def describe(self) -> dict[str, dict[str, Any]]:
        """Samples read, and skipped by reason, of this rank's ``train`` and (last or current) validation streams.

        Samples that were known to be unusable are counted once, by rank 0; those that turned out to be so each time.
        """
        return {name: (progress.known + progress.latest).state() for name, progress in self._progress.items()}

    def state_dict(self) -> dict[str, Any]:
        """The place of the training stream behind the last batch that the trainer took: all ranks, plain values.

        Raises:
            RuntimeError: if the ranks took different numbers of batches.
        """
        progress = self._progress["train"]
        mine = (progress.batches, progress.tally.state())
        ranks = [mine]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = [mine] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, mine)
        if len({batches for batches, _ in ranks}) != 1:
            raise RuntimeError(f"the ranks took different numbers of batches: {[batches for batches, _ in ranks]}")
        return {
            "state_version": STATE_VERSION,
            "batches": progress.batches,
            "settings": self._now,
            "place": progress.place,
            "tallies": [tally for _, tally in ranks],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on behind the batches of :meth:`state_dict`, from the next ``train_dataloader()`` on.

        The numbers of workers, ranks and rows may differ from those of the run before: what it had not taken yet is
        dealt anew, and every sample still comes once in each epoch.
        """
        self._restored = state_dict

    def _apply(self, state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if state["state_version"] != STATE_VERSION:
            raise ValueError(
                f"the checkpoint's data state has version {state['state_version']}, known is {STATE_VERSION}"
            )
        then = state["settings"]
        if state["place"] is not None and then != now:
            changed = ", ".join(f"{k}: {then.get(k)} then, {now[k]} now" for k in now if then.get(k) != now[k])
            raise ValueError(f"the run cannot go on exactly where it stopped, because its data differs ({changed})")
        rank, ranks = self._rank()
        tallies = [SkipCounts.from_state(tally) for tally in state["tallies"]]
        if len(tallies) != ranks:  # nobody goes on with the counts of one rank, so the first one keeps them all
            tallies = [sum(tallies, SkipCounts()), *([SkipCounts()] * (ranks - 1))]
        self._progress["train"] = Progress(state["batches"], state["place"], tallies[rank])
        self._restored = None

    def _settings(self) -> dict[str, Any]:
        """What must be equal for a place to mean the same samples."""
        lengths = [self._length_of(source) for source in self.train_sources]
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "seq_len": self.seq_len,
            "shares": [round(share, 12) for share in self._shares(lengths)],
            "share_of": self.share_of,
            "samples": [one.table.shape[1] for one in lengths],
            "tokens": [int(one.table[0].sum(dtype="int64")) for one in lengths],
        }

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _folder(self, source: Source) -> ShardFolder:
        if source.shards not in self._folders:
            limit = int(self.cache_gb * 1e9) if self.cache_gb is not None else None
            self._folders[source.shards] = open_folder(source.shards, self.cache, limit, self.allow_pipe)
        return self._folders[source.shards]

    def _length_of(self, source: Source) -> Lengths:
        if source.shards not in self._lengths:
            self._lengths[source.shards] = folder_lengths(self._folder(source), self._maker(), self.workers)
        return self._lengths[source.shards]

    def _maker(self) -> SampleMaker:
        if self.input_spec is None:
            raise ValueError("set input_spec = model.input_spec before asking for a loader")
        return SampleMaker(
            self.tokenizer, self.input_spec, self.min_pixels, self.max_pixels, self.max_length, self.exact_pixels
        )

    def _shares(self, lengths: Sequence[Lengths]) -> list[float]:
        sources = self.train_sources
        sizes = [one.counts(self.seq_len).kept for one in lengths]
        has_images = [self._folder(source).has_images for source in sources]
        return mixture(sources, sizes, has_images, self.temperature, self.text_share)

    def _loader(self, name: str, sources: Sequence[Source], endless: bool, keep: bool) -> RowLoader:
        maker = self._maker()
        rank, ranks = self._rank()
        lengths = [self._length_of(source) for source in sources]
        supplies = [one.supply for one in lengths]
        known = sum((one.counts(self.seq_len) for one in lengths), SkipCounts())
        if endless:  # told here, before any worker is started
            check_usable(supplies, self.seq_len)
        known.check(self.max_skipped, complete=True)
        options = {
            "seq_len": self.seq_len,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "count": self.share_of,
            "endless": endless,
        }
        shares = self._shares(lengths) if endless else [1.0] * len(sources)
        plan = _Plan(supplies, shares, options, ranks, self.micro_batch_size)
        if endless:
            maker.augment = self.augment
        folders = [self._folder(source) for source in sources]
        rows = RowMaker(folders, maker, self.seq_len, self.loss_reduction, self.seed, source_names(sources))
        progress = self._progress[name] if endless else Progress()
        progress.known = SkipCounts(known.skipped.total(), known.skipped) if rank == 0 else SkipCounts()
        self._progress[name] = progress
        return RowLoader(RowDataset(plan, rows, rank), self.workers, progress, keep, self.max_skipped)

"""The data of a run as a LightningDataModule: reads shards, gives batches of packed sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import lightning
import torch

from neo_components.data.image.augment import Augment
from neo_components.data.limits import MAX_PIXELS, MIN_PIXELS
from neo_components.data.loader import PackedDataset, PackedLoader, Progress
from neo_components.data.packed import BatchMaker
from neo_components.data.packing import REDUCTIONS
from neo_components.data.plan.lengths import Lengths, folder_lengths
from neo_components.data.plan.mixture import Source, mixture, source_names
from neo_components.data.plan.pack_plan import PackPlan, Supply, check_usable
from neo_components.data.plan.step_plan import StepPlan
from neo_components.data.samples import SampleMaker
from neo_components.data.shards.folder import ShardFolder, open_folder
from neo_components.data.skip_counts import SkipCounts
from neo_components.data.text.conversation import load_tokenizer
from neo_components.errors import ArgumentError, ArgumentErrors
from neo_components.types import Batch, InputSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE_VERSION = 3

RENAMED = {"row_length": "seq_len", "shares": "weights", "share_of": "weight_unit"}
"""Settings under their names in the checkpoints of version 0.1, and their names since."""


@dataclass
class _Plan:
    """What the plan of a loader is made from; a worker process gets a copy."""

    supplies: list[Supply]
    weights: list[float]
    options: dict[str, Any]
    ranks: int
    micro_batch_size: int

    def __call__(self, position: Mapping[str, Any] | None) -> StepPlan:
        plan = PackPlan(self.supplies, self.weights, **self.options)
        return StepPlan(plan, self.ranks, self.micro_batch_size, position)


class NEODataModule(lightning.LightningDataModule):
    """Reads folders of shards, packs their samples into sequences, and continues exactly where a run stopped.

    The training stream is endless: bound the run by ``max_steps``. It is the same for the same arguments and number of
    ranks, whatever the number of workers. Validation gives each sample once, in the same order each time.

    Packing is planned from the length of each sample in tokens. Lengths are counted when a run begins, kept beside the
    shards, and read from there afterwards (``neo data index`` counts them ahead).

    Set ``input_spec = model.input_spec`` before a loader is asked for.

    Args:
        tokenizer: folder or hub id of the tokenizer.
        chat_template: how conversations are written: ``auto``, ``chatml`` or a file (see ``load_tokenizer``).
        train: sources of training, mixed by their sampling weights.
        validation: sources of validation, one after the other; weights do not count.
        text_validation: sources of held-out text, on which the language model is watched; a sample with an image is
            refused.
        seq_len: tokens of a packed sequence, L. A longer sample is skipped.
        micro_batch_size: packed sequences of a step on each device, B.
        min_pixels: smallest area of an image after resizing, in pixels; a smaller image is scaled up.
        max_pixels: largest area of a sample's single image, in pixels; each of n images may have ``2 / n`` of it.
        max_length: a longer sample is cut to this many tokens, inside an answer or behind one; ``None`` cuts none.
        workers: worker processes for each loader; 0 reads in the training process.
        shuffle: samples among which the order is mixed; 0 keeps the order.
        max_skipped: largest fraction of samples that may be skipped because they are unusable.
        loss_reduction: loss weight of a target token: ``token``, ``sample`` or ``square`` (see ``pack``).
        temperature: T multiplies the weight of each source by ``size ** (1 / T)``; ``None`` leaves the weights.
        text_fraction: weight of all sources without images together, 0.3 is 3:7 of text to multimodal; ``None`` leaves
            the weights.
        weight_unit: what weights are of, ``samples`` or ``tokens``.
        cache: folder of local copies of remote shards; ``None`` is ``NEO_COMPONENTS_CACHE``, or
            ``~/.cache/neo_components``.
        cache_gb: gigabytes of copies of each source to keep at most; ``None`` keeps all, 0 none: each sample is
            fetched alone.
        allow_pipe: run the command of a source ``pipe:COMMAND``, which writes a tar.
        exact_pixels: resize the images of training and validation by Pillow, as the released model's code does;
            otherwise by torch in less time, and fewer than 1 in 100 values differ, by 1 or 2 of 255.
        augment: random changes to the images of training; ``None`` makes none.
        seed: of shuffling and augmentation.

    Attributes:
        context_parallel: how many consecutive processes read the same batches; the training module sets it to
            ``stage.context_parallel``.

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
        text_fraction: float | None = None,
        weight_unit: Literal["samples", "tokens"] = "samples",
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
        self.temperature, self.text_fraction, self.weight_unit = temperature, text_fraction, weight_unit
        self.exact_pixels, self.augment = exact_pixels, augment
        self.cache, self.cache_gb, self.allow_pipe = cache, cache_gb, allow_pipe
        self._check()
        self.input_spec: InputSpec | None = None
        self.context_parallel = 1
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._folders: dict[str, ShardFolder] = {}
        self._lengths: dict[str, Lengths] = {}
        self._progress = {"train": Progress(), "validation": Progress(), "text_validation": Progress()}
        self._restored: Mapping[str, Any] | None = None
        self._now: dict[str, Any] = {}  # settings of the training loader

    def _check(self) -> None:
        text, heat = self.text_fraction, self.temperature
        wrong = [
            ArgumentError(name, f"must be {rule}, got {getattr(self, name)!r}", *others)
            for name, rule, right, *others in (
                ("seq_len", "at least 2", self.seq_len >= 2),
                ("micro_batch_size", "at least 1", self.micro_batch_size >= 1),
                ("min_pixels", "from 1 to max_pixels", 1 <= self.min_pixels <= self.max_pixels, "max_pixels"),
                ("max_length", "at least 2 or None", self.max_length is None or self.max_length >= 2),
                ("workers", "at least 0", self.workers >= 0),
                ("shuffle", "at least 0", self.shuffle >= 0),
                ("max_skipped", "from 0 to 1", 0 <= self.max_skipped <= 1),
                ("loss_reduction", f"one of {', '.join(REDUCTIONS)}", self.loss_reduction in REDUCTIONS),
                ("temperature", "over 0 or None", heat is None or heat > 0),
                ("text_fraction", "between 0 and 1 or None", text is None or 0 < text < 1),
                ("cache_gb", "at least 0 or None", self.cache_gb is None or self.cache_gb >= 0),
                ("weight_unit", "one of samples, tokens", self.weight_unit in ("samples", "tokens")),
            )
            if not right
        ]
        listed = (("train", self.train_sources), ("validation", self.validation_sources))
        wrong += [
            ArgumentError(f"{name}.{number}.weight", f"must be over 0, got {source.weight}")
            for name, sources in (*listed, ("text_validation", self.text_sources))
            for number, source in enumerate(sources)
            if not source.weight > 0
        ]
        if wrong:
            raise ArgumentErrors(wrong)

    @property
    def sources(self) -> list[Source]:
        """All sources: of training, validation and held-out text."""
        return [*self.train_sources, *self.validation_sources, *self.text_sources]

    @property
    def source_names(self) -> list[str]:
        """Short names of the training sources, which batches carry with their samples."""
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
        """Opens every source, so that a missing one is reported before a run begins."""
        for source in self.sources:
            self._folder(source)
        for source in self.text_sources:
            if self._folder(source).has_images:
                raise ValueError(f"data.text_validation holds text alone, but {source.shards} has samples with images")

    def train_dataloader(self) -> PackedLoader:
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

    def val_dataloader(self) -> PackedLoader | list[PackedLoader]:
        """One pass over the validation sources; an empty list if there are none.

        With held-out text it is a list of two, in the order of :attr:`validation_names`.
        """
        loaders = [self.validation_dataloader(name) for name in self.validation_names]
        return loaders[0] if len(loaders) == 1 else loaders

    def validation_dataloader(self, name: str) -> PackedLoader:
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
        """The position of the training stream behind the last batch that the trainer took: all ranks, plain values.

        Raises:
            RuntimeError: if the ranks took different numbers of batches.
        """
        progress = self._progress["train"]
        mine = (progress.batches, progress.counts.state())
        ranks = [mine]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = [mine] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, mine)
            ranks = ranks[:: self.context_parallel]  # one of each group, as all have read the same
        if len({batches for batches, _ in ranks}) != 1:
            raise RuntimeError(f"the ranks took different numbers of batches: {[batches for batches, _ in ranks]}")
        return {
            "state_version": STATE_VERSION,
            "batches": progress.batches,
            "settings": self._now,
            "place": progress.position,
            "tallies": [counts for _, counts in ranks],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues behind the batches of :meth:`state_dict`, from the next ``train_dataloader()`` on.

        The numbers of workers and ranks and the micro-batch size may differ from those of the run before: what it had
        not taken yet is dealt again, and every sample still comes once in each epoch.
        """
        self._restored = state_dict

    def _apply(self, state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if state["state_version"] != STATE_VERSION:
            raise ValueError(
                f"the checkpoint's data state has version {state['state_version']}, known is {STATE_VERSION}"
            )
        then = {RENAMED.get(name, name): value for name, value in state["settings"].items()}
        if state["place"] is not None and then != now:
            changed = ", ".join(f"{k}: {then.get(k)} then, {now[k]} now" for k in now if then.get(k) != now[k])
            raise ValueError(
                f"the run cannot continue exactly where it stopped, because its data differs ({changed}); use the "
                "settings of then, or start a new run from its weights"
            )
        rank, ranks = self._rank()
        counts = [SkipCounts.from_state(one) for one in state["tallies"]]
        if len(counts) != ranks:  # no rank continues the counts of another, so the first one keeps them all
            counts = [sum(counts, SkipCounts()), *([SkipCounts()] * (ranks - 1))]
        self._progress["train"] = Progress(state["batches"], state["place"], counts[rank])
        self._restored = None

    def _settings(self) -> dict[str, Any]:
        """What must be equal for a position to mean the same samples."""
        lengths = [self._length_of(source) for source in self.train_sources]
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "seq_len": self.seq_len,
            "weights": [round(weight, 12) for weight in self._weights(lengths)],
            "weight_unit": self.weight_unit,
            "samples": [one.table.shape[1] for one in lengths],
            "tokens": [int(one.table[0].sum(dtype="int64")) for one in lengths],
        }

    def _rank(self) -> tuple[int, int]:
        """Number of this process's group and how many groups there are; without context parallelism each process is
        a group."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank // self.context_parallel, self.trainer.world_size // self.context_parallel

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

    def _weights(self, lengths: Sequence[Lengths]) -> list[float]:
        sources = self.train_sources
        sizes = [one.counts(self.seq_len).kept for one in lengths]
        has_images = [self._folder(source).has_images for source in sources]
        return mixture(sources, sizes, has_images, self.temperature, self.text_fraction)

    def _loader(self, name: str, sources: Sequence[Source], endless: bool, keep: bool) -> PackedLoader:
        maker = self._maker()
        rank, ranks = self._rank()
        lengths = [self._length_of(source) for source in sources]
        supplies = [one.supply for one in lengths]
        known = sum((one.counts(self.seq_len) for one in lengths), SkipCounts())
        if endless:  # reported here, before any worker is started
            check_usable(supplies, self.seq_len)
        known.check(self.max_skipped, complete=True)
        options = {
            "seq_len": self.seq_len,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "weight_unit": self.weight_unit,
            "endless": endless,
        }
        weights = self._weights(lengths) if endless else [1.0] * len(sources)
        plan = _Plan(supplies, weights, options, ranks, self.micro_batch_size)
        if endless:
            maker.augment = self.augment
        folders = [self._folder(source) for source in sources]
        batches = BatchMaker(folders, maker, self.seq_len, self.loss_reduction, self.seed, source_names(sources))
        progress = self._progress[name] if endless else Progress()
        progress.known = SkipCounts(known.skipped.total(), known.skipped) if rank == 0 else SkipCounts()
        self._progress[name] = progress
        return PackedLoader(PackedDataset(plan, batches, rank), self.workers, progress, keep, self.max_skipped)

"""From planned to packed sequences: reads, decodes and joins their samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neo_components.data.packing import pack
from neo_components.data.plan.pack_plan import PlannedSequence
from neo_components.data.samples import Draft, SampleMaker
from neo_components.data.shards.folder import ShardFolder
from neo_components.data.skip_counts import SampleError, SkipCounts
from neo_components.types import FILLING, LISTS, Batch, Sample


@dataclass
class BatchMaker:
    """Makes micro-batches of planned sequences.

    Args:
        folders: the sources.
        maker: makes samples.
        seq_len: tokens of a packed sequence, L.
        loss_reduction: see ``pack``.
        seed: of augmentation.
        names: of the sources, which batches carry with their samples; empty: batches carry none.
    """

    folders: Sequence[ShardFolder]
    maker: SampleMaker
    seq_len: int
    loss_reduction: str = "square"
    seed: int = 0
    names: Sequence[str] = ()

    def batch(self, sequences: Sequence[PlannedSequence]) -> tuple[Batch, SkipCounts]:
        """The packed sequences, and what happened to their samples.

        A sample that turns out to be unusable leaves its part of the sequence empty, so every rank continues with the
        same number of steps. Without any sequence the batch is one of padding alone.
        """
        counts = SkipCounts()
        made = [self._sequence(sequence, counts) for sequence in sequences]
        return Batch.stack(made or [self._padding()]), counts

    def _sequence(self, sequence: PlannedSequence, counts: SkipCounts) -> Batch:
        samples: list[Sample] = []
        for position, (source, number, length) in enumerate(sequence.members):
            counts.read += 1
            try:
                draft = self._draft(source, number, length)
                sample = self.maker.finish(draft, (self.seed, sequence.number, position))
                sample.source = self.names[source] if self.names else ""
                samples.append(sample)
            except SampleError as error:
                counts.skip(self.folders[source].name(number), error)
        if not samples:
            return self._padding()
        return pack(samples, self.maker.spec, loss_reduction=self.loss_reduction, seq_len=self.seq_len)

    def _draft(self, source: int, number: int, length: int) -> Draft:
        draft = self.maker.draft(self.folders[source].read(number))
        if len(draft.token_ids) != length:
            raise SampleError(
                f"has {len(draft.token_ids)} tokens now, {length} when lengths were counted: its shard was changed "
                "under the run",
                "changed",
            )
        return draft

    def _padding(self) -> Batch:
        """A sequence without any sample: one token that is no target, for every block of the model has to take part."""
        spec = self.maker.spec
        sizes = {name: (1, self.seq_len) for name in FILLING} | {"positions": (1, self.seq_len, 3)}
        columns: dict[str, Any] = {name: torch.full(sizes[name], value) for name, value in FILLING.items()}
        columns["loss_weights"] = columns["loss_weights"].float()
        columns["document_ids"][0, 0] = 0
        patches = torch.zeros(0, spec.channels * spec.patch_size**2)
        columns |= {name: [[]] for name in LISTS}
        return Batch(**columns, patches=patches, patch_positions=torch.zeros(0, 2, dtype=torch.int64))

"""From a planned row to a packed one: its samples are read, decoded and joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neo_components.data.packing import FILLING, pack
from neo_components.data.plan.row_plan import PlannedRow
from neo_components.data.samples import Draft, SampleMaker
from neo_components.data.shards.folder import ShardFolder
from neo_components.data.skip_counts import SampleError, SkipCounts
from neo_components.types import LISTS, Batch, Sample


@dataclass
class RowMaker:
    """Makes batches of planned rows.

    Args:
        folders: the sources.
        maker: makes samples.
        seq_len: tokens of a row, L.
        loss_reduction: see ``pack``.
        seed: of augmentation.
        names: of the sources, told with their samples; empty: none is told.
    """

    folders: Sequence[ShardFolder]
    maker: SampleMaker
    seq_len: int
    loss_reduction: str = "square"
    seed: int = 0
    names: Sequence[str] = ()

    def batch(self, rows: Sequence[PlannedRow]) -> tuple[Batch, SkipCounts]:
        """The rows, and what happened to their samples.

        A sample that turns out to be unusable leaves its place in the row empty, so every rank goes on with the same
        number of steps. Without any row, one of padding alone is made.
        """
        tally = SkipCounts()
        made = [self._row(row, tally) for row in rows]
        return Batch.stack(made or [self._padding()]), tally

    def _row(self, row: PlannedRow, tally: SkipCounts) -> Batch:
        samples: list[Sample] = []
        for place, (source, number, length) in enumerate(row.members):
            tally.read += 1
            try:
                draft = self._draft(source, number, length)
                sample = self.maker.finish(draft, (self.seed, row.number, place))
                sample.source = self.names[source] if self.names else ""
                samples.append(sample)
            except SampleError as error:
                tally.skip(self.folders[source].name(number), error)
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
        """A row without any sample: one token that is not learnt, for every block of the model has to take part."""
        spec = self.maker.spec
        sizes = {name: (1, self.seq_len) for name in FILLING} | {"positions": (1, self.seq_len, 3)}
        columns: dict[str, Any] = {name: torch.full(sizes[name], value) for name, value in FILLING.items()}
        columns["loss_weights"] = columns["loss_weights"].float()
        columns["document_ids"][0, 0] = 0
        patches = torch.zeros(0, spec.channels * spec.patch_size**2)
        columns |= {name: [[]] for name in LISTS}
        return Batch(**columns, patches=patches, patch_positions=torch.zeros(0, 2, dtype=torch.int64))

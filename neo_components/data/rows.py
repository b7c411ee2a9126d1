"""Packs the samples of a stream into rows of fixed length, without splitting or dropping one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neo_components.data.samples import Draft, SampleMaker
from neo_components.data.shard_folder import ShardFolder
from neo_components.data.stream import SampleStream
from neo_components.data.tally import SampleError, Tally
from neo_components.packing import pack
from neo_components.types import Batch, Sample

LOOK_AHEAD = 32
"""Samples among which the next one of a row is chosen."""


@dataclass
class _Waiting:
    """A draft that waits for its row."""

    source: int
    number: int
    draft: Draft
    length: int


class RowStream:
    """Packed rows of one worker.

    Each row begins with the sample that waits longest, then takes the longest of the waiting ones that still fits
    (best fit among the next 32). A sample longer than a row, or one that cannot be used, is skipped and counted.

    Args:
        folders: the sources.
        stream: which sample comes next.
        maker: makes samples.
        row_length: tokens of a row, L.
        loss_reduction: see ``pack``.
        max_skipped: largest share of samples that may be skipped, see :meth:`Tally.check`.
        state: from :meth:`state`, to go on there.
    """

    def __init__(
        self,
        folders: Sequence[ShardFolder],
        stream: SampleStream,
        maker: SampleMaker,
        *,
        row_length: int,
        loss_reduction: str = "square",
        max_skipped: float = 0.01,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._folders, self._stream, self._maker = folders, stream, maker
        self._row_length, self._loss_reduction, self._max_skipped = row_length, loss_reduction, max_skipped
        self._waiting: list[_Waiting] = []
        self._tally = Tally()
        self._ended = False
        if state is not None:
            self._stream.load_state(state["stream"])
            self._tally = Tally.from_state(state["tally"])
            for source, number in state["waiting"]:
                self._waiting.append(self._draft(source, number))

    def state(self) -> dict[str, Any]:
        """The place between two rows, in plain values."""
        waiting = [[entry.source, entry.number] for entry in self._waiting]
        return {"stream": self._stream.state(), "tally": self._tally.state(), "waiting": waiting}

    def next_row(self) -> Batch | None:
        """The next row, a batch of one; ``None`` after the last.

        Raises:
            TooManySkippedError: (a ``ValueError``) if too many samples had to be skipped.
        """
        row: list[Sample] = []
        space = self._row_length
        self._fill()
        while (place := self._choose(space, first=not row)) is not None:
            entry = self._waiting.pop(place)
            try:
                row.append(self._maker.finish(entry.draft))
                space -= entry.length
            except SampleError as error:
                self._skip(entry.source, entry.number, error)
            self._fill()
        if not row:
            return None
        return pack(row, self._maker.spec, loss_reduction=self._loss_reduction, row_length=self._row_length)

    def _choose(self, space: int, first: bool) -> int | None:
        """Place of the waiting sample that comes next into the row."""
        if first:
            return 0 if self._waiting else None
        best, best_length = None, 0
        for place, entry in enumerate(self._waiting):
            if best_length < entry.length <= space:
                best, best_length = place, entry.length
        return best

    def _fill(self) -> None:
        while not self._ended and len(self._waiting) < LOOK_AHEAD:
            epochs = self._stream.epochs
            place = self._stream.next()
            self._ended = place is None
            if self._ended or self._stream.epochs > epochs:
                self._tally.check(self._max_skipped, complete=True)
            if place is None:
                return
            self._tally.read += 1
            try:
                self._waiting.append(self._draft(*place))
            except SampleError as error:
                self._skip(*place, error)

    def _draft(self, source: int, number: int) -> _Waiting:
        draft = self._maker.draft(self._folders[source].read(number))
        length = len(draft.token_ids)
        if length > self._row_length:
            raise SampleError(
                f"{length} tokens do not fit a row of {self._row_length}; raise row_length, lower max_pixels or "
                "set max_length",
                "too_long",
            )
        return _Waiting(source, number, draft, length)

    def _skip(self, source: int, number: int, error: SampleError) -> None:
        self._stream.reject(source)
        self._tally.skip(self._folders[source].name(number), error)
        self._tally.check(self._max_skipped)

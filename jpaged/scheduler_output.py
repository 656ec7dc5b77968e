"""The data of one step: what the scheduler says, and all that a runner needs to know of requests and blocks."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import numpy as np
from jaxtyping import Int32

from .beam_search_params import BeamSearchParams
from .block_manager import BlockCopy
from .sampling_params import SamplingParams


class ScheduledSequence(NamedTuple):
    """The tokens at positions [start, start + num_tokens) of a sequence are computed in this step."""

    seq_id: int
    row: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...] | None  # None: the one token that the row sampled last


class Sample(NamedTuple):
    """A token is to be sampled after token `token_index` of the step's packed tokens, for the sequence of this row.

    It becomes the row's last sample. The token may be another row's: all samples of a request share its prompt.
    """

    seq_id: int
    row: int
    token_index: int


class NewRow(NamedTuple):
    """A row gets a new occupant; nothing of the one before is to remain."""

    row: int
    seq_id: int
    sample_index: int  # the sequence's, within its request
    prompt_len: int
    params: SamplingParams | BeamSearchParams
    seed: int
    stop_token_ids: frozenset[int]
    token_ids: tuple[int, ...]  # all that are known, prompt and generated: those in the cache are not sent again
    bad_words: tuple[tuple[int, ...], ...] = ()  # in tokens


class TableUpdate(NamedTuple):
    """From index `first` on, the row's block table now reads `block_ids`, as far as these go."""

    row: int
    first: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ScheduledSequences(Sequence[ScheduledSequence]):
    """R sequences and their T tokens, packed in this order, as columns; as items they are `ScheduledSequence`s.

    First the `num_sampled` sequences whose one token is their row's last sample, then others of one token, then
    those of several.

    >>> sequences = ScheduledSequences.of([ScheduledSequence(7, 2, 30, 1, None), ScheduledSequence(8, 0, 0, 2, (5, 6))])
    >>> sequences.starts, sequences.token_ids, sequences.num_sampled
    (array([30,  0], dtype=int32), array([5, 6], dtype=int32), 1)
    """

    seq_ids: tuple[int, ...]
    rows: Int32[np.ndarray, " R"]
    starts: Int32[np.ndarray, " R"]
    lengths: Int32[np.ndarray, " R"]
    num_sampled: int
    token_ids: Int32[np.ndarray, " T-num_sampled"]  # of the sequences after the first `num_sampled`, packed

    @classmethod
    def of(cls, items: Iterable[ScheduledSequence]) -> "ScheduledSequences":
        """The columns of these, which come in the order given above."""
        items = list(items)
        seq_ids, rows, starts, lengths, token_ids = zip(*items, strict=True) if items else ((),) * 5
        known = [ids for ids in token_ids if ids is not None]
        return cls(
            seq_ids,
            np.array(rows, np.int32),
            np.array(starts, np.int32),
            np.array(lengths, np.int32),
            len(items) - len(known),
            np.array([token_id for ids in known for token_id in ids], np.int32),
        )

    @property
    def num_tokens(self) -> int:
        return self.num_sampled + len(self.token_ids)

    @property
    def num_decodes(self) -> int:
        """So many sequences of one token stand first."""
        return int(np.count_nonzero(self.lengths == 1))

    def __len__(self) -> int:
        return len(self.seq_ids)

    def __iter__(self) -> Iterator[ScheduledSequence]:
        end = -self.num_sampled
        columns = (self.rows.tolist(), self.starts.tolist(), self.lengths.tolist())
        for seq_id, row, start, length in zip(self.seq_ids, *columns, strict=True):
            end += length
            token_ids = None if end <= 0 else tuple(self.token_ids[end - length : end].tolist())
            yield ScheduledSequence(seq_id, row, start, length, token_ids)

    @overload
    def __getitem__(self, index: int) -> ScheduledSequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[ScheduledSequence]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return list(self)[index]


@dataclass(frozen=True, slots=True, eq=False)
class Samples(Sequence[Sample]):
    """A step's samples as columns; as items they are `Sample`s."""

    seq_ids: tuple[int, ...]
    rows: Int32[np.ndarray, " S"]
    token_indices: Int32[np.ndarray, " S"]

    @classmethod
    def of(cls, items: Iterable[Sample]) -> "Samples":
        items = list(items)
        seq_ids, rows, token_indices = zip(*items, strict=True) if items else ((),) * 3
        return cls(seq_ids, np.array(rows, np.int32), np.array(token_indices, np.int32))

    def __len__(self) -> int:
        return len(self.seq_ids)

    def __iter__(self) -> Iterator[Sample]:
        return map(Sample._make, zip(self.seq_ids, self.rows.tolist(), self.token_indices.tolist(), strict=True))

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return list(self)[index]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SchedulerOutput:
    """The data of one step, and of block tables only what changed.

    Plain data (ints, tuples, NumPy arrays, SamplingParams), so that several hosts can run the same step. Steps run in
    the order in which they were scheduled. A runner does, in this order: `new_rows`, `table_updates`; then on the
    device `swap_out`, `swap_in`, `copies`; then the forward pass, in which every token's keys and values are written
    before any token attends, so that sequences can read blocks that others write in the same step.

    Within each of `swap_out`, `swap_in` and `copies` destinations are unique and none is also a source; a source may
    come several times. The arrays are never written again: the next outputs may share them.

    A step of no tokens may still have blocks to move; if `is_empty`, nothing is to run. Either way it goes to
    `Scheduler.update`.
    """

    new_rows: tuple[NewRow, ...] = ()
    table_updates: tuple[TableUpdate, ...] = ()
    swap_out: tuple[BlockCopy, ...] = ()  # from the device's pool to the host's
    swap_in: tuple[BlockCopy, ...] = ()  # from the host's pool to the device's
    copies: tuple[BlockCopy, ...] = ()  # within the device's pool
    sequences: ScheduledSequences = field(default_factory=lambda: ScheduledSequences.of(()))
    samples: Samples = field(default_factory=lambda: Samples.of(()))
    ended: tuple[str, ...] = ()  # requests that can never fit, or outgrew the pool: see their group's `error`

    @property
    def num_tokens(self) -> int:
        return self.sequences.num_tokens

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing for the device to do."""
        return not (self.num_tokens or self.swap_out or self.swap_in or self.copies)

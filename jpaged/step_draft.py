"""A SchedulerOutput in the making."""

from array import array
from collections.abc import Iterable

import numpy as np

from .block_manager import BlockCopy
from .decode_batch import NO_DECODES, DecodeColumns
from .scheduler_output import NewRow, Samples, ScheduledSequences, SchedulerOutput, TableUpdate
from .sequence import Sequence, SequenceGroup


class StepDraft:
    """Collects what a step does; what it does for a sequence can be withdrawn until tokens are scheduled."""

    def __init__(self, budget: int) -> None:
        self.budget = budget  # tokens that the step may still take
        self.ended: list[str] = []
        self.moved: list[SequenceGroup] = []  # whose blocks the step copies or swaps
        self.sampled: list[Sequence] = []  # after the decodes, in order of the samples
        self.has_preempted = False
        self._decodes = NO_DECODES, _int32(())
        self._known: list[tuple[Sequence, int, array[int]]] = []  # from which position on, and which tokens
        self._samples: list[tuple[Sequence, list[Sequence]]] = []  # whose last token, and for whom
        self._new_rows: list[NewRow] = []
        self._table_updates: dict[int, TableUpdate] = {}  # by seq_id
        self._copies: dict[int, BlockCopy] = {}  # by seq_id
        self._swap_out: list[BlockCopy] = []
        self._swap_in: list[BlockCopy] = []

    def decode(self, columns: DecodeColumns, starts: np.ndarray) -> None:
        """These compute, and are followed by, a sampled token each."""
        self._decodes = columns, starts
        self.budget -= len(starts)

    def compute(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence computes its next known tokens."""
        assert sequence.packed_ids is not None
        start = sequence.num_computed
        sequence.num_computed += num_tokens
        self._known.append((sequence, start, sequence.packed_ids[start : sequence.num_computed]))
        self.budget -= num_tokens

    def sample(self, after: Sequence, sequences: list[Sequence]) -> None:
        """Of each of these a token is sampled after the last that the sequence `after` computes."""
        self._samples.append((after, sequences))

    def occupy_row(self, group: SequenceGroup, sequence: Sequence) -> None:
        assert sequence.row is not None
        self._new_rows.append(
            NewRow(
                sequence.row,
                sequence.seq_id,
                sequence.index,
                sequence.prompt_len,
                group.params,
                group.seed,
                group.stop_token_ids,
                tuple(sequence.token_ids),
                group.bad_words,
            )
        )

    def update_table(self, sequence: Sequence, first: int, block_ids: tuple[int, ...]) -> None:
        assert sequence.row is not None
        self._table_updates[sequence.seq_id] = TableUpdate(sequence.row, first, block_ids)

    def copy(self, group: SequenceGroup, sequence: Sequence, copies: Iterable[BlockCopy]) -> None:
        for copy in copies:  # there is at most one
            self._copies[sequence.seq_id] = copy
            self.moved.append(group)

    def swap_in(self, group: SequenceGroup, copies: list[BlockCopy]) -> None:
        self._swap_in += copies
        self.moved.append(group)

    def swap_out(self, group: SequenceGroup, copies: list[BlockCopy], withdrawn: dict[int, int]) -> None:
        """`withdrawn`: from blocks that the step would have filled, by copies, to those that hold the contents."""
        self._swap_out += [BlockCopy(withdrawn.get(src, src), dst) for src, dst in copies]
        self.moved.append(group)

    def withdraw(self, sequence: Sequence) -> dict[int, int]:
        """Nothing is done for the sequence; returns its copies, from destination to source."""
        self._table_updates.pop(sequence.seq_id, None)
        copy = self._copies.pop(sequence.seq_id, None)
        return {} if copy is None else {copy.dst: copy.src}

    def output(self) -> SchedulerOutput:
        """The step, and in `sampled` whose tokens the samples after the decodes are."""
        known = sorted(self._known, key=lambda item: len(item[2]) > 1)  # those of one token first
        sequences = self._sequences(known)
        return SchedulerOutput(
            new_rows=tuple(self._new_rows),
            table_updates=tuple(self._table_updates.values()),
            swap_out=tuple(self._swap_out),
            swap_in=tuple(self._swap_in),
            copies=tuple(self._copies.values()),
            sequences=sequences,
            samples=self._take_samples(known),
            ended=tuple(self.ended),
        )

    def _sequences(self, known: list[tuple[Sequence, int, array[int]]]) -> ScheduledSequences:
        items = [(sequence.seq_id, sequence.row, start, len(ids)) for sequence, start, ids in known]
        seq_ids, rows, starts, lengths = zip(*items, strict=True) if items else ((),) * 4
        token_ids = np.frombuffer(b"".join([ids.tobytes() for _, _, ids in known]), np.int32)
        columns, decode_starts = self._decodes
        n = len(decode_starts)
        if not known:
            return ScheduledSequences(columns.seq_ids, columns.rows, decode_starts, columns.ones, n, _int32(()))
        return ScheduledSequences(
            columns.seq_ids + seq_ids,
            np.concatenate([columns.rows, _int32(rows)]),
            np.concatenate([decode_starts, _int32(starts)]),
            np.concatenate([columns.ones, _int32(lengths)]),
            n,
            token_ids,
        )

    def _take_samples(self, known: list[tuple[Sequence, int, array[int]]]) -> Samples:
        columns, _ = self._decodes
        index = len(columns.seq_ids) - 1
        last_token = {}
        for sequence, _, ids in known:
            index += len(ids)
            last_token[sequence.seq_id] = index
        self.sampled = [sequence for _, sequences in self._samples for sequence in sequences]
        seq_ids = tuple([sequence.seq_id for sequence in self.sampled])
        rows = _int32([sequence.row for sequence in self.sampled])
        indices = _int32([last_token[after.seq_id] for after, sequences in self._samples for _ in sequences])
        if not seq_ids:
            return Samples(columns.seq_ids, columns.rows, columns.indices)
        return Samples(
            columns.seq_ids + seq_ids,
            np.concatenate([columns.rows, rows]),
            np.concatenate([columns.indices, indices]),
        )


def _int32(values: object) -> np.ndarray:
    return np.array(values, np.int32)

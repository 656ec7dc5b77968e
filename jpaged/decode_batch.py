"""The sequences that compute, each step, the one token they sampled last: columns that are kept between steps."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from .sequence import Sequence, SequenceGroup


@dataclass(frozen=True, slots=True, eq=False)
class DecodeColumns:
    """R sequences of a batch, as they were at one step. Never changed: steps with the same members share them."""

    groups: tuple[SequenceGroup, ...]  # each sequence's
    sequences: tuple[Sequence, ...]
    add_token: tuple[Callable[[int], None], ...]  # each sequence's token_ids.append
    seq_ids: tuple[int, ...]
    rows: Int32[np.ndarray, " R"]
    ones: Int32[np.ndarray, " R"]
    indices: Int32[np.ndarray, " R"]  # 0, 1, …
    max_lens: Int32[np.ndarray, " R"]
    distinct_groups: tuple[SequenceGroup, ...]
    stop_token_ids: frozenset[int]  # of any of them


_NONE = np.zeros(0, np.int32)
NO_DECODES = DecodeColumns((), (), (), (), _NONE, _NONE, _NONE, _NONE, (), frozenset())


class DecodeBatch:
    """Members stand in order of service. A step costs the host little more than for those that need attention.

    While a sequence is a member, its `num_computed` is the batch's `starts`, and is written back when it leaves.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._keys: list[tuple[int, int, int]] = []
        self._groups: list[SequenceGroup] = []
        self._sequences: list[Sequence] = []
        self._state = np.zeros((4, max_num_seqs), np.int32)
        self._columns: DecodeColumns | None = None  # of all members; None once they have changed

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def starts(self) -> Int32[np.ndarray, " R"]:
        """The position of each member's next token."""
        return self._state[0, : len(self)]

    def add(self, group: SequenceGroup, sequence: Sequence) -> None:
        """All known tokens of the sequence are computed; from now on it computes what it samples."""
        assert sequence.row is not None
        key = _key(group, sequence)
        i, n = bisect_left(self._keys, key), len(self)
        self._keys.insert(i, key)
        self._groups.insert(i, group)
        self._sequences.insert(i, sequence)
        if i < n:
            self._state[:, i + 1 : n + 1] = self._state[:, i:n]
        sequence.is_decoding = True
        self._state[:, i] = sequence.num_computed, _end(group, sequence), sequence.row, group.max_len
        self._columns = None

    def discard(self, group: SequenceGroup, sequence: Sequence) -> None:
        """Take the sequence out, if it is a member."""
        if not sequence.is_decoding:
            return
        i, n = bisect_left(self._keys, _key(group, sequence)), len(self)
        sequence.is_decoding = False
        sequence.num_computed = int(self._state[0, i])
        del self._keys[i], self._groups[i], self._sequences[i]
        self._state[:, i : n - 1] = self._state[:, i + 1 : n]
        self._columns = None

    def due(self) -> list[tuple[SequenceGroup, Sequence, int, int]]:
        """Members that have no room for their next token, or compute none any more.

        With that token's position, and each one's place in the batch.
        """
        n = len(self._keys)
        due = (self._state[0, :n] == self._state[1, :n]).nonzero()[0]
        starts = self._state[0, due].tolist()
        return [(self._groups[i], self._sequences[i], start, i) for i, start in zip(due.tolist(), starts, strict=True)]

    def grown(self, group: SequenceGroup, sequence: Sequence, place: int) -> None:
        """The member, whose place was `place` unless some have left since, has room for `num_slots` tokens now."""
        if place >= len(self) or self._sequences[place] is not sequence:
            place = bisect_left(self._keys, _key(group, sequence))
        self._state[1, place] = _end(group, sequence)

    def advance(self, budget: int, left_out: set[int]) -> tuple[DecodeColumns, Int32[np.ndarray, " R"]]:
        """Those that compute a token now, and its positions: at most `budget` members, none of `left_out`'s ids."""
        if self._columns is None:
            self._columns = _columns(self._groups, self._sequences, self._state[:, : len(self)])
        if len(self) <= budget and not left_out:
            starts = self.starts.copy()
            self.starts[:] += 1
            return self._columns, starts
        chosen = [i for i, seq_id in enumerate(self._columns.seq_ids) if seq_id not in left_out][:budget]
        starts = self.starts[chosen]
        self.starts[chosen] += 1
        groups, sequences = [self._groups[i] for i in chosen], [self._sequences[i] for i in chosen]
        return _columns(groups, sequences, self._state[:, chosen]), starts


def _columns(groups: list[SequenceGroup], sequences: list[Sequence], state: Int32[np.ndarray, "4 R"]) -> DecodeColumns:
    distinct = tuple(dict.fromkeys(groups))
    return DecodeColumns(
        groups=tuple(groups),
        sequences=tuple(sequences),
        add_token=tuple([sequence.token_ids.append for sequence in sequences]),
        seq_ids=tuple([sequence.seq_id for sequence in sequences]),
        rows=state[2].copy(),
        ones=np.ones(len(sequences), np.int32),
        indices=np.arange(len(sequences), dtype=np.int32),
        max_lens=state[3].copy(),
        distinct_groups=distinct,
        stop_token_ids=frozenset().union(*{group.stop_token_ids for group in distinct}),
    )


def _key(group: SequenceGroup, sequence: Sequence) -> tuple[int, int, int]:
    return *group.order, sequence.index


def _end(group: SequenceGroup, sequence: Sequence) -> int:
    """The position at which the member is due. The last token of all is sampled, and not computed."""
    return min(sequence.num_slots, group.max_len - 1)

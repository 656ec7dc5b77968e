"""A runner without a device, for the host's tests: a model whose next token depends on all that its blocks show.

Like the runner on a device it knows only what SchedulerOutputs have told it. In place of keys and values, which depend
on all tokens up to theirs, a slot holds its token and a checksum of the tokens up to it. A wrong table, a copy left
out, a block written too early or a row left over from someone else is found when a token attends to it.
"""

import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jpaged.block_manager import BlockCopy
from jpaged.scheduler_output import NewRow, SchedulerOutput

STOP = 0
VOCAB = 40
EMPTY = 0  # the checksum of no tokens


def checksum(before: int, token_id: int) -> int:
    """Of some tokens and one more, by that of the tokens before."""
    return zlib.crc32(token_id.to_bytes(4, "little"), before)


def checksum_of(token_ids: Iterable[int]) -> int:
    result = EMPTY
    for token_id in token_ids:
        result = checksum(result, token_id)
    return result


def next_token(seed: int, sample_index: int, seen: int) -> int:
    """What is sampled after tokens with the checksum `seen`. Token 0 ends."""
    return zlib.crc32(repr((seed, sample_index, seen)).encode()) % VOCAB


def candidates(seen: int, n: int) -> list[tuple[int, int]]:
    """A beam's `n` likeliest tokens, as (cost, token id), the least cost first."""
    return sorted((zlib.crc32(bytes([token_id]), seen) % 1000, token_id) for token_id in range(1, VOCAB))[:n]


class Pool:
    """What each slot of one memory holds: token ids and checksums."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.tokens = np.full((num_blocks, block_size), -1, np.int64)
        self.checksums = np.full((num_blocks, block_size), -1, np.int64)

    def copy_from(self, other: "Pool", copies: Sequence[BlockCopy]) -> None:
        """All at once, as one launch does."""
        destinations = [dst for _, dst in copies]
        assert len(set(destinations)) == len(destinations)
        sources = [src for src, _ in copies]
        assert other is not self or not set(sources) & set(destinations)
        self.tokens[destinations] = other.tokens[sources]
        self.checksums[destinations] = other.checksums[sources]

    def clear(self) -> None:
        self.tokens[:] = self.checksums[:] = -1


class StepRun(NamedTuple):
    """What a step brought."""

    token_ids: list[int]  # the samples
    seen: list[int]  # for each of them, the checksum of the tokens before it
    slots: list[tuple[int, int]]  # written, as block and offset


class FakeRunner:
    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.block_size = block_size
        self.device, self.host = Pool(num_blocks, block_size), Pool(num_host_blocks, block_size)
        self.occupants: dict[int, NewRow] = {}
        self.tables: dict[int, list[int]] = {}
        self.last_samples: dict[int, int] = {}

    def execute(self, output: SchedulerOutput) -> StepRun:
        for new_row in output.new_rows:
            self.occupants[new_row.row] = new_row
            self.tables[new_row.row] = []
            self.last_samples.pop(new_row.row, None)
        for row, first, block_ids in output.table_updates:
            assert first <= len(self.tables[row])
            self.tables[row][first : first + len(block_ids)] = block_ids
        self.host.copy_from(self.device, output.swap_out)
        self.device.copy_from(self.host, output.swap_in)
        self.device.copy_from(self.device, output.copies)
        slots = self._forward(output)
        position_of = [s.start + i for s in output.sequences for i in range(s.num_tokens)]
        token_ids, seen = [], []
        for seq_id, row, token_index in output.samples:
            occupant = self.occupants[row]
            assert occupant.seq_id == seq_id
            seen.append(self.check(row, position_of[token_index] + 1))
            token_ids.append(next_token(occupant.seed, occupant.sample_index, seen[-1]))
        for (_, row, _), token_id in zip(output.samples, token_ids, strict=True):
            self.last_samples[row] = token_id
        return StepRun(token_ids, seen, slots)

    def check(self, row: int, num_tokens: int) -> int:
        """The checksum of the row's first tokens, each of which must have been computed after those before it."""
        tokens, checksums = (array.tolist() for array in self._shown(row, num_tokens))
        seen = EMPTY
        for token_id, stored in zip(tokens, checksums, strict=True):
            seen = checksum(seen, token_id)
            assert stored == seen, f"row {row} attends to a token that was computed after others than those before it"
        return seen

    def _forward(self, output: SchedulerOutput) -> list[tuple[int, int]]:
        # Every token is written before any attends, so that the blocks of others in the same step can be read.
        slots = []
        for seq_id, row, start, num_tokens, token_ids in output.sequences:
            assert self.occupants[row].seq_id == seq_id
            token_ids = (self.last_samples[row],) if token_ids is None else token_ids
            assert len(token_ids) == num_tokens > 0
            for position, token_id in enumerate(token_ids, start):
                block, offset = divmod(position, self.block_size)
                slots.append((self.tables[row][block], offset))
                self.device.tokens[slots[-1]] = token_id
        assert len(set(slots)) == len(slots) == output.num_tokens
        for _, row, start, num_tokens, _ in output.sequences:
            tokens = self._shown(row, start + num_tokens)[0].tolist()
            seen = checksum_of(tokens[:start])
            for position, token_id in enumerate(tokens[start:], start):
                seen = checksum(seen, token_id)
                block, offset = divmod(position, self.block_size)
                self.device.checksums[self.tables[row][block], offset] = seen
        for _, row, start, num_tokens, _ in output.sequences:
            self.check(row, start + num_tokens)
        return slots

    def _shown(self, row: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        table = self.tables[row][: -(-num_tokens // self.block_size)]
        tokens = self.device.tokens[table].reshape(-1)[:num_tokens]
        assert len(tokens) == num_tokens
        assert (tokens >= 0).all()
        return tokens, self.device.checksums[table].reshape(-1)[:num_tokens]

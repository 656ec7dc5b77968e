"""Which blocks of the cache hold which sequence: the block tables, on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


class Allocation(Enum):
    """Whether there is room: now, once others have given back theirs, or never in this pool."""

    OK = "ok"
    LATER = "later"
    NEVER = "never"


class BlockCopy(NamedTuple):
    """The contents of block `src`, in all layers, are to be copied to block `dst`."""

    src: int
    dst: int


class NoFreeBlocks(Exception):
    """The pool has fewer free blocks than were asked for. Nothing was changed."""


class UnknownSequence(KeyError, ValueError):
    """No blocks are held under this id: it never had any (KeyError), or freed them before (ValueError)."""

    def __str__(self) -> str:  # not KeyError's, which quotes the message
        return str(self.args[0])


@dataclass(slots=True)
class _Holding:
    """What one sequence holds."""

    blocks: list[int] = field(default_factory=list)  # the block table; always just enough for `length`
    length: int = 0  # tokens there is room for
    committed: int = 0  # tokens written, at most `length`


class BlockManager:
    """Hands out the `num_blocks` blocks, of `block_size` token slots each, that the cache is made of.

    A sequence's token at position p lives in slot p % block_size of block_table(seq_id)[p // block_size].
    A call that raises has changed nothing: NoFreeBlocks, UnknownSequence (a KeyError), else ValueError.

    >>> blocks = BlockManager(num_blocks=4, block_size=2)
    >>> blocks.allocate(0, [11, 12, 13])
    >>> blocks.append(0, 2)
    >>> blocks.block_table(0), blocks.num_free_blocks
    ((0, 1, 2), 1)
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks: expected at least 1, got {num_blocks}")
        if block_size < 1:
            raise ValueError(f"block_size: expected at least 1, got {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))[::-1]  # a stack: the block freed last is used first
        self._holdings: dict[int, _Holding] = {}
        self._num_used_slots = 0

    def can_allocate(self, *token_ids: Sequence[int], num_seqs: int = 1, keep_free: int = 0) -> Allocation:
        """Whether `num_seqs` sequences of each of `token_ids` find room, and leave `keep_free` blocks free.

        `keep_free` delays (LATER) but forbids nothing: NEVER says that the whole pool is too small.
        """
        needed = num_seqs * sum(self.blocks_for(len(ids)) for ids in token_ids)
        if needed > self.num_blocks:
            return Allocation.NEVER
        return Allocation.OK if needed + keep_free <= self.num_free_blocks else Allocation.LATER

    def allocate(self, seq_id: int, token_ids: Sequence[int]) -> None:
        """Make room for all of a new sequence's tokens."""
        if seq_id in self._holdings:
            raise ValueError(f"seq_id: expected a sequence without blocks, got {seq_id}, which holds some")
        if not token_ids:
            raise ValueError("token_ids: expected at least one token, got none")
        holding = _Holding()
        self._grow(holding, len(token_ids))
        self._holdings[seq_id] = holding

    def append(self, seq_id: int, n: int) -> None:
        """Make room for `n` more tokens."""
        holding = self._find(seq_id)
        if n < 1:
            raise ValueError(f"n: expected at least 1, got {n}")
        self._grow(holding, holding.length + n)

    def commit(self, seq_id: int, token_ids: Sequence[int]) -> None:
        """Note that the keys and values of the next tokens, these, are now written."""
        holding = self._find(seq_id)
        committed = holding.committed + len(token_ids)
        if committed > holding.length:
            room = holding.length - holding.committed
            raise ValueError(f"token_ids: expected at most {room}, sequence {seq_id}'s room, got {len(token_ids)}")
        holding.committed = committed
        self._num_used_slots += len(token_ids)

    def truncate(self, seq_id: int, length: int) -> None:
        """Keep room for the first `length` tokens only, and give back the blocks past them."""
        holding = self._find(seq_id)
        if not 0 <= length <= holding.length:
            raise ValueError(f"length: expected 0 to {holding.length}, sequence {seq_id}'s room, got {length}")
        self._shrink(holding, length)

    def free(self, seq_id: int) -> None:
        """Give back all that the sequence holds, and forget it."""
        self._shrink(self._find(seq_id), 0)
        del self._holdings[seq_id]

    def block_table(self, seq_id: int) -> tuple[int, ...]:
        """The ids of the sequence's blocks, in order of the positions they hold."""
        return tuple(self._find(seq_id).blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_held_slots(self) -> int:
        """Slots of all blocks that sequences hold."""
        return (self.num_blocks - len(self._free)) * self.block_size

    @property
    def num_used_slots(self) -> int:
        """Those of the held slots whose token is committed."""
        return self._num_used_slots

    def _find(self, seq_id: int) -> _Holding:
        try:
            return self._holdings[seq_id]
        except KeyError:
            raise UnknownSequence(f"seq_id: expected a sequence that holds blocks, got {seq_id}") from None

    def _grow(self, holding: _Holding, length: int) -> None:
        missing = self.blocks_for(length) - len(holding.blocks)
        if missing > len(self._free):
            raise NoFreeBlocks(f"{missing} more blocks needed, {len(self._free)} of {self.num_blocks} free")
        for _ in range(missing):
            holding.blocks.append(self._free.pop())
        holding.length = length

    def _shrink(self, holding: _Holding, length: int) -> None:
        for _ in range(len(holding.blocks) - self.blocks_for(length)):
            self._free.append(holding.blocks.pop())
        holding.length = length
        self._num_used_slots -= max(0, holding.committed - length)
        holding.committed = min(holding.committed, length)

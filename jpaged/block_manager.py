"""Which blocks of the cache hold which sequence: the block tables, on the host."""

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256
from typing import NamedTuple

from .block_pool import BlockPool, NoFreeBlocks

__all__ = ["Allocation", "BlockCopy", "BlockManager", "NoFreeBlocks", "UnknownSequence"]


class Allocation(Enum):
    """Whether there is room: now, once others have given back theirs, or never in this pool."""

    OK = "ok"
    LATER = "later"
    NEVER = "never"


class BlockCopy(NamedTuple):
    """The contents of block `src`, in all layers, are to be copied to block `dst`."""

    src: int
    dst: int


class UnknownSequence(KeyError, ValueError):
    """No blocks are held under this id: it never had any (KeyError), or freed them before (ValueError)."""

    def __str__(self) -> str:  # not KeyError's, which quotes the message
        return str(self.args[0])


@dataclass(slots=True)
class _Holding:
    """What one sequence holds."""

    blocks: list[int]  # the block table; always just enough for `length`
    length: int  # tokens there is room for
    token_ids: array[int]  # those committed, and after them those that `allocate` announced
    root: bytes  # what the first block's hash starts from: the salt
    committed: int = 0  # tokens written, at most `length`
    hashes: list[bytes] = field(default_factory=list)  # of the first full blocks of `token_ids`, as far as computed
    num_published: int = 0  # so many of the first blocks have been published
    on_host: bool = False  # `blocks` are the host pool's

    def copy(self, length: int, block_size: int) -> "_Holding":
        """The same for the first `length` tokens."""
        committed = min(self.committed, length)
        return _Holding(
            self.blocks[: -(-length // block_size)],
            length,
            self.token_ids[:length],
            self.root,
            committed,
            self.hashes[: length // block_size],
            min(self.num_published, length // block_size),
            self.on_host,
        )


class BlockManager:
    """Hands out the `num_blocks` blocks, of `block_size` token slots each, that the cache is made of.

    A sequence's token at position p lives in slot p % block_size of block_table(seq_id)[p // block_size]. Sequences
    may hold the same block; one that appends into a block which others hold gets a copy of it (copy-on-write, arXiv
    2309.06180, 4.4).

    With `prefix_caching`, `allocate` finds the full blocks that other sequences have committed with the same tokens
    from the start on, and the same salt, whether those still hold them or have freed them since: a block's hash is
    taken over the hash of the block before it (or the salt) and its own token ids. A free block that can still be
    found counts as free.

    A call that raises has changed nothing: NoFreeBlocks, UnknownSequence (a KeyError and a ValueError), or else
    ValueError or TypeError.

    Args:
      num_blocks: on the device.
      block_size: tokens a block holds.
      num_host_blocks: of the pool on the host to which sequences are swapped out.
      prefix_caching: whether full blocks can be found by other sequences. Those of `reserve` can in any case.

    >>> blocks = BlockManager(num_blocks=4, block_size=2)
    >>> blocks.allocate(0, [11, 12, 13])
    0
    >>> blocks.fork(0, 1)
    >>> blocks.append(0, 1)  # into the half-full block that sequence 1 holds too
    [BlockCopy(src=1, dst=2)]
    >>> blocks.block_table(0), blocks.block_table(1), blocks.num_free_blocks
    ((0, 2), (0, 1), 1)
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, num_host_blocks: int = 0, prefix_caching: bool = False
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks: expected at least 1, got {num_blocks}")
        if block_size < 1:
            raise ValueError(f"block_size: expected at least 1, got {block_size}")
        if num_host_blocks < 0:
            raise ValueError(f"num_host_blocks: expected at least 0, got {num_host_blocks}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_host_blocks = num_host_blocks
        self.prefix_caching = prefix_caching
        self._device = BlockPool(num_blocks, keeps_contents=prefix_caching)
        self._host = BlockPool(num_host_blocks, keeps_contents=False)
        self._holdings: dict[int, _Holding] = {}
        self._reserved: set[int] = set()  # sequences whose blocks can be found even without prefix caching
        self._record: list[tuple[int, bytes]] | None = None
        # The last prompt looked up: that at the head of the queue is asked for again and again, and others begin alike.
        self._last_chain = _token_ids(()), b"", list[bytes]()

    def can_allocate(
        self,
        token_ids: Sequence[int],
        *,
        num_seqs: int = 1,
        salt: str | None = None,
        use_cached: bool = True,
        keep_free: int = 0,
    ) -> Allocation:
        """Whether a sequence of these tokens finds room, and leaves `keep_free` blocks free.

        `num_seqs` sequences that fork from it find room, too, for a last block of their own each.
        `keep_free` delays (LATER) but forbids nothing: NEVER says that the whole pool is too small.
        """
        needed = self.blocks_for(len(token_ids))
        if len(token_ids) % self.block_size:
            needed += num_seqs - 1
        if needed > self.num_blocks:
            return Allocation.NEVER
        _, hits = self._look_up(_token_ids(token_ids), _root(salt)) if use_cached else ([], [])
        needed -= len(hits) - self._device.num_free_of(hits)
        return Allocation.OK if needed + keep_free <= self.num_free_blocks else Allocation.LATER

    def allocate(
        self,
        seq_id: int,
        token_ids: Sequence[int],
        *,
        salt: str | None = None,
        use_cached: bool = True,
        keep_free: int = 0,
    ) -> int:
        """Make room for all of a new sequence's tokens, and return how many of them are in the cache already.

        Those are whole blocks, and never all tokens: at least one is left to compute. They count as committed;
        `commit` takes the others in the order announced here. `use_cached=False` has all of them computed.
        NoFreeBlocks where that would leave fewer than `keep_free` blocks free.
        """
        if seq_id in self._holdings:
            raise ValueError(f"seq_id: expected a sequence without blocks, got {seq_id}, which holds some")
        if len(token_ids) == 0:
            raise ValueError("token_ids: expected at least one token, got none")
        ids, root = _token_ids(token_ids), _root(salt)
        hashes, hits = self._look_up(ids, root) if use_cached else ([], [])
        num_new = self.blocks_for(len(ids)) - len(hits)
        num_free = self.num_free_blocks - self._device.num_free_of(hits)
        if num_new + keep_free > num_free:
            kept = f", {keep_free} to be kept free" if keep_free else ""
            raise NoFreeBlocks(f"{num_new} more blocks needed, {num_free} of {self.num_blocks} free{kept}")
        self._device.hold(hits)  # before any block is taken, so that none of these is
        self._holdings[seq_id] = _Holding(
            blocks=hits + self._device.take(num_new),
            length=len(ids),
            token_ids=ids,
            root=root,
            committed=len(hits) * self.block_size,
            hashes=hashes[:],
            num_published=len(hits),
        )
        return len(hits) * self.block_size

    def append(self, seq_id: int, n: int) -> list[BlockCopy]:
        """Make room for `n` more tokens.

        Returns the copy that is due before the first of them is written, where other sequences hold the block that it
        goes into; the last one to append into a block keeps it.
        """
        holding = self._find_on_device(seq_id)
        if n < 1:
            raise ValueError(f"n: expected at least 1, got {n}")
        length = holding.length + n
        num_new = -(-length // self.block_size) - len(holding.blocks)
        copies = []
        if holding.length % self.block_size:
            last = holding.blocks[-1]
            if self._device.ref_count(last) > 1:
                dst, *new = self._device.take(1 + num_new)
                self._device.drop((last,))
                holding.blocks[-1] = dst
                copies.append(BlockCopy(last, dst))
            else:
                new = self._device.take(num_new)
                self._device.unpublish(last)  # its contents change
            holding.num_published = min(holding.num_published, len(holding.blocks) - 1)
        else:
            new = self._device.take(num_new)
        holding.blocks += new
        holding.length = length
        return copies

    def commit(self, seq_id: int, token_ids: Sequence[int]) -> None:
        """The ids of the next tokens that are written, in order: the blocks now full can be found by others.

        ValueError where there is no room for them, or they are not those that `allocate` announced.
        """
        holding = self._find(seq_id)
        start, end = holding.committed, holding.committed + len(token_ids)
        if end > holding.length:
            raise ValueError(
                f"token_ids: expected at most {holding.length - start}, sequence {seq_id}'s room, got {len(token_ids)}"
            )
        new = _token_ids(token_ids)
        if start < len(holding.token_ids):
            announced = holding.token_ids[start:end]
            if announced != new[: len(announced)]:
                raise ValueError(
                    f"token_ids: expected {announced.tolist()}, which allocate announced, got {new.tolist()}"
                )
            new = new[len(announced) :]
        holding.token_ids.extend(new)
        holding.committed = end
        if self.prefix_caching and not holding.on_host:
            self._publish(holding)

    def truncate(self, seq_id: int, length: int) -> None:
        """Keep room for the first `length` tokens only. Nobody can find the blocks past them any longer."""
        holding = self._find_on_device(seq_id)
        if not 0 <= length <= holding.length:
            raise ValueError(f"length: expected 0 to {holding.length}, sequence {seq_id}'s room, got {length}")
        num_blocks, num_full = self.blocks_for(length), length // self.block_size
        for block in holding.blocks[num_full : holding.num_published]:
            self._device.unpublish(block)
        self._device.drop(reversed(holding.blocks[num_blocks:]))
        del holding.blocks[num_blocks:], holding.token_ids[length:], holding.hashes[num_full:]
        holding.length = length
        holding.committed = min(holding.committed, length)
        holding.num_published = min(holding.num_published, num_full)

    def fork(self, parent_id: int, child_id: int, *, length: int | None = None) -> None:
        """A new sequence that holds the blocks of the parent's first `length` tokens (None: all), on either pool."""
        parent = self._find(parent_id)
        if child_id in self._holdings:
            raise ValueError(f"child_id: expected a sequence without blocks, got {child_id}, which holds some")
        length = parent.length if length is None else length
        if not 0 <= length <= parent.length:
            raise ValueError(f"length: expected 0 to {parent.length}, sequence {parent_id}'s room, got {length}")
        child = parent.copy(length, self.block_size)
        pool = self._host if parent.on_host else self._device
        pool.hold(child.blocks)
        self._holdings[child_id] = child

    def free(self, seq_id: int) -> None:
        """Give back all that the sequence holds, on either pool, and forget it."""
        holding = self._find(seq_id)
        pool = self._host if holding.on_host else self._device
        pool.drop(reversed(holding.blocks))
        del self._holdings[seq_id]
        self._reserved.discard(seq_id)

    def swap_out(self, seq_ids: Sequence[int]) -> list[BlockCopy]:
        """Move sequences to the host; a block that several of them hold, they also share there.

        Returns the copies from device to host, due before any of the device's blocks is written again.
        """
        return self._swap(seq_ids, self._device, self._host)

    def swap_in(self, seq_ids: Sequence[int]) -> list[BlockCopy]:
        """Move sequences back to the device. Returns the copies from host to device, as `swap_out` does."""
        copies = self._swap(seq_ids, self._host, self._device)
        if self.prefix_caching:
            for seq_id in seq_ids:
                self._publish(self._holdings[seq_id])
        return copies

    def num_blocks_of(self, seq_ids: Sequence[int]) -> int:
        """How many blocks these sequences hold, those that several of them hold counted once."""
        return len({block for seq_id in seq_ids for block in self._find(seq_id).blocks})

    def reserve(self, seq_id: int) -> None:
        """Give back all but the sequence's full, committed blocks; until it is freed, others find them.

        Even without prefix caching: this is the shared prefix of arXiv 2309.06180, 4.4.
        """
        holding = self._find_on_device(seq_id)
        self.truncate(seq_id, holding.committed // self.block_size * self.block_size)
        self._reserved.add(seq_id)
        self._publish(holding)

    def record_published(self, record: list[tuple[int, bytes]] | None) -> None:
        """From here on, note in `record` the blocks that others can find from now on; None: nowhere."""
        self._record = record

    def retract(self, record: list[tuple[int, bytes]]) -> None:
        """The recorded blocks have not been written after all: nobody finds them any longer, whoever holds them."""
        for block, content_hash in record:
            self._device.retract(block, content_hash)

    def forget_contents(self) -> None:
        """The device's cache has lost what was written. ValueError while sequences hold blocks of it."""
        if on_device := [seq_id for seq_id, holding in self._holdings.items() if not holding.on_host]:
            raise ValueError(f"expected no sequences on the device, found {on_device}")
        self._device.forget_contents()

    def block_table(self, seq_id: int, first: int = 0) -> tuple[int, ...]:
        """The ids of the sequence's blocks, in order of the positions they hold; those from index `first` on."""
        return tuple(self._find(seq_id).blocks[first:])

    def ref_count(self, block_id: int) -> int:
        """How many sequences hold this block of the device."""
        return self._device.ref_count(block_id)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    @property
    def num_free_blocks(self) -> int:
        return self._device.num_free

    @property
    def num_free_host_blocks(self) -> int:
        return self._host.num_free

    def _find(self, seq_id: int) -> _Holding:
        try:
            return self._holdings[seq_id]
        except KeyError:
            raise UnknownSequence(f"seq_id: expected a sequence that holds blocks, got {seq_id}") from None

    def _find_on_device(self, seq_id: int) -> _Holding:
        holding = self._holdings.get(seq_id) or self._find(seq_id)
        if holding.on_host:
            raise ValueError(f"seq_id: expected a sequence on the device, got {seq_id}, which is swapped out")
        return holding

    def _swap(self, seq_ids: Sequence[int], origin: BlockPool, target: BlockPool) -> list[BlockCopy]:
        holdings = [self._find(seq_id) for seq_id in seq_ids]
        if len(set(seq_ids)) < len(holdings):
            raise ValueError(f"seq_ids: expected each once, got {list(seq_ids)}")
        for seq_id, holding in zip(seq_ids, holdings, strict=True):
            if holding.on_host is not (origin is self._host):
                where = ("device", "host")[origin is self._host]
                raise ValueError(f"seq_ids: expected sequences on the {where}, got {seq_id}, which is not")
        sources = list(dict.fromkeys(block for holding in holdings for block in holding.blocks))
        moved = dict(zip(sources, target.take(len(sources)), strict=True))
        for holding in holdings:
            new = [moved[block] for block in holding.blocks]
            target.hold(new)
            origin.drop(reversed(holding.blocks))
            holding.blocks = new
            holding.on_host = target is self._host
            holding.num_published = 0
        target.drop(moved.values())  # the hold with which they were taken
        return [BlockCopy(src, dst) for src, dst in moved.items()]

    def _look_up(self, token_ids: array[int], root: bytes) -> tuple[list[bytes], list[int]]:
        """The hashes of all full blocks, and the blocks that were found for the first of them."""
        if not self.prefix_caching and not self._reserved:
            return [], []
        hashes = self._chain(token_ids, root)
        hits = []
        for content_hash in hashes[: (len(token_ids) - 1) // self.block_size]:
            block = self._device.find(content_hash)
            if block is None:
                break
            hits.append(block)
        return hashes, hits

    def _chain(self, token_ids: array[int], root: bytes) -> list[bytes]:
        """The hashes of all full blocks. What is known from the call before is not hashed again."""
        last_ids, last_root, last_hashes = self._last_chain
        size = self.block_size
        num_full = len(token_ids) // size
        num_same = 0
        if root == last_root:
            lengths = range(size, min(num_full, len(last_hashes)) * size + 1, size)
            num_same = bisect_left(lengths, True, key=lambda n: token_ids[:n] != last_ids[:n])
        hashes = last_hashes[:num_same]
        self._extend_chain(hashes, token_ids, root, num_full)
        self._last_chain = token_ids[:], root, hashes
        return hashes

    def _extend_chain(self, hashes: list[bytes], token_ids: array[int], root: bytes, num_full: int) -> None:
        """Append the hashes of the blocks up to `num_full` that are not yet in `hashes`."""
        size = self.block_size
        parent = hashes[-1] if hashes else root
        for start in range(len(hashes) * size, num_full * size, size):
            parent = sha256(parent + token_ids[start : start + size].tobytes()).digest()
            hashes.append(parent)

    def _publish(self, holding: _Holding) -> None:
        num_full = holding.committed // self.block_size
        if num_full > holding.num_published:
            if num_full > len(holding.hashes):
                self._extend_chain(holding.hashes, holding.token_ids, holding.root, num_full)
            for index in range(holding.num_published, num_full):
                self._device.publish(holding.blocks[index], holding.hashes[index])
            if self._record is not None:
                first = holding.num_published
                self._record += zip(holding.blocks[first:num_full], holding.hashes[first:num_full], strict=True)
            holding.num_published = num_full


def _token_ids(token_ids: Sequence[int]) -> array[int]:
    return array("i", token_ids)


def _root(salt: str | None) -> bytes:
    if salt is None:
        return b""
    if not isinstance(salt, str):
        raise TypeError(f"salt: expected a str or None, got {salt!r}")
    return sha256(salt.encode()).digest()

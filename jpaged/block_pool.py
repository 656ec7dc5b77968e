"""The blocks of one memory: how many hold each, which are free, and which can be found by what they contain."""

from collections import OrderedDict
from collections.abc import Iterable
from itertools import repeat


class NoFreeBlocks(Exception):
    """The pool has fewer free blocks than were asked for. Nothing was changed."""


class BlockPool:
    """Counts the holders of `num_blocks` blocks, and hands out the free ones.

    A free block may keep its contents, under the hash it was published with, until it is needed. Blocks without a
    hash are handed out first, the one freed last before the others; then those with one, least recently freed first.
    Whoever frees a sequence's blocks from its tail on so has a prefix's tail handed out before its head. Both queues
    are O(1) at each end, and a block that is found leaves the second one's middle in O(1): OrderedDict is a linked
    list under its hash table.

    Several blocks may be published with the same hash; `find` gives one of them.
    """

    def __init__(self, num_blocks: int, *, keeps_contents: bool) -> None:
        self.num_blocks = num_blocks
        self._keeps_contents = keeps_contents  # else a block that is freed can no longer be found
        # Every block is in exactly one of three states: held (a count above 0), blank, or cached.
        self._ref_counts = [0] * num_blocks
        self._blank = list(range(num_blocks))[::-1]  # free and without a hash, next to be handed out last
        self._cached: OrderedDict[int, None] = OrderedDict()  # free and with a hash, next to be handed out first
        self._hashes: list[bytes | None] = [None] * num_blocks  # of the published, held or cached
        self._block_of: dict[bytes, int] = {}  # the inverse
        self._twins_of: dict[bytes, list[int]] = {}  # further blocks of the same hash

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    def ref_count(self, block: int) -> int:
        """How many hold the block."""
        return self._ref_counts[block]

    def num_free_of(self, blocks: list[int]) -> int:
        """How many of these nobody holds."""
        return [self._ref_counts[block] for block in blocks].count(0)

    def take(self, n: int) -> list[int]:
        """`n` free blocks, now held once each."""
        if n == 1 and self._blank:
            block = self._blank.pop()
            self._ref_counts[block] = 1
            return [block]
        if n > self.num_free:
            raise NoFreeBlocks(f"{n} more blocks needed, {self.num_free} of {self.num_blocks} free")
        first = max(0, len(self._blank) - n)
        blocks = self._blank[first:]
        blocks.reverse()
        del self._blank[first:]
        for _ in range(n - len(blocks)):
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            blocks.append(block)
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder of each of these, which are held or cached."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._cached[block]
            self._ref_counts[block] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        """One holder fewer of each; those without one are free, in the order given."""
        for block in blocks:
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if not self._keeps_contents:
                    self.unpublish(block)
                if self._hashes[block] is None:
                    self._blank.append(block)
                else:
                    self._cached[block] = None

    def publish(self, block: int, content_hash: bytes) -> None:
        """The held block can be found by this hash from now on."""
        if self._hashes[block] is None:
            self._hashes[block] = content_hash
            if self._block_of.setdefault(content_hash, block) != block:
                self._twins_of.setdefault(content_hash, []).append(block)

    def unpublish(self, block: int) -> None:
        """The held block can no longer be found."""
        if self._hashes[block] is not None:
            self._forget(block)

    def retract(self, block: int, content_hash: bytes) -> None:
        """The block, held or free, can no longer be found by this hash, if it still can."""
        if self._hashes[block] == content_hash:
            self._forget(block)
            if self._ref_counts[block] == 0:
                del self._cached[block]
                self._blank.append(block)

    def find(self, content_hash: bytes) -> int | None:
        """A block that was published with this hash."""
        return self._block_of.get(content_hash)

    def forget_contents(self) -> None:
        """No block can be found any longer."""
        self._blank += reversed(self._cached)
        self._cached.clear()
        self._hashes = list(repeat(None, self.num_blocks))
        self._block_of.clear()
        self._twins_of.clear()

    def _forget(self, block: int) -> None:
        content_hash = self._hashes[block]
        assert content_hash is not None
        self._hashes[block] = None
        twins = self._twins_of.get(content_hash)
        if twins is None:
            del self._block_of[content_hash]
            return
        if block in twins:
            twins.remove(block)
        else:
            self._block_of[content_hash] = twins.pop()
        if not twins:
            del self._twins_of[content_hash]

"""Random calls of the block manager, against a model that knows every token of every sequence by value."""

from dataclasses import dataclass

from host_model import Pool
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from operation_count import operations

from jpaged.block_manager import Allocation, BlockCopy, BlockManager, NoFreeBlocks

PREFIXES = [[], [7, 8, 9], [11] * 9, [*range(1, 22)]]  # sequences start alike, so that there is something to find


@dataclass
class ModelSequence:
    token_ids: list[int]  # all that there is room for
    salt: str | None
    written: int = 0  # so many of them are in the cache
    committed: int = 0
    on_host: bool = False
    is_reserved: bool = False

    def fork(self, length):
        return ModelSequence(
            self.token_ids[:length],
            self.salt,
            min(self.written, length),
            min(self.committed, length),
            self.on_host,
        )


class BlockMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(1, 20),
        block_size=st.sampled_from([1, 2, 3, 4, 8]),
        num_host_blocks=st.sampled_from([0, 4, 20]),
        prefix_caching=st.booleans(),
    )
    def start(self, num_blocks, block_size, num_host_blocks, prefix_caching):
        self.blocks = BlockManager(
            num_blocks, block_size, num_host_blocks=num_host_blocks, prefix_caching=prefix_caching
        )
        self.size = block_size
        self.device, self.host = Pool(num_blocks, block_size), Pool(num_host_blocks, block_size)
        self.sequences: dict[int, ModelSequence] = {}
        self.next_id = 0

    def pick(self, data, *, on_host=False, but_reserved=True) -> int | None:
        """One of the sequences, or None."""
        ids = [
            seq_id
            for seq_id, sequence in self.sequences.items()
            if sequence.on_host is on_host and not (but_reserved and sequence.is_reserved)
        ]
        operations.count()
        return data.draw(st.sampled_from(ids)) if ids else None

    def pick_some(self, data, *, on_host) -> list[int]:
        ids = [s for s, sequence in self.sequences.items() if sequence.on_host is on_host and not sequence.is_reserved]
        operations.count()
        return data.draw(st.lists(st.sampled_from(ids), unique=True)) if ids else []

    def apply(self, copies: list[BlockCopy]) -> None:
        self.device.copy_from(self.device, copies)

    @precondition(lambda self: len(self.sequences) < 10)
    @rule(
        prefix=st.sampled_from(PREFIXES),
        rest=st.lists(st.integers(1, 3), min_size=1, max_size=6),
        salt=st.sampled_from([None, None, "a"]),
        use_cached=st.sampled_from([True, True, False]),
        keep_free=st.sampled_from([0, 0, 2]),
    )
    def allocate(self, prefix, rest, salt, use_cached, keep_free):
        operations.count()
        token_ids = [*prefix, *rest]
        seq_id, self.next_id = self.next_id, self.next_id + 1
        room = self.blocks.can_allocate(token_ids, salt=salt, use_cached=use_cached, keep_free=keep_free)
        before = self.seen_from_outside()
        try:
            num_cached = self.blocks.allocate(seq_id, token_ids, salt=salt, use_cached=use_cached, keep_free=keep_free)
        except NoFreeBlocks:
            assert room is not Allocation.OK
            assert self.seen_from_outside() == before
            return
        assert room is Allocation.OK or keep_free
        assert self.blocks.num_free_blocks >= keep_free
        assert num_cached % self.size == 0
        assert num_cached < len(token_ids)
        assert use_cached or not num_cached
        # What was found are these very tokens: see the invariant `contents`.
        self.sequences[seq_id] = ModelSequence(token_ids, salt, num_cached, num_cached)

    @rule(data=st.data(), n=st.integers(1, 12))
    def write(self, data, n):
        """A step writes tokens that there is room for."""
        if (seq_id := self.pick(data)) is not None:
            sequence = self.sequences[seq_id]
            table = self.blocks.block_table(seq_id)
            for position in range(sequence.written, min(sequence.written + n, len(sequence.token_ids))):
                block, offset = divmod(position, self.size)
                self.device.tokens[table[block], offset] = sequence.token_ids[position]
                sequence.written += 1

    @rule(data=st.data(), n=st.integers(1, 20))
    def commit(self, data, n):
        if (seq_id := self.pick(data, on_host=data.draw(st.booleans()))) is not None:
            sequence = self.sequences[seq_id]
            token_ids = sequence.token_ids[sequence.committed : min(sequence.committed + n, sequence.written)]
            self.blocks.commit(seq_id, token_ids)
            sequence.committed += len(token_ids)

    @rule(data=st.data(), new=st.lists(st.integers(1, 3), min_size=1, max_size=9))
    def append(self, data, new):
        if (seq_id := self.pick(data)) is not None:
            sequence = self.sequences[seq_id]
            length = len(sequence.token_ids)
            table = self.blocks.block_table(seq_id)
            shared = length % self.size and self.blocks.ref_count(table[-1]) > 1
            before = self.seen_from_outside()
            try:
                copies = self.blocks.append(seq_id, len(new))
            except NoFreeBlocks:
                assert self.seen_from_outside() == before
                return
            assert len(copies) == bool(shared)
            self.apply(copies)
            sequence.token_ids += new

    @precondition(lambda self: len(self.sequences) < 10)
    @rule(data=st.data())
    def fork(self, data):
        parent_id = self.pick(data, on_host=data.draw(st.booleans()), but_reserved=False)
        if parent_id is not None:
            parent = self.sequences[parent_id]
            length = data.draw(st.integers(0, parent.written))  # who forks from tokens not written would race for them
            child_id, self.next_id = self.next_id, self.next_id + 1
            before = self.blocks.num_free_blocks
            self.blocks.fork(parent_id, child_id, length=length)
            assert self.blocks.num_free_blocks == before
            self.sequences[child_id] = parent.fork(length)

    @rule(data=st.data())
    def free(self, data):
        seq_id = self.pick(data, on_host=data.draw(st.booleans()), but_reserved=False)
        if seq_id is not None:
            self.blocks.free(seq_id)
            del self.sequences[seq_id]

    @rule(data=st.data())
    def truncate(self, data):
        if (seq_id := self.pick(data)) is not None:
            sequence = self.sequences[seq_id]
            length = data.draw(st.integers(0, len(sequence.token_ids)))
            self.blocks.truncate(seq_id, length)
            self.sequences[seq_id] = sequence.fork(length)

    @rule(data=st.data())
    def reserve(self, data):
        if (seq_id := self.pick(data)) is not None:
            sequence = self.sequences[seq_id]
            self.blocks.reserve(seq_id)
            self.sequences[seq_id] = sequence.fork(sequence.committed // self.size * self.size)
            self.sequences[seq_id].is_reserved = True

    @rule(data=st.data())
    def swap_out(self, data):
        self.swap(self.pick_some(data, on_host=False), self.blocks.swap_out, self.device, self.host, True)

    @rule(data=st.data())
    def swap_in(self, data):
        self.swap(self.pick_some(data, on_host=True), self.blocks.swap_in, self.host, self.device, False)

    def swap(self, seq_ids, move, origin, target, to_host):
        before = self.seen_from_outside()
        try:
            copies = move(seq_ids)
        except NoFreeBlocks:
            assert self.seen_from_outside() == before
            return
        target.copy_from(origin, copies)
        for seq_id in seq_ids:
            self.sequences[seq_id].on_host = to_host

    def seen_from_outside(self):
        blocks = self.blocks
        return (
            [blocks.block_table(seq_id) for seq_id in self.sequences],
            [blocks.ref_count(block) for block in range(blocks.num_blocks)],
            blocks.num_free_blocks,
            blocks.num_free_host_blocks,
        )

    @precondition(lambda self: hasattr(self, "blocks"))
    @invariant()
    def contents(self):
        """Every token that a sequence has written, or found, is where its block table says."""
        for seq_id, sequence in self.sequences.items():
            table = list(self.blocks.block_table(seq_id))
            assert len(table) == -(-len(sequence.token_ids) // self.size)
            pool = self.host if sequence.on_host else self.device
            shown = pool.tokens[table].reshape(-1)[: sequence.written].tolist()
            assert shown == sequence.token_ids[: sequence.written]

    @precondition(lambda self: hasattr(self, "blocks"))
    @invariant()
    def books(self):
        """Each block is in one state, held as often as sequences say, and none is lost."""
        for pool, on_host in ((self.blocks._device, False), (self.blocks._host, True)):
            holders = dict.fromkeys(range(pool.num_blocks), 0)
            for seq_id, sequence in self.sequences.items():
                if sequence.on_host is on_host:
                    for block in self.blocks.block_table(seq_id):
                        holders[block] += 1
            assert pool._ref_counts == list(holders.values())
            held = [block for block, count in holders.items() if count]
            assert sorted([*held, *pool._blank, *pool._cached]) == list(range(pool.num_blocks))
            assert all(pool._hashes[block] is None for block in pool._blank)
            assert all(pool._hashes[block] is not None for block in pool._cached)
            hashed = {block: h for block, h in enumerate(pool._hashes) if h is not None}
            found = {block: h for h, block in pool._block_of.items()}
            found |= {block: h for h, twins in pool._twins_of.items() for block in twins}
            assert found == hashed

    def teardown(self):
        if hasattr(self, "blocks"):
            for seq_id in self.sequences:
                self.blocks.free(seq_id)
            assert self.blocks.num_free_blocks == self.blocks.num_blocks
            assert self.blocks.num_free_host_blocks == self.blocks.num_host_blocks

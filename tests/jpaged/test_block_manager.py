"""Blocks, by hand: which are held, that a call which raises changed nothing, and that none is lost."""

import random

import pytest

from jpaged.block_manager import Allocation, BlockManager, NoFreeBlocks


def state(blocks: BlockManager, *seq_ids: int):
    tables = [blocks.block_table(seq_id) for seq_id in seq_ids]
    return tables, blocks.num_free_blocks, blocks.num_held_slots, blocks.num_used_slots


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3), (40, 10)])
def test_allocation_takes_just_enough_blocks(num_tokens, num_blocks):
    blocks = BlockManager(10, 4)
    blocks.allocate(0, range(num_tokens))
    assert len(set(blocks.block_table(0))) == num_blocks
    assert blocks.num_free_blocks == 10 - num_blocks
    assert blocks.num_held_slots == 4 * num_blocks
    blocks.free(0)
    assert blocks.num_free_blocks == 10


def test_tables_are_disjoint_and_grow_at_their_end():
    blocks = BlockManager(6, 2)
    blocks.allocate(0, [1, 2, 3])
    blocks.allocate(1, [1])
    first = blocks.block_table(0)
    blocks.append(0, 1)  # position 3: the second slot of a block already held
    assert blocks.block_table(0) == first
    blocks.append(0, 3)  # positions 4, 5, 6: two blocks more
    table = blocks.block_table(0)
    assert table[:2] == first
    assert len(table) == 4
    assert not set(table) & set(blocks.block_table(1))
    assert set(table + blocks.block_table(1)) < set(range(6))
    assert blocks.num_free_blocks == 1


def test_can_allocate():
    blocks = BlockManager(4, 2)
    assert blocks.can_allocate(range(8)) is Allocation.OK
    assert blocks.can_allocate(range(9)) is Allocation.NEVER
    assert blocks.can_allocate(range(3), num_seqs=2) is Allocation.OK
    assert blocks.can_allocate(range(3), num_seqs=3) is Allocation.NEVER
    assert blocks.can_allocate(range(3), range(4)) is Allocation.OK  # 2 + 2
    assert blocks.can_allocate(range(3), range(5)) is Allocation.NEVER  # 2 + 3
    assert blocks.can_allocate(range(6), keep_free=1) is Allocation.OK
    assert blocks.can_allocate(range(7), keep_free=1) is Allocation.LATER
    blocks.allocate(0, [1])
    assert blocks.can_allocate(range(6)) is Allocation.OK
    assert blocks.can_allocate(range(7)) is Allocation.LATER
    assert blocks.can_allocate(range(9)) is Allocation.NEVER


def test_failed_calls_change_nothing():
    blocks = BlockManager(4, 2)
    blocks.allocate(0, [1, 2, 3])
    blocks.commit(0, [1, 2])
    blocks.allocate(1, [1])
    before = state(blocks, 0, 1)
    assert before[1:] == (1, 6, 2)
    for raised, call in [
        (NoFreeBlocks, lambda: blocks.allocate(2, [1, 2, 3])),
        (NoFreeBlocks, lambda: blocks.append(0, 4)),  # 7 tokens: 4 blocks, 2 held, 1 free
        (ValueError, lambda: blocks.allocate(0, [1])),
        (ValueError, lambda: blocks.allocate(2, [])),
        (ValueError, lambda: blocks.append(0, 0)),
        (ValueError, lambda: blocks.append(0, -1)),
        (ValueError, lambda: blocks.commit(0, [3, 4])),  # room for 3 in all
        (ValueError, lambda: blocks.truncate(0, 4)),
        (ValueError, lambda: blocks.truncate(0, -1)),
        (KeyError, lambda: blocks.append(2, 1)),
        (KeyError, lambda: blocks.commit(2, [1])),
        (KeyError, lambda: blocks.truncate(2, 0)),
        (KeyError, lambda: blocks.free(2)),
        (KeyError, lambda: blocks.block_table(2)),
    ]:
        with pytest.raises(raised):
            call()
        assert state(blocks, 0, 1) == before
    blocks.append(0, 3)  # 6 tokens: 3 blocks; what was refused above did not leave its length behind
    blocks.commit(0, [3, 4, 5, 6])
    assert state(blocks, 0, 1)[1:] == (0, 8, 6)


def test_a_second_free_raises():
    blocks = BlockManager(4, 2)
    blocks.allocate(0, [1, 2, 3])
    blocks.free(0)
    with pytest.raises(ValueError, match="seq_id: expected a sequence that holds blocks, got 0"):
        blocks.free(0)
    assert blocks.num_free_blocks == 4
    blocks.allocate(0, [1])  # the id may come back


def test_used_slots_follow_what_is_committed():
    blocks = BlockManager(4, 4)
    blocks.allocate(0, range(6))
    blocks.allocate(1, range(2))
    assert (blocks.num_held_slots, blocks.num_used_slots) == (12, 0)
    blocks.commit(0, range(6))
    blocks.commit(1, [0])
    assert (blocks.num_held_slots, blocks.num_used_slots) == (12, 7)
    blocks.commit(1, [1])
    with pytest.raises(ValueError, match="token_ids"):
        blocks.commit(1, [2])
    blocks.append(1, 1)
    blocks.commit(1, [2])
    assert blocks.num_used_slots == 9
    blocks.free(0)
    assert (blocks.num_held_slots, blocks.num_used_slots) == (4, 3)


def test_truncate_gives_back_what_was_not_used():
    blocks = BlockManager(4, 4)
    blocks.allocate(0, range(5))
    blocks.commit(0, range(5))
    table = blocks.block_table(0)
    blocks.append(0, 9)  # 14: 4 blocks
    assert blocks.num_free_blocks == 0
    blocks.truncate(0, 5)
    assert blocks.block_table(0) == table
    assert (blocks.num_free_blocks, blocks.num_used_slots) == (2, 5)
    with pytest.raises(ValueError, match="token_ids"):
        blocks.commit(0, [5])  # the room for it was given back
    blocks.truncate(0, 3)  # below what was committed: forgotten, and written again
    assert (blocks.num_free_blocks, blocks.num_used_slots) == (3, 3)
    blocks.append(0, 1)
    blocks.commit(0, [3])
    assert blocks.num_used_slots == 4
    blocks.truncate(0, 0)
    assert (blocks.block_table(0), blocks.num_free_blocks, blocks.num_used_slots) == ((), 4, 0)
    blocks.free(0)


@pytest.mark.parametrize("argument", ["num_blocks", "block_size"])
def test_sizes_are_at_least_one(argument):
    with pytest.raises(ValueError, match=f"{argument}: expected at least 1, got 0"):
        BlockManager(**({"num_blocks": 4, "block_size": 4} | {argument: 0}))


def test_random_calls_keep_every_block_in_one_place():
    rng = random.Random(0)
    blocks = BlockManager(12, 3)
    lengths: dict[int, int] = {}  # room, as this test counts it
    committed: dict[int, int] = {}
    refused = 0
    for step in range(3000):
        seq_id = rng.randrange(6)
        n = rng.randint(1, 9)
        before = state(blocks, *lengths)
        try:
            if seq_id not in lengths:
                blocks.allocate(seq_id, range(n))
                lengths[seq_id], committed[seq_id] = n, 0
            elif (action := rng.randrange(4)) == 0:
                blocks.append(seq_id, n)
                lengths[seq_id] += n
            elif action == 1:
                n = min(n, lengths[seq_id] - committed[seq_id])
                blocks.commit(seq_id, range(n))
                committed[seq_id] += n
            elif action == 2:
                length = rng.randint(0, lengths[seq_id])
                blocks.truncate(seq_id, length)
                lengths[seq_id], committed[seq_id] = length, min(length, committed[seq_id])
            else:
                blocks.free(seq_id)
                del lengths[seq_id], committed[seq_id]
        except NoFreeBlocks:
            refused += 1
            assert state(blocks, *lengths) == before, step
        tables = {seq_id: blocks.block_table(seq_id) for seq_id in lengths}
        assert all(len(table) == (lengths[seq_id] + 2) // 3 for seq_id, table in tables.items())
        held = [block for table in tables.values() for block in table]
        assert len(set(held)) == len(held) == 12 - blocks.num_free_blocks
        assert set(held) <= set(range(12))
        assert blocks.num_held_slots == 3 * len(held)
        assert blocks.num_used_slots == sum(committed.values())
    assert refused > 100
    for seq_id in lengths:
        blocks.free(seq_id)
    assert (blocks.num_free_blocks, blocks.num_used_slots) == (12, 0)

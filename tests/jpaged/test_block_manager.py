"""Blocks, by hand: which are held, which are copied, which are found, and that a call which raises changed nothing."""

import pytest

from jpaged.block_manager import Allocation, BlockCopy, BlockManager, NoFreeBlocks


def state(blocks: BlockManager, *seq_ids: int):
    """All that can be seen from outside."""
    tables = [blocks.block_table(seq_id) for seq_id in seq_ids]
    counts = [blocks.ref_count(block) for block in range(blocks.num_blocks)]
    return tables, counts, blocks.num_free_blocks, blocks.num_free_host_blocks


def cached(blocks: BlockManager, token_ids, **options) -> int:
    """How many tokens a new sequence finds in the cache; leaves everything as it was but the order of eviction."""
    num_cached = blocks.allocate(999, token_ids, **options)
    blocks.free(999)
    return num_cached


def fill(blocks: BlockManager, seq_id: int, token_ids, **options) -> int:
    """A sequence all of whose tokens are written."""
    num_cached = blocks.allocate(seq_id, token_ids, **options)
    blocks.commit(seq_id, token_ids[num_cached:])
    return num_cached


# Allocating and giving back.


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3), (40, 10)])
def test_allocation_takes_just_enough_blocks(num_tokens, num_blocks):
    blocks = BlockManager(10, 4)
    assert blocks.allocate(0, range(num_tokens)) == 0
    assert len(set(blocks.block_table(0))) == num_blocks
    assert blocks.num_free_blocks == 10 - num_blocks
    assert [blocks.ref_count(block) for block in blocks.block_table(0)] == [1] * num_blocks
    blocks.free(0)
    assert blocks.num_free_blocks == 10


def test_tables_are_disjoint_and_grow_at_their_end():
    blocks = BlockManager(6, 2)
    blocks.allocate(0, [1, 2, 3])
    blocks.allocate(1, [1])
    first = blocks.block_table(0)
    assert blocks.append(0, 1) == []  # position 3: the second slot of a block already held
    assert blocks.block_table(0) == first
    assert blocks.append(0, 3) == []  # positions 4, 5, 6: two blocks more
    table = blocks.block_table(0)
    assert table[:2] == first
    assert blocks.block_table(0, 2) == table[2:]
    assert len(table) == 4
    assert not set(table) & set(blocks.block_table(1))
    assert set(table + blocks.block_table(1)) < set(range(6))
    assert blocks.num_free_blocks == 1


def test_can_allocate():
    blocks = BlockManager(4, 2)
    assert blocks.can_allocate(range(8)) is Allocation.OK
    assert blocks.can_allocate(range(9)) is Allocation.NEVER
    assert blocks.can_allocate(range(3), num_seqs=3) is Allocation.OK  # a whole block, and three copies of a half
    assert blocks.can_allocate(range(3), num_seqs=4) is Allocation.NEVER
    assert blocks.can_allocate(range(4), num_seqs=9) is Allocation.OK  # nothing to copy
    assert blocks.can_allocate(range(6), keep_free=1) is Allocation.OK
    assert blocks.can_allocate(range(7), keep_free=1) is Allocation.LATER
    blocks.allocate(0, [1])
    assert blocks.can_allocate(range(6)) is Allocation.OK
    assert blocks.can_allocate(range(7)) is Allocation.LATER
    assert blocks.can_allocate(range(9)) is Allocation.NEVER


def test_can_allocate_counts_what_is_cached():
    blocks = BlockManager(4, 2, prefix_caching=True)
    fill(blocks, 0, [1, 2, 3, 4, 5, 6])
    assert blocks.can_allocate([1, 2, 3, 4, 5]) is Allocation.OK  # two blocks are there, one is free
    assert blocks.can_allocate([1, 2, 3, 4, 5], salt="x") is Allocation.LATER
    assert blocks.can_allocate([1, 2, 3, 4, 5], use_cached=False) is Allocation.LATER
    assert blocks.can_allocate([1, 2, 9, 9, 9]) is Allocation.LATER
    assert blocks.can_allocate([1, 2, 3, 4, 5], keep_free=1) is Allocation.LATER
    blocks.free(0)
    assert blocks.can_allocate([1, 2, 3, 4, 5], keep_free=1) is Allocation.OK  # cached and free: to be counted once
    assert blocks.can_allocate([1, 2, 3, 4, 5], keep_free=2) is Allocation.LATER


def test_failed_calls_change_nothing():
    blocks = BlockManager(5, 2, num_host_blocks=1, prefix_caching=True)
    blocks.allocate(0, [1, 2, 3])
    blocks.commit(0, [1, 2])
    blocks.fork(0, 1)
    blocks.allocate(3, [9])
    blocks.swap_out([3])
    before = state(blocks, 0, 1, 3)
    assert before[1:] == ([2, 2, 0, 0, 0], 3, 0)
    for raised, call in [
        (NoFreeBlocks, lambda: blocks.allocate(2, range(100, 107))),
        (NoFreeBlocks, lambda: blocks.allocate(2, [1, 2, *range(100, 107)])),  # one is found, four are not there
        (NoFreeBlocks, lambda: blocks.append(0, 6)),  # a copy and three blocks more
        (NoFreeBlocks, lambda: blocks.swap_out([0])),
        (ValueError, lambda: blocks.allocate(0, [1])),
        (ValueError, lambda: blocks.allocate(2, [])),
        (TypeError, lambda: blocks.allocate(2, [1], salt=b"x")),  # type: ignore[arg-type]
        (TypeError, lambda: blocks.allocate(2, [1.5])),  # type: ignore[list-item]
        (OverflowError, lambda: blocks.commit(0, [2**40])),
        (ValueError, lambda: blocks.append(0, 0)),
        (ValueError, lambda: blocks.append(0, -1)),
        (ValueError, lambda: blocks.append(3, 1)),  # on the host
        (ValueError, lambda: blocks.commit(0, [3, 4])),  # room for 3 in all
        (ValueError, lambda: blocks.commit(0, [4])),  # 3 was announced
        (ValueError, lambda: blocks.truncate(0, 4)),
        (ValueError, lambda: blocks.truncate(0, -1)),
        (ValueError, lambda: blocks.fork(0, 1)),
        (ValueError, lambda: blocks.fork(0, 2, length=4)),
        (ValueError, lambda: blocks.swap_out([3])),
        (ValueError, lambda: blocks.swap_in([0])),
        (ValueError, lambda: blocks.swap_in([3, 3])),
        (ValueError, lambda: blocks.forget_contents()),  # sequences hold what would be lost
        (KeyError, lambda: blocks.append(2, 1)),
        (KeyError, lambda: blocks.commit(2, [1])),
        (KeyError, lambda: blocks.truncate(2, 0)),
        (KeyError, lambda: blocks.fork(2, 4)),
        (KeyError, lambda: blocks.free(2)),
        (KeyError, lambda: blocks.swap_out([0, 2])),
        (KeyError, lambda: blocks.block_table(2)),
    ]:
        with pytest.raises(raised):
            call()
        assert state(blocks, 0, 1, 3) == before
    blocks.append(0, 3)  # 6 tokens: 3 blocks; what was refused above did not leave its length behind
    blocks.commit(0, [3, 4, 5, 6])
    assert len(blocks.block_table(0)) == 3


def test_a_second_free_raises():
    blocks = BlockManager(4, 2)
    blocks.allocate(0, [1, 2, 3])
    blocks.free(0)
    with pytest.raises(ValueError, match="seq_id: expected a sequence that holds blocks, got 0"):
        blocks.free(0)
    assert blocks.num_free_blocks == 4
    blocks.allocate(0, [1])  # the id may come back


@pytest.mark.parametrize(
    ("argument", "value", "least"), [("num_blocks", 0, 1), ("block_size", 0, 1), ("num_host_blocks", -1, 0)]
)
def test_sizes_have_a_least(argument, value, least):
    with pytest.raises(ValueError, match=f"{argument}: expected at least {least}, got {value}"):
        BlockManager(**{"num_blocks": 4, "block_size": 4, argument: value})  # type: ignore[arg-type]


def test_truncate_gives_back_what_was_not_used():
    blocks = BlockManager(4, 4)
    fill(blocks, 0, [*range(5)])
    table = blocks.block_table(0)
    blocks.append(0, 9)  # 14: 4 blocks
    assert blocks.num_free_blocks == 0
    blocks.truncate(0, 5)
    assert blocks.block_table(0) == table
    assert blocks.num_free_blocks == 2
    with pytest.raises(ValueError, match="token_ids: expected at most 0"):
        blocks.commit(0, [5])  # the room for it was given back
    blocks.truncate(0, 3)  # below what was committed: forgotten, and written again
    assert blocks.num_free_blocks == 3
    blocks.append(0, 1)
    blocks.commit(0, [77])
    blocks.truncate(0, 0)
    assert (blocks.block_table(0), blocks.num_free_blocks) == ((), 4)
    blocks.free(0)


# Sharing and copy-on-write.


def test_a_fork_takes_no_blocks_and_shows_the_same():
    blocks = BlockManager(4, 2)
    blocks.allocate(0, [1, 2, 3])
    blocks.fork(0, 1)
    assert blocks.block_table(0) == blocks.block_table(1)
    assert blocks.num_free_blocks == 2
    assert [blocks.ref_count(block) for block in blocks.block_table(0)] == [2, 2]


def test_freeing_the_parent_changes_nothing_and_freeing_the_child_returns_all():
    blocks = BlockManager(4, 2)
    blocks.allocate(0, [1, 2, 3])
    table = blocks.block_table(0)
    blocks.fork(0, 1)
    blocks.free(0)
    assert (blocks.block_table(1), blocks.num_free_blocks) == (table, 2)
    blocks.free(1)
    assert blocks.num_free_blocks == 4


@pytest.mark.parametrize("num_tokens", range(1, 9))
@pytest.mark.parametrize("first", [0, 1])
def test_appending_copies_exactly_when_the_last_block_is_shared_and_not_full(num_tokens, first):
    """Whichever side appends first; the last holder writes in place."""
    blocks = BlockManager(10, 4)
    blocks.allocate(0, range(num_tokens))
    blocks.fork(0, 1)
    before = blocks.block_table(0)
    copies = blocks.append(first, 1)
    after = blocks.block_table(first)
    if num_tokens % 4:
        assert copies == [BlockCopy(before[-1], after[-1])]
        assert after[:-1] == before[:-1]
        assert after[-1] not in before
    else:
        assert copies == []
        assert after[:-1] == before
    assert blocks.block_table(1 - first) == before
    assert blocks.append(1 - first, 1) == []
    assert blocks.block_table(1 - first)[: len(before)] == before
    assert len(set(blocks.block_table(0)) & set(blocks.block_table(1))) == num_tokens // 4


def test_of_three_holders_two_copy():
    blocks = BlockManager(5, 2)
    blocks.allocate(0, [1])
    blocks.fork(0, 1)
    blocks.fork(1, 2)
    (table,) = {blocks.block_table(seq_id) for seq_id in range(3)}
    assert [len(blocks.append(seq_id, 1)) for seq_id in range(3)] == [1, 1, 0]
    assert blocks.block_table(2) == table
    assert len({blocks.block_table(seq_id) for seq_id in range(3)}) == 3


def test_a_copy_and_new_blocks_in_one_append():
    blocks = BlockManager(6, 2)
    blocks.allocate(0, [1, 2, 3])
    blocks.fork(0, 1)
    (copy,) = blocks.append(1, 4)  # 7 tokens: 4 blocks, the second a copy
    assert copy == BlockCopy(blocks.block_table(0)[1], blocks.block_table(1)[1])
    assert len(blocks.block_table(1)) == 4
    assert blocks.num_free_blocks == 1


def test_a_fork_of_the_first_tokens_only():
    blocks = BlockManager(6, 2)
    fill(blocks, 0, [1, 2, 3, 4, 5])
    blocks.fork(0, 1, length=3)
    assert blocks.block_table(1) == blocks.block_table(0)[:2]
    blocks.fork(0, 2, length=2)
    assert blocks.block_table(2) == blocks.block_table(0)[:1]
    assert blocks.append(2, 1) == []
    assert len(blocks.append(1, 1)) == 1  # into the block that holds the parent's token 4
    blocks.commit(1, [9])


# What the cache remembers.


def test_only_full_blocks_are_cached_and_never_all_tokens():
    blocks = BlockManager(8, 4, prefix_caching=True)
    fill(blocks, 0, [*range(11)])
    blocks.free(0)
    assert cached(blocks, [*range(11)]) == 8
    assert cached(blocks, [*range(9)]) == 8
    assert cached(blocks, [*range(8)]) == 4  # the last token is to be computed
    assert cached(blocks, [*range(7)]) == 4
    assert cached(blocks, [*range(4)]) == 0
    assert cached(blocks, [9, *range(1, 11)]) == 0
    assert cached(blocks, [*range(4), 9, *range(5, 11)]) == 4
    assert cached(blocks, [*range(11)], use_cached=False) == 0


def test_nothing_is_cached_without_prefix_caching():
    blocks = BlockManager(8, 4)
    fill(blocks, 0, [*range(11)])
    assert cached(blocks, [*range(11)]) == 0


def test_a_hit_shares_the_blocks_of_a_sequence_that_still_runs():
    blocks = BlockManager(8, 2, prefix_caching=True)
    fill(blocks, 0, [1, 2, 3, 4, 5])
    assert blocks.allocate(1, [1, 2, 3, 4, 6]) == 4
    assert blocks.block_table(1)[:2] == blocks.block_table(0)[:2]
    assert blocks.block_table(1)[2] != blocks.block_table(0)[2]
    assert [blocks.ref_count(block) for block in blocks.block_table(1)] == [2, 2, 1]
    assert blocks.num_free_blocks == 4


def test_blocks_are_found_once_committed_one_by_one_too():
    blocks = BlockManager(8, 2, prefix_caching=True)
    blocks.allocate(0, [1, 2, 3, 4, 5])
    assert cached(blocks, [1, 2, 3]) == 0
    blocks.commit(0, [1])
    assert cached(blocks, [1, 2, 3]) == 0
    blocks.commit(0, [2, 3])
    assert cached(blocks, [1, 2, 3, 4, 5]) == 2
    blocks.commit(0, [4, 5])
    blocks.append(0, 3)  # whose ids are still to come
    assert cached(blocks, [1, 2, 3, 4, 5, 6, 7]) == 4
    blocks.commit(0, [6])
    assert cached(blocks, [1, 2, 3, 4, 5, 6, 7]) == 6
    assert cached(blocks, [1, 2, 3, 4, 5, 7, 7]) == 4


def test_another_salt_misses():
    blocks = BlockManager(8, 2, prefix_caching=True)
    fill(blocks, 0, [1, 2, 3], salt="a")
    assert cached(blocks, [1, 2, 3], salt="a") == 2
    assert cached(blocks, [1, 2, 3], salt="b") == 0
    assert cached(blocks, [1, 2, 3]) == 0
    assert cached(blocks, [1, 2, 3], salt="") == 0  # an empty salt is one, too


def test_the_same_tokens_after_others_are_not_the_same():
    blocks = BlockManager(8, 2, prefix_caching=True)
    fill(blocks, 0, [1, 2, 3, 4, 5])
    assert cached(blocks, [3, 4, 5]) == 0


def test_a_hit_block_is_never_evicted_to_serve_its_own_request():
    blocks = BlockManager(4, 2, prefix_caching=True)
    fill(blocks, 0, [1, 2, 3, 4])
    hit = blocks.block_table(0)
    blocks.free(0)
    assert blocks.allocate(1, [1, 2, 3, 4, 5, 6, 7]) == 4  # takes all four blocks of the pool
    assert blocks.block_table(1)[:2] == hit
    assert blocks.num_free_blocks == 0


def test_a_hit_that_does_not_help_is_no_hit():
    """Two of four blocks are found, but what is missing is held by others."""
    blocks = BlockManager(4, 2, prefix_caching=True)
    fill(blocks, 0, [1, 2, 3, 4])
    blocks.allocate(1, [7])
    blocks.free(0)
    before = state(blocks, 1)
    with pytest.raises(NoFreeBlocks, match="2 more blocks needed, 1 of 4 free"):
        blocks.allocate(2, [1, 2, 3, 4, 5, 6, 7])
    assert state(blocks, 1) == before


def test_unhashed_blocks_are_reused_first_and_a_prefix_from_its_tail():
    blocks = BlockManager(5, 2, prefix_caching=True)
    fill(blocks, 0, [1, 2, 3, 4, 5])  # two full blocks, and a half
    blocks.fork(0, 1)
    first, second, half = blocks.block_table(0)
    blocks.free(0)
    blocks.free(1)
    order = []
    for seq_id in range(10, 15):
        blocks.allocate(seq_id, [seq_id])
        order += blocks.block_table(seq_id)
    assert set(order[:3]) == {*range(5)} - {first, second}
    assert half in order[:3]
    assert order[3:] == [second, first]


def test_least_recently_used_first():
    blocks = BlockManager(3, 2, prefix_caching=True)
    for token in (1, 2, 3):
        fill(blocks, token, [token, token])
    for token in (2, 1, 3):
        blocks.free(token)
    assert cached(blocks, [2, 2, 9]) == 2  # used again: 1, the oldest now, makes room for 9
    assert [cached(blocks, [token, token, 9]) for token in (3, 2, 1)] == [2, 2, 0]


def test_a_reused_block_loses_its_hash():
    blocks = BlockManager(2, 2, prefix_caching=True)
    fill(blocks, 0, [1, 2, 3])
    blocks.free(0)
    blocks.allocate(1, [7, 8, 9])  # needs both
    assert blocks.can_allocate([1, 2, 3]) is Allocation.LATER
    blocks.free(1)
    assert cached(blocks, [1, 2, 3]) == 0
    assert cached(blocks, [7, 8, 9]) == 0  # never committed


def test_duplicates_coexist():
    """Two sequences compute the same tokens side by side; whichever is freed and evicted first, the other is found."""
    for survivor in (0, 1):
        blocks = BlockManager(4, 2, prefix_caching=True)
        blocks.allocate(0, [1, 2, 3])
        blocks.allocate(1, [1, 2, 3])
        blocks.commit(0, [1, 2, 3])
        blocks.commit(1, [1, 2, 3])
        assert not set(blocks.block_table(0)) & set(blocks.block_table(1))
        blocks.free(1 - survivor)
        blocks.allocate(2, [8, 8, 8])  # in place of what was freed
        assert blocks.num_free_blocks == 0
        blocks.free(2)
        assert blocks.allocate(3, [1, 2, 3]) == 2
        assert blocks.block_table(3)[0] == blocks.block_table(survivor)[0]


def test_writing_into_a_found_block_in_place_takes_its_hash():
    """A fork of part of a full block is its last holder, and writes other tokens into it."""
    blocks = BlockManager(4, 2, prefix_caching=True)
    fill(blocks, 0, [1, 2, 3, 4])
    blocks.fork(0, 1, length=3)
    blocks.free(0)
    assert cached(blocks, [1, 2, 3, 4, 5]) == 4
    assert blocks.append(1, 1) == []
    assert cached(blocks, [1, 2, 3, 4, 5]) == 2
    blocks.commit(1, [9])
    assert cached(blocks, [1, 2, 3, 9, 5]) == 4


def test_truncated_blocks_are_found_no_more():
    """As after a step that failed: not by whoever comes, though another sequence had found them meanwhile."""
    blocks = BlockManager(8, 2, prefix_caching=True)
    fill(blocks, 0, [1, 2, 3, 4, 5])
    blocks.allocate(1, [1, 2, 3, 4, 6])
    blocks.truncate(0, 3)
    blocks.free(1)
    assert cached(blocks, [1, 2, 3, 4, 5]) == 2
    blocks.append(0, 2)
    blocks.commit(0, [7, 8])
    assert cached(blocks, [1, 2, 3, 7, 5]) == 4


def test_what_a_sequence_generates_is_found_after_a_fork():
    blocks = BlockManager(8, 2, prefix_caching=True)
    fill(blocks, 0, [1, 2, 3])
    blocks.fork(0, 1)
    for seq_id, token in ((0, 4), (1, 5)):
        blocks.append(seq_id, 1)
        blocks.commit(seq_id, [token])
    assert cached(blocks, [1, 2, 3, 4, 9]) == 4
    assert cached(blocks, [1, 2, 3, 5, 9]) == 4


def test_a_cached_block_counts_as_free():
    blocks = BlockManager(2, 2, prefix_caching=True)
    fill(blocks, 0, [1, 2, 3, 4])
    blocks.free(0)
    assert blocks.num_free_blocks == 2
    assert blocks.can_allocate([9] * 4) is Allocation.OK


def test_forgotten_contents_are_not_found():
    blocks = BlockManager(4, 2, num_host_blocks=2, prefix_caching=True)
    fill(blocks, 0, [1, 2, 3])
    blocks.free(0)
    blocks.forget_contents()
    assert blocks.num_free_blocks == 4
    assert cached(blocks, [1, 2, 3]) == 0


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_reserved_prefix_stays_until_it_is_freed(prefix_caching):
    blocks = BlockManager(4, 2, prefix_caching=prefix_caching)
    fill(blocks, 0, [1, 2, 3, 4, 5])
    blocks.reserve(0)  # gives back the half-full block
    assert blocks.num_free_blocks == 2
    kept = blocks.block_table(0)
    blocks.allocate(1, [7, 7, 7, 7])
    with pytest.raises(NoFreeBlocks):
        blocks.allocate(2, [8])
    blocks.free(1)
    assert blocks.allocate(1, [1, 2, 3, 4, 6]) == 4
    assert blocks.block_table(1)[:2] == kept
    blocks.free(0)
    blocks.free(1)
    assert blocks.num_free_blocks == 4
    assert cached(blocks, [1, 2, 3, 4, 6]) == (4 if prefix_caching else 0)


# Two pools.


def test_swapping_out_and_in_conserves_both_pools():
    blocks = BlockManager(6, 2, num_host_blocks=5)
    blocks.allocate(0, [1, 2, 3])
    blocks.fork(0, 1)
    blocks.append(1, 2)  # a copy of the half-full block, and another block
    tables = blocks.block_table(0), blocks.block_table(1)
    out = blocks.swap_out([0, 1])
    assert {src for src, _ in out} == set(tables[0] + tables[1])
    to = dict(out)
    assert (blocks.block_table(0), blocks.block_table(1)) == tuple(tuple(to[b] for b in table) for table in tables)
    assert (blocks.num_free_blocks, blocks.num_free_host_blocks) == (6, 1)
    blocks.allocate(2, [9])  # another has come meanwhile
    back = blocks.swap_in([0, 1])
    assert {src for src, _ in back} == {dst for _, dst in out}
    assert (blocks.num_free_blocks, blocks.num_free_host_blocks) == (1, 5)
    assert blocks.block_table(0)[0] == blocks.block_table(1)[0]  # shared as before
    assert blocks.ref_count(blocks.block_table(0)[0]) == 2
    assert not set(blocks.block_table(0) + blocks.block_table(1)) & set(blocks.block_table(2))
    for seq_id in range(3):
        blocks.free(seq_id)
    assert (blocks.num_free_blocks, blocks.num_free_host_blocks) == (6, 5)


def test_a_swapped_sequence_can_fork_commit_and_be_freed():
    blocks = BlockManager(4, 2, num_host_blocks=4, prefix_caching=True)
    blocks.allocate(0, [1, 2, 3, 4])
    blocks.commit(0, [1, 2])
    blocks.swap_out([0])
    blocks.commit(0, [3, 4])  # its step was in flight
    blocks.fork(0, 1)
    assert blocks.block_table(0) == blocks.block_table(1)
    blocks.free(0)
    assert blocks.num_free_host_blocks == 2
    assert cached(blocks, [1, 2, 9]) == 2  # the device's copy is still there
    blocks.allocate(5, [7] * 8)
    blocks.free(5)
    assert cached(blocks, [1, 2, 9]) == 0  # and now overwritten
    blocks.swap_in([1])
    assert cached(blocks, [1, 2, 3, 4, 5]) == 4  # on the device again
    blocks.free(1)
    assert (blocks.num_free_blocks, blocks.num_free_host_blocks) == (4, 4)


def test_swapping_out_leaves_what_others_hold():
    blocks = BlockManager(4, 2, num_host_blocks=4)
    blocks.allocate(0, [1, 2, 3])
    blocks.fork(0, 1)
    table = blocks.block_table(1)
    blocks.swap_out([0])
    assert (blocks.block_table(1), blocks.num_free_blocks, blocks.num_free_host_blocks) == (table, 2, 2)
    blocks.swap_in([0])
    assert not set(blocks.block_table(0)) & set(table)
    assert blocks.num_blocks_of([0, 1]) == 4


def test_what_was_not_written_after_all_is_retracted_held_or_free():
    blocks = BlockManager(8, 2, prefix_caching=True)
    fill(blocks, 0, [1, 2, 3])
    record: list[tuple[int, bytes]] = []
    blocks.record_published(record)
    blocks.commit(0, [])
    fill(blocks, 1, [1, 2, 3, 4, 5])  # finds the first block, and publishes the second
    fill(blocks, 2, [7, 8, 9])
    blocks.record_published(None)
    fill(blocks, 3, [5, 6, 7])
    blocks.free(2)
    assert len(record) == 2
    blocks.retract(record)
    assert cached(blocks, [1, 2, 3, 4, 5]) == 2
    assert cached(blocks, [7, 8, 9]) == 0
    assert cached(blocks, [5, 6, 7]) == 2
    blocks.free(1)
    for seq_id in (0, 3):
        blocks.free(seq_id)
    assert blocks.num_free_blocks == 8


def test_what_was_hashed_last_does_not_change_with_the_sequence():
    """The next prompt equals what the sequence holds now, not what it held when its prompt was hashed."""
    blocks = BlockManager(9, 2, prefix_caching=True)
    blocks.allocate(0, [1, 2, 3, 4, 5])
    blocks.commit(0, [1, 2, 3, 4, 5])
    blocks.truncate(0, 2)
    blocks.append(0, 2)
    blocks.commit(0, [7, 8])
    assert fill(blocks, 1, [1, 2, 7, 8, 9]) == 4
    blocks.free(0)
    blocks.free(1)
    assert cached(blocks, [1, 2, 3, 4, 5]) == 2

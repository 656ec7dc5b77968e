"""The scheduler where requests share, swap, search by beams, or run one step ahead: steps worked out by hand."""

import json
from dataclasses import fields

import numpy as np
import pytest
from scheduling import STOP, add, make_group, make_scheduler, row_of, shapes, step, until

from jpaged.block_manager import BlockCopy
from jpaged.scheduler_output import Sample, SchedulerOutput, TableUpdate

# Chunks.


def test_three_long_prompts_under_a_threshold():
    """Each prompt takes at most 400 of a step's 1,024 tokens; once past its prompt, it decodes first."""
    _, scheduler = make_scheduler(num_blocks=1000, block_size=16, budget=1024, max_chunk=400)
    add(scheduler, *(make_group(seq_id, 800) for seq_id in range(3)))
    assert shapes(step(scheduler)) == [(0, 0, 400), (1, 0, 400), (2, 0, 224)]
    assert shapes(step(scheduler)) == [(0, 400, 400), (1, 400, 400), (2, 224, 224)]
    assert shapes(step(scheduler)) == [(0, 800, 1), (1, 800, 1), (2, 448, 352)]


# Parallel sampling.


def test_samples_fork_from_one_prompt_and_copy_where_they_part():
    blocks, scheduler = make_scheduler(num_blocks=10, block_size=2)
    group = make_group(0, 3, n=3)
    scheduler.add(group)
    output = step(scheduler)
    assert shapes(output) == [(0, 0, 3)]
    rows = [row_of(sequence) for sequence in group.sequences]
    assert list(output.samples) == [Sample(seq_id, row, 2) for seq_id, row in enumerate(rows)]
    assert {(new.seq_id, new.row) for new in output.new_rows} == set(enumerate(rows))
    assert blocks.num_free_blocks == 8
    table = blocks.block_table(0)
    assert {update.block_ids for update in output.table_updates} == {table}

    output = step(scheduler)
    assert [s.token_ids for s in output.sequences] == [None] * 3
    new = [blocks.block_table(seq_id)[1] for seq_id in range(3)]
    assert new[2] == table[1]  # the last one writes in place
    assert output.copies == (BlockCopy(table[1], new[0]), BlockCopy(table[1], new[1]))
    assert output.table_updates == (TableUpdate(rows[0], 1, (new[0],)), TableUpdate(rows[1], 1, (new[1],)))
    assert blocks.num_free_blocks == 6


def test_samples_after_a_full_block_copy_nothing():
    blocks, scheduler = make_scheduler(num_blocks=10, block_size=2)
    scheduler.add(make_group(0, 4, n=2))
    step(scheduler)
    output = step(scheduler)
    assert output.copies == ()
    assert blocks.num_free_blocks == 6
    assert blocks.block_table(0)[:2] == blocks.block_table(1)[:2]


def test_admission_counts_the_copies_to_come():
    _, scheduler = make_scheduler(num_blocks=8, block_size=2)
    group = make_group(1, 3, n=4)  # two blocks and three copies
    add(scheduler, make_group(0, 4), group)
    assert shapes(step(scheduler)) == [(0, 0, 4), (1, 0, 3)]
    _, scheduler = make_scheduler(num_blocks=7, block_size=2)  # where one block is kept free
    add(scheduler, make_group(0, 4), make_group(1, 3, n=4))
    assert shapes(step(scheduler)) == [(0, 0, 4)]


def test_samples_that_are_computed_anew_share_their_prompt_again():
    blocks, scheduler = make_scheduler(num_blocks=8, block_size=2, preemption="recompute")
    first, pair = make_group(0, 2, max_tokens=12), make_group(1, 5, n=2, max_tokens=8)
    add(scheduler, first, pair)
    until(scheduler, lambda: scheduler.num_preemptions)
    output = until(scheduler, lambda: pair.sequences[0].num_slots)
    # Both have sampled the same, and share the three full blocks that are equal; these are computed once.
    assert pair.sequences[0].token_ids[:6] == pair.sequences[1].token_ids[:6]
    assert blocks.block_table(1)[:3] == blocks.block_table(2)[:3]
    assert [start for seq_id, start, _ in shapes(output) if seq_id == 2] == [6]


# Beams.


def test_beams_from_prompt_to_end():
    blocks, scheduler = make_scheduler(num_blocks=10, block_size=2)
    group = make_group(0, 3, beam_width=2, max_tokens=3)
    (root,) = group.sequences
    scheduler.add(group)
    output = scheduler.schedule()
    assert list(output.samples) == [Sample(0, row_of(root), 2)]
    assert scheduler.schedule().is_empty  # sits out until the host has chosen
    assert scheduler.update(output, [33]) == [group]
    assert root.token_ids == [100, 101, 102]  # what was sampled is not used
    child = scheduler.fork(0, 7, 1)
    assert (child.token_ids, child.prompt_len, child.index) == ([100, 101, 102], 3, 1)
    scheduler.append_token(0, 50)
    scheduler.append_token(7, 51)

    scheduler.update(scheduler._in_flight[0].output, [])
    output = scheduler.schedule()
    assert shapes(output) == [(0, 3, 1), (7, 3, 1)]
    assert [s.token_ids for s in output.sequences] == [(50,), (51,)]
    assert [(new.seq_id, new.row) for new in output.new_rows] == [(7, child.row)]
    assert output.new_rows[0].token_ids == (100, 101, 102, 51)
    assert output.copies == (BlockCopy(blocks.block_table(7)[1], blocks.block_table(0)[1]),)
    assert output.table_updates[-1] == TableUpdate(row_of(child), 0, blocks.block_table(7))
    assert [s.token_index for s in output.samples] == [0, 1]
    scheduler.update(output, [1, 1])

    scheduler.finish(0, "stop")  # both continue the second; the row of the first is free for its fork
    scheduler.fork(7, 8, 2)
    scheduler.append_token(7, 60)
    scheduler.append_token(8, 61)
    assert shapes(step(scheduler)) == [(7, 4, 1), (8, 4, 1)]
    for seq_id in (7, 8):
        scheduler.append_token(seq_id, 70)
        scheduler.finish(seq_id, "length")
    assert not scheduler.has_unfinished()
    assert blocks.num_free_blocks == 10
    assert [s.token_ids[3:] for s in group.sequences] == [[50], [51, 60, 70], [51, 61, 70]]


def test_beams_wait_for_a_step_that_takes_all_of_them():
    _, scheduler = make_scheduler(budget=3)
    group = make_group(5, 2, beam_width=2)
    add(scheduler, make_group(0, 1, n=2), group)
    assert shapes(step(scheduler)) == [(0, 0, 1), (5, 0, 2)]
    scheduler.fork(5, 6, 1)
    scheduler.append_token(5, 1)
    scheduler.append_token(6, 2)
    scheduler.add(make_group(7, 1))
    assert shapes(step(scheduler)) == [(0, 1, 1), (1, 1, 1)]  # one token left: neither beams nor newcomers
    scheduler.finish(1, "stop")
    assert shapes(step(scheduler)) == [(0, 2, 1), (5, 2, 1), (6, 2, 1)]


def test_more_beams_than_a_step_has_tokens():
    _, scheduler = make_scheduler(budget=3)
    group = make_group(0, 2, beam_width=4)
    scheduler.add(group)
    assert step(scheduler).ended == ("r0",)
    assert group.error == "the request has 4 beams, more than the 3 tokens of a step"


def test_wrong_calls_of_a_beam_search():
    _, scheduler = make_scheduler()
    beams, plain = make_group(0, 3, beam_width=2), make_group(1, 3)
    add(scheduler, beams, plain)
    output = scheduler.schedule()
    for raised, match, call in [
        (ValueError, "parent_id: expected a sequence of a beam search, got 1", lambda: scheduler.fork(1, 9, 1)),
        (ValueError, "parent_id: expected a sequence that awaits no sample, got 0", lambda: scheduler.fork(0, 9, 1)),
        (ValueError, "seq_id: expected a sequence of a beam search, got 1", lambda: scheduler.append_token(1, 5)),
        (ValueError, "seq_id: expected a sequence that awaits no sample", lambda: scheduler.append_token(0, 5)),
        (KeyError, "seq_id: expected an unfinished sequence, got 17", lambda: scheduler.fork(17, 9, 1)),
        (ValueError, "beam_width: expected at least 1", lambda: scheduler.add(make_group(5, 3, beam_width=0))),
        (ValueError, "beam_width: .* one sequence", lambda: scheduler.add(make_group(5, 3, n=2, beam_width=2))),
    ]:
        with pytest.raises(raised, match=match):
            call()
    scheduler.update(output, [9, 9])
    with pytest.raises(ValueError, match="child_id: expected an id not in use, got 1"):
        scheduler.fork(0, 1, 1)
    scheduler.fork(0, 9, 1)
    with pytest.raises(ValueError, match="expected fewer than beam_width 2 sequences unfinished"):
        scheduler.fork(0, 10, 2)


# Swapping.


def swapped_pair(preemption, num_host_blocks=8, **options):
    """A request of one sequence, and one of two that has had to leave."""
    blocks, scheduler = make_scheduler(
        num_blocks=6, block_size=2, num_host_blocks=num_host_blocks, preemption=preemption, **options
    )
    first, pair = make_group(0, 2, max_tokens=6), make_group(1, 3, n=2, max_tokens=4)
    add(scheduler, first, pair)
    step(scheduler)
    output = step(scheduler)
    before = []
    while not scheduler.num_preemptions:
        assert pair.unfinished()
        before = [blocks.block_table(seq_id) for seq_id in (1, 2)]
        output = step(scheduler)
    return blocks, scheduler, pair, before, output


def test_a_group_is_swapped_out_and_in_whole():
    blocks, scheduler, pair, before, output = swapped_pair("auto")
    assert pair.is_swapped
    assert (scheduler.num_swapped, scheduler.num_swapped_out) == (1, 1)
    to = dict(output.swap_out)
    for seq_id, table in zip((1, 2), before, strict=True):
        assert blocks.block_table(seq_id)[: len(table)] == tuple(to[block] for block in table)
    assert blocks.num_free_host_blocks == 8 - len(output.swap_out)
    known = [list(s.token_ids) for s in pair.sequences]
    output = until(scheduler, lambda: not pair.is_swapped)
    assert {src for src, _ in output.swap_in} == set(to.values())
    # Of each only the last token, which no step has computed, is computed; its id is told again.
    assert [(s.seq_id, s.start, s.token_ids) for s in output.sequences] == [
        (seq_id, len(ids) - 1, (ids[-1],)) for seq_id, ids in enumerate(known, 1)
    ]
    assert blocks.num_free_host_blocks == 8
    assert [new.seq_id for new in output.new_rows] == [1, 2]
    until(scheduler, lambda: not scheduler.has_unfinished())
    assert [len(s.token_ids) for s in pair.sequences] == [7, 7]
    assert pair.error is None
    assert blocks.num_free_blocks == 6


@pytest.mark.parametrize(("preemption", "num_host_blocks"), [("recompute", 8), ("auto", 0), ("auto", 2), ("swap", 2)])
def test_a_group_is_computed_anew_where_it_must(preemption, num_host_blocks):
    blocks, _, pair, _, output = swapped_pair(preemption, num_host_blocks)
    assert (output.swap_out, pair.is_swapped) == ((), False)
    assert [s.num_computed for s in pair.sequences] == [0, 0]
    assert blocks.num_free_host_blocks == num_host_blocks


@pytest.mark.parametrize(("preemption", "is_swapped"), [("swap", True), ("auto", False), ("recompute", False)])
def test_who_is_alone_is_swapped_only_if_all_are(preemption, is_swapped):
    _, scheduler = make_scheduler(num_blocks=4, block_size=2, num_host_blocks=4, preemption=preemption)
    group = make_group(1, 2, max_tokens=6)
    add(scheduler, make_group(0, 2, max_tokens=6), group)
    until(scheduler, lambda: scheduler.num_preemptions)
    assert group.is_swapped is is_swapped
    until(scheduler, lambda: not scheduler.has_unfinished())
    assert len(group.sequences[0].token_ids) == 8


def test_a_copy_that_was_not_made_is_swapped_out_from_its_source():
    """One of a pair has got its copy in the very step in which the other finds no block and the pair has to leave."""
    blocks, scheduler = make_scheduler(num_blocks=6, block_size=2, num_host_blocks=8)
    pair = make_group(1, 3, n=3)
    add(scheduler, make_group(0, 1, max_tokens=9), pair)
    step(scheduler)
    blocks.allocate(77, [1, 1, 1])  # someone takes what was kept for the second copy
    table = blocks.block_table(1)
    output = step(scheduler)
    assert pair.is_swapped
    assert output.copies == ()
    sources = [src for src, _ in output.swap_out]
    assert set(sources) == set(table)
    assert sources.count(table[1]) == 2  # for the one that was to have its copy, and for the others
    assert len({dst for _, dst in output.swap_out}) == len(sources)


def test_a_prompt_under_way_is_swapped_before_its_samples_fork():
    _, scheduler = make_scheduler(num_blocks=7, block_size=2, budget=2, num_host_blocks=8, preemption="swap")
    pair = make_group(1, 7, n=2, max_tokens=2)
    add(scheduler, make_group(0, 1, max_tokens=12), pair)
    until(scheduler, lambda: scheduler.num_preemptions)
    assert pair.is_swapped
    assert not pair.is_forked
    num_computed = pair.sequences[0].num_computed
    assert 0 < num_computed < 7
    output = until(scheduler, lambda: not pair.is_swapped)
    assert output.sequences[-1].start == num_computed
    until(scheduler, lambda: not scheduler.has_unfinished())
    assert [len(s.token_ids) for s in pair.sequences] == [9, 9]


def test_swapping_needs_blocks_on_the_host():
    with pytest.raises(ValueError, match="preemption: expected blocks on the host for 'swap', got num_host_blocks=0"):
        make_scheduler(preemption="swap")
    with pytest.raises(ValueError, match="preemption: expected 'auto', 'swap' or 'recompute', got 'never'"):
        make_scheduler(preemption="never")


# What is cached.


def test_a_prompt_begins_where_the_cache_ends():
    _, scheduler = make_scheduler(prefix_caching=True)
    first, second = make_group(0, 10), make_group(1, 11)
    add(scheduler, first, second)
    output = step(scheduler)  # the second reads in this step what the first writes in it
    assert shapes(output) == [(0, 0, 10), (1, 8, 3)]
    assert output.new_rows[1].token_ids == tuple(range(100, 111))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
    assert (scheduler.num_prompt_tokens, scheduler.num_cached_tokens) == (21, 8)


def test_what_was_generated_is_found_too():
    _, scheduler = make_scheduler(prefix_caching=True)
    scheduler.add(make_group(0, 3, max_tokens=6))
    until(scheduler, lambda: not scheduler.has_unfinished())
    scheduler.add(make_group(1, [100, 101, 102, 9, 9, 9, 9, 9, 9, 9]))
    assert shapes(step(scheduler)) == [(1, 8, 2)]


def test_other_salts_and_prompt_logits_find_nothing():
    _, scheduler = make_scheduler(prefix_caching=True)
    salted, all_logits = make_group(1, 10, cache_salt="x"), make_group(2, 10, needs_prompt_logits=True)
    add(scheduler, make_group(0, 10), salted, all_logits)
    assert shapes(step(scheduler)) == [(0, 0, 10), (1, 0, 10), (2, 0, 10)]
    assert (salted.num_cached_tokens, all_logits.num_cached_tokens) == (0, 0)


def test_statistics_count_a_request_once():
    _, scheduler = make_scheduler(num_blocks=4, block_size=2, prefix_caching=True)
    add(scheduler, make_group(0, 2, max_tokens=6), make_group(1, [7, 8], max_tokens=6))
    until(scheduler, lambda: not scheduler.has_unfinished())
    assert scheduler.num_preemptions > 0
    assert (scheduler.num_prompt_tokens, scheduler.num_cached_tokens) == (4, 0)


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_kept_prefix(prefix_caching):
    blocks, scheduler = make_scheduler(num_blocks=8, block_size=2, prefix_caching=prefix_caching)
    scheduler.add(make_group(0, 5, max_tokens=1, keeps_prefix=True, request_id="system"))
    step(scheduler)
    assert not scheduler.has_unfinished()
    assert blocks.num_free_blocks == 6  # two full blocks are kept
    with pytest.raises(ValueError, match="request_id: expected one not in use, got 'system'"):
        scheduler.add(make_group(3, 5, request_id="system"))
    group = make_group(1, 6, max_tokens=2)
    scheduler.add(group)
    assert shapes(step(scheduler)) == [(1, 4, 2)]
    step(scheduler)
    too_long = make_group(2, [7] * 13, max_tokens=1)  # seven blocks: six are left, and no one else's turn comes
    scheduler.add(too_long)
    assert step(scheduler).ended == ("r2",)
    assert too_long.error == (
        "the request needs 7 blocks of 2 tokens, more than the pool's 8 beside the prefixes that are kept"
    )
    scheduler.release_prefix("system")
    assert blocks.num_free_blocks == 8
    with pytest.raises(KeyError, match="system"):
        scheduler.release_prefix("system")


# Priorities.


def test_priorities_come_first_and_leave_last():
    _, scheduler = make_scheduler(num_blocks=4, block_size=2, max_num_seqs=2)
    low, urgent, later = make_group(0, 2, priority=1), make_group(1, 2, priority=0), make_group(2, 2, priority=0)
    add(scheduler, low, urgent, later)
    assert shapes(step(scheduler)) == [(1, 0, 2), (2, 0, 2)]
    scheduler.abort("r2")
    assert shapes(step(scheduler)) == [(1, 2, 1), (0, 0, 2)]
    output = until(scheduler, lambda: scheduler.num_preemptions)
    assert (low.sequences[0].row, shapes(output)[0][0]) == (None, 1)
    scheduler.add(make_group(3, 1, priority=-1))  # as urgent as can be, but nothing new comes while one waits to return
    assert {s.seq_id for s in step(scheduler).sequences} == {1}


# One step ahead.


def test_decodes_follow_samples_that_are_not_back():
    blocks, scheduler = make_scheduler(block_size=2)
    group = make_group(0, 3, max_tokens=4)
    scheduler.add(group)
    outputs = [scheduler.schedule(), scheduler.schedule()]
    assert [shapes(output) for output in outputs] == [[(0, 0, 3)], [(0, 3, 1)]]
    assert outputs[1].sequences[0].token_ids is None
    with pytest.raises(ValueError, match="at most one step in flight, got 2"):
        scheduler.schedule()
    with pytest.raises(ValueError, match="expected that of the step scheduled first"):
        scheduler.update(outputs[1], [9])
    scheduler.update(outputs[0], [21])
    outputs.append(scheduler.schedule())
    scheduler.update(outputs[1], [22])
    outputs.append(scheduler.schedule())  # computes the third sample, which is followed by the last
    scheduler.update(outputs[2], [23])
    outputs.append(scheduler.schedule())
    assert outputs[4].is_empty
    assert scheduler.update(outputs[3], [24]) == [group]
    assert group.sequences[0].token_ids[3:] == [21, 22, 23, 24]
    assert blocks.num_free_blocks == 100


def test_what_ends_is_released_once_no_step_in_flight_uses_it():
    blocks, scheduler = make_scheduler(num_blocks=4, block_size=2, max_num_seqs=1)
    add(scheduler, make_group(0, 3), make_group(1, 3))
    first = scheduler.schedule()
    second = scheduler.schedule()
    scheduler.update(first, [STOP])
    assert blocks.num_free_blocks == 2  # the second step still reads and writes them
    third = scheduler.schedule()
    assert third.is_empty
    assert scheduler.update(second, [5]) == []
    assert blocks.num_free_blocks == 4
    scheduler.update(third, [])
    assert shapes(step(scheduler)) == [(1, 0, 3)]


def test_a_preempted_requests_tokens_in_flight_are_kept():
    _, scheduler = make_scheduler(num_blocks=4, block_size=2)
    first, second = make_group(0, 2, max_tokens=6), make_group(1, 2, max_tokens=6)
    add(scheduler, first, second)
    pending = scheduler.schedule()
    for _ in range(3):  # the third of these has no block left for the second
        output = scheduler.schedule()
        scheduler.update(pending, [7] * len(pending.samples))
        pending = output
    assert scheduler.num_preemptions == 1
    # The step before the one that preempts has sampled a token for both.
    assert [len(s.token_ids) for g in (first, second) for s in g.sequences] == [5, 5]
    assert second.sequences[0].row is None
    for _ in range(30):
        output = scheduler.schedule()
        scheduler.update(pending, [7] * len(pending.samples))
        pending = output
    assert not scheduler.has_unfinished()
    assert second.sequences[0].token_ids == [100, 101, *[7] * 6]


def test_who_has_left_waits_for_its_tokens_in_flight():
    """One of a pair ends while it is computed anew; the other, which has a sample in flight, has to leave with it."""
    _, scheduler = make_scheduler(num_blocks=20, block_size=1, budget=4)
    pair = make_group(0, 2, n=2, max_tokens=9)
    scheduler.add(pair)
    step(scheduler, 21)
    step(scheduler, 22)
    scheduler.preempt_all()
    first = scheduler.schedule()
    assert shapes(first) == [(0, 0, 4)]
    assert [s.seq_id for s in first.samples] == [0]
    scheduler.finish(1, "abort")
    second = scheduler.schedule()
    assert second.is_empty
    scheduler.update(first, [31])
    scheduler.update(second, [])
    assert pair.sequences[0].token_ids == [100, 101, 21, 22, 31]
    assert shapes(step(scheduler)) == [(0, 0, 4)]
    step(scheduler, 32)
    assert pair.sequences[0].token_ids[2:] == [21, 22, 31, 32]


def test_a_step_that_fails_ends_its_requests_and_no_other():
    blocks, scheduler = make_scheduler(num_blocks=20, block_size=2, prefix_caching=True, max_num_seqs=2)
    running, new, waiting = make_group(0, 5), make_group(1, [*range(100, 105), 9]), make_group(2, 5)
    add(scheduler, running)
    step(scheduler)
    add(scheduler, new, waiting)
    output = scheduler.schedule()  # the new one has found what the first step wrote
    assert shapes(output) == [(0, 5, 1), (1, 4, 2)]
    assert scheduler.fail("out of memory") == [running, new]
    assert [g.error for g in (running, new, waiting)] == ["out of memory", "out of memory", None]
    assert blocks.num_free_blocks == 20
    with pytest.raises(ValueError, match="output"):
        scheduler.update(output, [1, 2])
    assert shapes(step(scheduler)) == [(2, 4, 1)]  # what the first step wrote is there; what the second was to, not
    scheduler.abort("r2")
    scheduler.add(make_group(3, [*range(100, 105), 9, 9]))
    assert shapes(step(scheduler)) == [(3, 4, 3)]


def test_all_is_computed_anew_when_the_cache_is_lost():
    blocks, scheduler = make_scheduler(num_blocks=20, block_size=2, prefix_caching=True)
    scheduler.add(make_group(5, 4, max_tokens=1, keeps_prefix=True, request_id="system"))
    step(scheduler)
    group = make_group(0, 5)
    scheduler.add(group)
    assert shapes(step(scheduler, 21)) == [(0, 4, 1)]
    scheduler.schedule()
    assert scheduler.preempt_all() == ["system"]
    assert blocks.num_free_blocks == 20
    assert shapes(step(scheduler)) == [(0, 0, 6)]


# The data of a step.


def plain(value):
    """As JSON has it; TypeError for what is more than data."""
    if isinstance(value, np.ndarray):
        assert value.dtype == np.int32
        return value.tolist()
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is no plain data")


def test_an_output_is_plain_data():
    _, scheduler = make_scheduler(num_blocks=7, block_size=2, num_host_blocks=8)
    add(scheduler, make_group(0, 2, max_tokens=9), make_group(1, 3, n=2), make_group(4, 3, beam_width=2))
    for _ in range(3):
        output = step(scheduler)
        data = {}
        for field in fields(SchedulerOutput):
            value = getattr(output, field.name)
            if field.name in ("sequences", "samples"):
                value = {column.name: getattr(value, column.name) for column in fields(value)}
            if field.name == "new_rows":
                value = [row._replace(params=None) for row in output.new_rows]
            data[field.name] = json.loads(json.dumps(value, default=plain))
        assert len(data["sequences"]["seq_ids"]) == len(output.sequences)


def test_arrays_do_not_change_with_the_next_step():
    _, scheduler = make_scheduler()
    add(scheduler, make_group(0, 3), make_group(1, 3))
    step(scheduler)
    output = step(scheduler)
    before = list(output.sequences), list(output.samples)
    step(scheduler)
    scheduler.abort("r0")
    step(scheduler)
    assert (list(output.sequences), list(output.samples)) == before

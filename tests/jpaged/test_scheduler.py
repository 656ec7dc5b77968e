"""The scheduler against steps worked out by hand."""

import pytest
from scheduling import STOP, add, make_group, make_scheduler, shapes, step

from jpaged.block_manager import BlockManager
from jpaged.scheduler import Scheduler
from jpaged.scheduler_output import NewRow, Sample, ScheduledSequence, TableUpdate

# One request, in full.


def test_a_request_from_prompt_to_end():
    blocks, scheduler = make_scheduler(num_blocks=8, block_size=2)
    group = make_group(7, [11, 12, 13], max_tokens=4)
    sequence = group.sequences[0]
    scheduler.add(group)
    assert (scheduler.num_waiting, scheduler.num_running) == (1, 0)

    output = scheduler.schedule()
    row = sequence.row
    assert row is not None
    table = blocks.block_table(7)
    assert len(table) == 2
    assert list(output.sequences) == [ScheduledSequence(7, row, 0, 3, (11, 12, 13))]
    assert output.table_updates == (TableUpdate(row, 0, table),)
    assert output.new_rows == (NewRow(row, 7, 0, 3, group.params, 7, frozenset({STOP}), (11, 12, 13)),)
    assert list(output.samples) == [Sample(7, row, 2)]
    assert (output.ended, output.num_tokens) == ((), 3)
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 1)
    assert (blocks.num_free_blocks, scheduler.num_unused_slots) == (6, 1)  # 4 slots, 3 tokens
    assert scheduler.update(output, [21]) == [group]
    assert sequence.token_ids == [11, 12, 13, 21]

    output = scheduler.schedule()  # token 21, at position 3, in the second block's second slot
    assert list(output.sequences) == [ScheduledSequence(7, row, 3, 1, None)]
    assert (output.table_updates, output.new_rows, list(output.samples)) == ((), (), [Sample(7, row, 0)])
    scheduler.update(output, [22])

    output = scheduler.schedule()  # token 22, at position 4, opens the third block
    assert output.table_updates == (TableUpdate(row, 2, blocks.block_table(7)[2:]),)
    assert len(blocks.block_table(7)) == 3
    scheduler.update(output, [23])
    assert (blocks.num_free_blocks, scheduler.num_unused_slots) == (5, 1)

    step(scheduler, 24)
    assert sequence.token_ids == [11, 12, 13, 21, 22, 23, 24]
    assert (sequence.finish_reason, sequence.row) == ("length", None)
    assert not scheduler.has_unfinished()
    assert blocks.num_free_blocks == 8
    assert step(scheduler).is_empty


def test_stop_tokens_end_and_stay():
    _, scheduler = make_scheduler()
    group = make_group(0, 3)
    scheduler.add(group)
    step(scheduler, 5)
    step(scheduler, STOP)
    assert group.sequences[0].token_ids[3:] == [5, STOP]
    assert group.sequences[0].finish_reason == "stop"


def test_stop_tokens_count_only_after_min_tokens():
    _, scheduler = make_scheduler()
    group = make_group(0, 3, min_tokens=2)
    scheduler.add(group)
    for _ in range(9):
        step(scheduler, STOP)
    assert group.sequences[0].token_ids[3:] == [STOP] * 3
    assert group.sequences[0].finish_reason == "stop"


def test_a_stop_token_as_the_last_possible_is_a_stop():
    _, scheduler = make_scheduler()
    group = make_group(0, 3, max_tokens=1)
    scheduler.add(group)
    step(scheduler, STOP)
    assert group.sequences[0].finish_reason == "stop"


def test_the_model_length_ends_before_max_tokens_does():
    _, scheduler = make_scheduler()
    group = make_group(0, 3, max_tokens=16, model_len=5)
    scheduler.add(group)
    for _ in range(9):
        step(scheduler)
    assert len(group.sequences[0].token_ids) == 5
    assert group.sequences[0].finish_reason == "length"


# The token budget.


def test_chunked_prefill_shares_the_budget():
    _, scheduler = make_scheduler(budget=8)
    add(scheduler, make_group(0, 10), make_group(1, 5), make_group(2, 6))

    first = step(scheduler)
    assert shapes(first) == [(0, 0, 8)]
    assert len(first.samples) == 0

    second = step(scheduler)  # 2 left of the first, 5 of the second, 1 for the third; one-token sequences first
    assert shapes(second) == [(2, 0, 1), (0, 8, 2), (1, 0, 5)]
    assert second.sequences[0].token_ids == (100,)
    assert second.sequences[1].token_ids == (108, 109)
    assert [(s.seq_id, s.token_index) for s in second.samples] == [(0, 2), (1, 7)]

    third = step(scheduler)  # decodes take their tokens before prefills do
    assert shapes(third) == [(0, 10, 1), (1, 5, 1), (2, 1, 5)]
    assert [s.token_ids for s in third.sequences] == [None, None, (101, 102, 103, 104, 105)]
    assert [(s.seq_id, s.token_index) for s in third.samples] == [(0, 0), (1, 1), (2, 6)]
    assert [output.num_tokens for output in (first, second, third)] == [8, 8, 7]


def test_the_last_chunk_of_one_token_is_not_the_rows_last_sample():
    _, scheduler = make_scheduler(budget=4)
    scheduler.add(make_group(0, 5))
    step(scheduler)
    output = step(scheduler)
    assert shapes(output) == [(0, 4, 1)]
    assert output.sequences[0].token_ids == (104,)
    assert len(output.samples) == 1
    assert step(scheduler).sequences[0].token_ids is None


def test_a_budget_of_one_serves_the_first_come_first():
    _, scheduler = make_scheduler(budget=1)
    add(scheduler, make_group(0, 2, max_tokens=2), make_group(1, 1, max_tokens=2))
    seen = []
    while scheduler.has_unfinished():
        seen += shapes(step(scheduler))
    assert seen == [(0, 0, 1), (0, 1, 1), (0, 2, 1), (1, 0, 1), (1, 1, 1)]


# Admission.


def test_the_head_of_the_queue_is_not_overtaken():
    _, scheduler = make_scheduler(num_blocks=6, block_size=2)
    add(scheduler, make_group(0, 6, max_tokens=1), make_group(1, 8, max_tokens=1), make_group(2, 1))
    assert shapes(step(scheduler)) == [(0, 0, 6)]  # the second needs 4 of the 3 blocks left; the third would fit
    assert shapes(step(scheduler)) == [(2, 0, 1), (1, 0, 8)]


def test_the_whole_prompt_is_reserved_at_admission():
    blocks, scheduler = make_scheduler(num_blocks=10, block_size=2, budget=3)
    add(scheduler, make_group(0, 12))
    step(scheduler)
    assert len(blocks.block_table(0)) == 6


@pytest.mark.parametrize(("prompt_blocks", "admitted"), [(6, True), (7, False)])
def test_admission_leaves_the_watermark(prompt_blocks, admitted):
    _, scheduler = make_scheduler(num_blocks=10, block_size=2, watermark=0.2)
    add(scheduler, make_group(0, 4), make_group(1, 2 * prompt_blocks))  # 10 - 2 - 6 = 2, and 2 are kept free
    assert len(step(scheduler).sequences) == 1 + admitted


def test_the_watermark_is_at_least_a_block():
    _, scheduler = make_scheduler(num_blocks=4, block_size=2, watermark=0.0)
    add(scheduler, make_group(0, 4), make_group(1, 4))
    assert len(step(scheduler).sequences) == 1


def test_a_lone_request_may_fill_the_pool():
    blocks, scheduler = make_scheduler(num_blocks=4, block_size=2, watermark=0.5)
    group = make_group(0, 8, max_tokens=1)
    scheduler.add(group)
    assert shapes(step(scheduler)) == [(0, 0, 8)]
    assert group.sequences[0].finish_reason == "length"
    assert blocks.num_free_blocks == 4


def test_rows_limit_admission_and_are_used_again():
    blocks, scheduler = make_scheduler(block_size=16, max_num_seqs=2)
    add(scheduler, make_group(0, 3, max_tokens=2), make_group(1, 3), make_group(2, 2))
    first = step(scheduler)
    assert {row.row for row in first.new_rows} == {0, 1}
    assert step(scheduler).new_rows == ()  # the first request ends here
    output = step(scheduler)
    assert [(row.seq_id, row.row) for row in output.new_rows] == [(2, first.new_rows[0].row)]
    assert output.table_updates == (TableUpdate(first.new_rows[0].row, 0, blocks.block_table(2)),)
    assert output.sequences[-1].token_ids == (100, 101)


def test_a_group_gets_all_its_rows_or_none():
    _, scheduler = make_scheduler(max_num_seqs=3)
    group = make_group(1, 2, n=3, max_tokens=2)
    add(scheduler, make_group(0, 2, max_tokens=2), group, make_group(4, 2, max_tokens=2))
    assert shapes(step(scheduler)) == [(0, 0, 2)]
    step(scheduler)
    output = step(scheduler)
    assert [row.sample_index for row in output.new_rows] == [0, 1, 2]
    assert shapes(output) == [(1, 0, 2)]  # the prompt once, its last token sampled from three times
    assert [(s.seq_id, s.row, s.token_index) for s in output.samples] == [
        (row.seq_id, row.row, 1) for row in output.new_rows
    ]
    assert len({row.row for row in output.new_rows}) == 3
    output = scheduler.schedule()
    assert scheduler.update(output, [STOP, 9, 9]) == [group]
    assert [s.finish_reason for s in group.sequences] == ["stop", "length", "length"]
    assert shapes(step(scheduler)) == [(4, 0, 2)]


def test_a_sequence_that_ended_leaves_its_row_and_blocks_before_its_group_does():
    blocks, scheduler = make_scheduler(num_blocks=10)
    group = make_group(0, 3, n=2)
    scheduler.add(group)
    step(scheduler)
    output = scheduler.schedule()  # each has its own half-full block now
    assert blocks.num_free_blocks == 8
    scheduler.update(output, [STOP, 9])
    assert blocks.num_free_blocks == 9
    assert [s.row is None for s in group.sequences] == [True, False]
    assert scheduler.num_running == 1
    assert shapes(step(scheduler)) == [(1, 4, 1)]


# Preemption.


def test_the_latest_is_preempted_and_computed_anew():
    blocks, scheduler = make_scheduler(num_blocks=4, block_size=2)
    a, b, c = (make_group(seq_id, 2, max_tokens=6) for seq_id in range(3))
    add(scheduler, a, b, c)
    assert shapes(step(scheduler, 21)) == [(0, 0, 2), (1, 0, 2), (2, 0, 2)]  # one block is left

    # Position 2 opens a block: the first takes the last, the second takes what the third had.
    assert shapes(step(scheduler, 22)) == [(0, 2, 1), (1, 2, 1)]
    assert (scheduler.num_preemptions, scheduler.num_running, scheduler.num_waiting) == (1, 2, 1)
    assert (c.sequences[0].row, c.sequences[0].num_computed) == (None, 0)
    assert c.sequences[0].token_ids == [100, 101, 21]

    late = make_group(3, 1, max_tokens=3)  # would fit whenever a block is free, and waits all the same
    scheduler.add(late)
    assert shapes(step(scheduler, 23)) == [(0, 3, 1), (1, 3, 1)]

    # Position 4: the second leaves two blocks, the first takes one of them.
    assert shapes(step(scheduler, 24)) == [(0, 4, 1)]
    assert scheduler.num_preemptions == 2
    assert blocks.num_free_blocks == 1
    step(scheduler, 25)
    assert shapes(step(scheduler, 26)) == [(0, 6, 1)]
    assert a.sequences[0].finish_reason == "length"

    # The second comes back before the third: prompt and generated tokens as one prompt, in a new row.
    output = step(scheduler, 27)
    assert [row.seq_id for row in output.new_rows] == [1]
    assert [row.prompt_len for row in output.new_rows] == [2]
    assert shapes(output) == [(1, 0, 5)]
    assert output.sequences[0].token_ids == (100, 101, 21, 22, 23)
    assert [(s.seq_id, s.token_index) for s in output.samples] == [(1, 4)]
    assert b.sequences[0].token_ids == [100, 101, 21, 22, 23, 27]
    assert step(scheduler).sequences[0].token_ids is None  # and goes on as any decode
    assert c.sequences[0].row is None
    while scheduler.has_unfinished():
        step(scheduler)
    assert [len(g.sequences[0].token_ids) for g in (a, b, c, late)] == [8, 8, 8, 4]


def test_a_group_is_preempted_whole_even_by_itself():
    blocks, scheduler = make_scheduler(num_blocks=4, block_size=2)
    first, pair = make_group(0, 2, max_tokens=5), make_group(1, 2, n=2, max_tokens=5)
    add(scheduler, first, pair)
    assert len(step(scheduler).samples) == 3
    # Position 2 opens a block: the first and the pair's first take the two that are left, its second finds none.
    output = scheduler.schedule()
    assert shapes(output) == [(0, 2, 1)]
    assert {update.row for update in output.table_updates} == {first.sequences[0].row}
    assert [s.row for s in pair.sequences] == [None, None]
    assert [s.num_computed for s in pair.sequences] == [0, 0]
    assert blocks.num_free_blocks == 2
    scheduler.update(output, [9])
    while first.sequences[0].finish_reason is None:
        assert {s.seq_id for s in step(scheduler).sequences} == {0}
    assert shapes(step(scheduler)) == [(2, 2, 1), (1, 0, 3)]  # their prompt's block is computed for both again


def test_a_prefill_under_way_is_preempted_too():
    blocks, scheduler = make_scheduler(num_blocks=6, block_size=2, budget=3)
    add(scheduler, make_group(0, 2, max_tokens=4), make_group(1, 8))
    assert shapes(step(scheduler)) == [(1, 0, 1), (0, 0, 2)]  # 1 block is held by the first, 4 by the second
    assert shapes(step(scheduler)) == [(0, 2, 1), (1, 1, 2)]  # the last goes to the first
    assert shapes(step(scheduler)) == [(0, 3, 1), (1, 3, 2)]
    assert shapes(step(scheduler)) == [(0, 4, 1)]  # one of the second's goes to the first, which then ends
    assert scheduler.num_preemptions == 1
    assert blocks.num_free_blocks == 6
    output = step(scheduler)
    assert shapes(output) == [(1, 0, 3)]
    assert output.sequences[0].token_ids == (100, 101, 102)


# Requests that cannot be served.


def test_a_request_larger_than_the_pool_ends_with_an_error():
    _, scheduler = make_scheduler(num_blocks=4, block_size=2)
    too_long, too_many, fits = make_group(1, 9), make_group(2, 5, n=3), make_group(5, 2)
    add(scheduler, make_group(0, 2), too_long, too_many, fits)
    output = step(scheduler)
    assert shapes(output) == [(0, 0, 2), (5, 0, 2)]
    assert output.ended == (too_long.request_id, too_many.request_id)
    assert too_long.error == "the request needs 5 blocks of 2 tokens, more than the pool's 4"
    assert too_many.error == "the request needs 5 blocks of 2 tokens, more than the pool's 4"
    assert [s.finish_reason for g in (too_long, too_many) for s in g.sequences] == ["error"] * 4
    assert fits.error is None
    assert step(scheduler).ended == ()


def test_a_request_with_more_sequences_than_rows_ends_with_an_error():
    _, scheduler = make_scheduler(max_num_seqs=2)
    group = make_group(0, 2, n=3)
    scheduler.add(group)
    output = step(scheduler)
    assert (output.ended, output.num_tokens) == ((group.request_id,), 0)
    assert group.error == "the request has 3 sequences, more than the 2 rows"
    assert not scheduler.has_unfinished()


def test_a_lone_request_that_outgrows_the_pool_ends_with_an_error():
    blocks, scheduler = make_scheduler(num_blocks=3, block_size=2)
    group = make_group(0, 4)
    scheduler.add(group)
    for _ in range(3):  # positions 0 to 5
        assert step(scheduler).ended == ()
    waiting = make_group(1, 5, max_tokens=1)
    scheduler.add(waiting)
    output = step(scheduler)
    assert output.ended == (group.request_id,)
    assert group.error == "the request needs 4 blocks of 2 tokens, more than the pool's 3"
    assert group.sequences[0].finish_reason == "error"
    assert len(group.sequences[0].token_ids) == 7  # what it had generated is kept
    assert shapes(output) == [(1, 0, 5)]  # and its blocks serve the next in the same step
    assert (blocks.num_free_blocks, scheduler.num_preemptions) == (3, 0)


def test_a_preempted_group_whose_sequences_grew_apart_counts_each_at_its_own_length():
    # Of two tokens a step the head takes one and the pair's first sequence the other; its second gets none but that
    # of their prompt. Both grow to 5 blocks beside the second's 1, and fill the pool: 2 x 6 would not fit.
    _, scheduler = make_scheduler(num_blocks=11, block_size=2, budget=2)
    head, pair = make_group(0, 1, max_tokens=12), make_group(1, 1, n=2, max_tokens=12)
    add(scheduler, head, pair)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert [len(s.token_ids) for s in pair.sequences] == [11, 2]
    while scheduler.has_unfinished():
        assert step(scheduler).ended == ()
    assert [len(s.token_ids) for s in pair.sequences] == [13, 13]


# Ending from outside.


def test_abort_of_a_waiting_request():
    _, scheduler = make_scheduler(max_num_seqs=1)
    groups = [make_group(seq_id, 2) for seq_id in range(3)]
    add(scheduler, *groups)
    step(scheduler)
    scheduler.abort("r1")
    assert groups[1].sequences[0].finish_reason == "abort"
    assert scheduler.num_waiting == 1
    scheduler.abort("r0")
    assert shapes(step(scheduler)) == [(2, 0, 2)]


def test_abort_between_schedule_and_update():
    blocks, scheduler = make_scheduler()
    gone, stays = make_group(0, 3), make_group(1, 3)
    add(scheduler, gone, stays)
    output = scheduler.schedule()
    scheduler.abort("r0")
    assert scheduler.update(output, [5, 6]) == [stays]
    assert (gone.sequences[0].token_ids, gone.sequences[0].finish_reason) == ([100, 101, 102], "abort")
    assert stays.sequences[0].token_ids[3:] == [6]
    scheduler.abort("r1")
    assert blocks.num_free_blocks == 100


def test_abort_in_the_middle_of_a_prefill_and_then_the_same_name_again():
    blocks, scheduler = make_scheduler(budget=2)
    scheduler.add(make_group(0, 5, request_id="x"))
    step(scheduler)
    output = scheduler.schedule()
    scheduler.abort("x")
    scheduler.abort("x")
    scheduler.abort("never there")
    scheduler.add(make_group(1, 2, request_id="x"))
    assert scheduler.update(output, []) == []
    output = step(scheduler)
    assert shapes(output) == [(1, 0, 2)]
    assert output.new_rows[0].seq_id == 1
    assert blocks.num_free_blocks == 99


def test_abort_of_a_preempted_request():
    blocks, scheduler = make_scheduler(num_blocks=3, block_size=2)
    add(scheduler, make_group(0, 2), make_group(1, 2))
    step(scheduler)
    step(scheduler)
    step(scheduler)
    step(scheduler)
    assert scheduler.num_preemptions == 1
    scheduler.abort("r1")
    assert scheduler.num_waiting == 0
    scheduler.abort("r0")
    assert not scheduler.has_unfinished()
    assert blocks.num_free_blocks == 3


def test_finish_ends_one_sequence():
    blocks, scheduler = make_scheduler()
    group = make_group(0, 3, n=2)
    scheduler.add(group)
    step(scheduler)
    scheduler.finish(0, "stop")
    assert [s.finish_reason for s in group.sequences] == ["stop", None]
    assert blocks.num_free_blocks == 99
    assert shapes(step(scheduler)) == [(1, 3, 1)]
    scheduler.finish(1, "stop")
    assert not scheduler.has_unfinished()


# Calls that raise change nothing.


def test_wrong_calls():
    blocks, scheduler = make_scheduler()
    scheduler.add(make_group(0, 3))
    output = scheduler.schedule()
    full = make_group(8, 5, max_tokens=1, model_len=5)
    empty = make_group(9, 3)
    empty.sequences.clear()
    for raised, match, call in [
        (ValueError, "request_id.*'r0'", lambda: scheduler.add(make_group(4, 3, request_id="r0"))),
        (ValueError, "seq_id", lambda: scheduler.add(make_group(0, 3, request_id="other"))),
        (ValueError, "max_len: expected more than the 5 prompt tokens, got 5", lambda: scheduler.add(full)),
        (ValueError, "sequences", lambda: scheduler.add(empty)),
        (KeyError, "seq_id.*17", lambda: scheduler.finish(17, "stop")),
        (ValueError, "token_ids: expected 1, one a sample, got 2", lambda: scheduler.update(output, [1, 2])),
        (ValueError, "token_ids: expected at least one", lambda: make_group(5, [])),
    ]:
        with pytest.raises(raised, match=match):
            call()
    assert (scheduler.num_running, scheduler.num_waiting, blocks.num_free_blocks) == (1, 0, 99)
    scheduler.update(output, [9])
    assert shapes(step(scheduler)) == [(0, 3, 1)]


@pytest.mark.parametrize(
    ("argument", "value"),
    [("max_num_seqs", 0), ("max_num_batched_tokens", 0), ("watermark", -0.1), ("watermark", 1.0)],
)
def test_wrong_limits(argument, value):
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "watermark": 0.01} | {argument: value}
    with pytest.raises(ValueError, match=f"{argument}: expected .*, got {value}"):
        Scheduler(BlockManager(4, 4), **limits)

"""From the scheduler's output to arrays, worked out by hand: blocks of 4, 8 rows, steps of at most 64 tokens."""

import numpy as np
import pytest

from jpaged.beam_search_params import BeamSearchParams
from jpaged.sampling_params import SamplingParams
from jpaged.sampling_rows import SamplingShape
from jpaged.scheduler_output import (
    NewRow,
    Sample,
    Samples,
    ScheduledSequence,
    ScheduledSequences,
    SchedulerOutput,
    TableUpdate,
)
from jpaged.step_inputs import StepBuilder, StepShape

PLAIN = SamplingParams()


@pytest.fixture
def builder():
    return StepBuilder(block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=18, vocab_size=70)


def step(sequences, *, samples=(), new_rows=(), table_updates=()):
    return SchedulerOutput(
        sequences=ScheduledSequences.of(ScheduledSequence(*s) for s in sequences),
        table_updates=tuple(TableUpdate(*u) for u in table_updates),
        new_rows=tuple(new_rows),
        samples=Samples.of(Sample(*s) for s in samples),
    )


def new_row(row, params: SamplingParams | BeamSearchParams = PLAIN, *, token_ids=(0, 0, 0)):
    return NewRow(row, 100 + row, 0, 3, params, 0, frozenset(), token_ids)


def build(builder, output):
    """As the runner does it."""
    builder.update_rows(output)
    return builder.build(output)


def shape_of(builder, output):
    return build(builder, output).shape


def decodes(n):
    return step([(i, i, 4, 1, None) for i in range(n)], samples=[(i, i, i) for i in range(n)])


def prefills(*lengths):
    return step([(i, i, 0, n, tuple(range(n))) for i, n in enumerate(lengths)])


def test_a_mixed_step(builder):
    """Row 5 decodes its token 9, row 2 computes a chunk of three from position 6 on."""
    output = step(
        [(15, 5, 9, 1, None), (12, 2, 6, 3, (31, 32, 33))],
        samples=[(15, 5, 0), (12, 2, 3)],
        new_rows=[new_row(5), new_row(2, SamplingParams(logprobs=1))],
        table_updates=[(5, 0, (6, 8, 1)), (2, 0, (3, 9, 0))],
    )
    shape, inputs, sampling_shape, sampling, following = build(builder, output)
    assert shape == StepShape(12, 8, is_decode=False)
    assert inputs.token_ids.tolist() == [-6, 31, 32, 33, *[0] * 8]
    assert inputs.positions.tolist() == [9, 6, 7, 8, *[0] * 8]
    # 18 tokens are five blocks. Position 9 is in the row's third block, at 1; 6 and 7 in the second, at 2 and 3.
    assert inputs.block_tables.tolist() == [[6, 8, 1, 0, 0], [3, 9, 0, 0, 0], *[[0] * 5] * 6]
    assert inputs.slot_mapping.tolist() == [1 * 4 + 1, 9 * 4 + 2, 9 * 4 + 3, 0, *[-1] * 8]
    assert inputs.context_lens.tolist() == [10, 9, *[0] * 6]
    assert inputs.query_starts.tolist() == [0, 1, 4, *[4] * 6]
    assert inputs.num_decodes == 1
    assert inputs.token_index.tolist() == [0, 3, *[0] * 6]
    assert sampling_shape == SamplingShape(8, True, False, 0, False, False, num_logprobs=20)
    assert sampling.rows.tolist() == [5, 2, *[8] * 6]
    assert sampling.positions.tolist() == [10, 9, *[0] * 6]
    assert following is None


def test_dtypes(builder):
    inputs = build(builder, step([(0, 0, 0, 2, (1, 2))], samples=[(0, 0, 1)], new_rows=[new_row(0)])).inputs
    assert {array.dtype for array in inputs} == {np.dtype(np.int32)}


def test_rows_and_tables_are_remembered(builder):
    build(builder, step([(0, 3, 0, 4, (1, 2, 3, 4))], new_rows=[new_row(3)], table_updates=[(3, 0, (7,))]))
    shape, inputs, sampling_shape, *_ = build(
        builder, step([(0, 3, 4, 1, None)], samples=[(0, 3, 0)], table_updates=[(3, 1, (2,))])
    )
    assert shape == StepShape(1, 1, is_decode=True)
    assert inputs.block_tables.tolist() == [[7, 2, 0, 0, 0]]
    assert inputs.slot_mapping.tolist() == [8]
    assert inputs.token_ids.tolist() == [-4]
    assert sampling_shape.num_logprobs == 0


def test_a_new_occupant_leaves_nothing_of_the_one_before(builder):
    first = new_row(1, SamplingParams(logprobs=5, prompt_logprobs=1), token_ids=(5, 6, 7))
    build(builder, step([(0, 1, 0, 1, (5,))], new_rows=[first], table_updates=[(1, 0, (4,))]))
    second = step([(1, 1, 0, 1, (6,))], samples=[(1, 1, 0)], new_rows=[new_row(1)], table_updates=[(1, 0, (3,))])
    shape, inputs, sampling_shape, _, following = build(builder, second)
    assert shape == StepShape(1, 1, is_decode=True)
    assert sampling_shape.num_logprobs == 0
    assert following is None
    assert inputs.slot_mapping.tolist() == [12]


def test_arrays_of_a_step_do_not_change_with_the_next(builder):
    """JAX on a CPU may read NumPy's memory in place, while the step runs."""
    first = step([(0, 0, 0, 1, (5,))], new_rows=[new_row(0)], table_updates=[(0, 0, (4,))])
    inputs = build(builder, first).inputs
    build(builder, step([(0, 0, 1, 1, None)], table_updates=[(0, 0, (6,))]))
    assert inputs.block_tables[0, 0] == 4


def test_the_prompt_tokens_that_follow(builder):
    """Of a prompt of three, in chunks of two tokens and one; the last is followed by no prompt token."""
    row = new_row(1, SamplingParams(prompt_logprobs=2), token_ids=(31, 32, 33))
    output = step([(0, 0, 5, 1, None), (1, 1, 0, 2, (31, 32))], new_rows=[new_row(0), row])
    built = build(builder, output)
    assert built.shape == StepShape(12, 8, is_decode=False)
    assert built.next_prompt_tokens.tolist() == [0, 32, 33, *[0] * 9]
    assert [builder.num_prompt_logprobs(sequence) for sequence in output.sequences] == [0, 2]
    for start in (2, 3):
        output = step([(1, 1, start, 1, (9,))], samples=[(1, 1, 0)])
        built = build(builder, output)
        assert built.shape == StepShape(1, 1, is_decode=True)
        assert built.next_prompt_tokens is None
        assert builder.num_prompt_logprobs(output.sequences[0]) == 0


def test_samples_of_one_prompt(builder):
    """Ten tokens after one sequence's: as many rows as samples, of which most have no sequence."""
    samples = [(i, i, 2) for i in range(3)]
    builder = StepBuilder(block_size=4, max_num_seqs=12, max_num_batched_tokens=64, max_model_len=18, vocab_size=70)
    output = step([(0, 0, 0, 3, (1, 2, 3))], samples=samples, new_rows=[new_row(i) for i in range(3)])
    _, inputs, _, sampling, _ = build(builder, output)
    assert inputs.token_index.tolist() == [2, 2, 2, *[0] * 5]
    assert sampling.rows.tolist() == [0, 1, 2, *[12] * 5]
    assert sampling.positions.tolist() == [3, 3, 3, *[0] * 5]
    many = step([(0, 0, 0, 1, (1,))], samples=[(i, i, 0) for i in range(10)])
    assert shape_of(builder, many) == StepShape(12, 12, is_decode=True)


def test_many_likeliest_tokens_are_padded_to_a_power_of_two(builder):
    row = new_row(0, BeamSearchParams(beam_width=11))
    built = build(builder, step([(0, 0, 0, 3, (1, 2, 3))], samples=[(0, 0, 2)], new_rows=[row]))
    assert built.shape == StepShape(12, 8, is_decode=False)
    assert built.sampling_shape == SamplingShape(8, False, False, 0, False, False, num_logprobs=32)  # 2 x 11


@pytest.mark.parametrize(("sequences", "padded"), [(1, 1), (2, 8), (8, 8), (9, 16), (17, 20), (20, 20)])
def test_decodes_are_padded_to_few_sizes(sequences, padded):
    builder = StepBuilder(block_size=4, max_num_seqs=20, max_num_batched_tokens=64, max_model_len=18, vocab_size=70)
    shape, inputs, _, sampling, _ = build(builder, decodes(sequences))
    assert shape == StepShape(padded, padded, is_decode=True)
    assert inputs.num_decodes == sequences
    assert len(sampling.rows) == len(inputs.token_ids) == padded


def test_decodes_stay_within_an_odd_number_of_rows():
    builder = StepBuilder(block_size=4, max_num_seqs=6, max_num_batched_tokens=64, max_model_len=18, vocab_size=70)
    assert shape_of(builder, decodes(5)) == StepShape(6, 6, is_decode=True)


@pytest.mark.parametrize(
    ("lengths", "tokens"),
    [((2,), 12), ((12,), 12), ((13,), 16), ((17,), 24), ((10, 10, 5), 32), ((16, 17), 48), ((16, 16, 16, 16), 64)],
)
def test_prefills_are_padded_to_a_power_of_two_or_three_quarters_of_one(builder, lengths, tokens):
    shape, inputs, *_ = build(builder, prefills(*lengths))
    assert shape == StepShape(tokens, 8, is_decode=False)
    assert len(inputs.token_ids) == len(inputs.slot_mapping) == tokens


def test_prefills_are_padded_to_no_more_than_the_budget():
    builder = StepBuilder(block_size=4, max_num_seqs=8, max_num_batched_tokens=40, max_model_len=40, vocab_size=70)
    assert shape_of(builder, prefills(33)).tokens == 40


def test_prefills_of_more_than_eight_sequences_take_all_rows():
    builder = StepBuilder(block_size=4, max_num_seqs=20, max_num_batched_tokens=64, max_model_len=18, vocab_size=70)
    assert shape_of(builder, prefills(*[2] * 8)) == StepShape(16, 8, is_decode=False)
    assert shape_of(builder, prefills(*[2] * 9)) == StepShape(24, 20, is_decode=False)


def test_fewer_rows_than_eight():
    builder = StepBuilder(block_size=4, max_num_seqs=2, max_num_batched_tokens=3, max_model_len=18, vocab_size=70)
    assert shape_of(builder, prefills(3)) == StepShape(3, 2, is_decode=False)


def test_batch_invariance_makes_every_token_a_decode_in_one_shape():
    """A chunk of two and a decode: three sequences of one token, each with its own sequence's table."""
    sizes = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 8, "max_model_len": 18, "vocab_size": 70}
    builder = StepBuilder(**sizes, batch_invariant=True)
    output = step(
        [(15, 5, 9, 1, None), (12, 2, 6, 2, (31, 32))],
        samples=[(15, 5, 0), (12, 2, 2)],
        new_rows=[new_row(5), new_row(2)],
        table_updates=[(5, 0, (6, 8, 1)), (2, 0, (3, 9))],
    )
    shape, inputs, sampling_shape, sampling, _ = build(builder, output)
    again = build(builder, decodes(1))
    assert shape == again.shape == StepShape(8, 8, is_decode=True)
    assert sampling_shape == again.sampling_shape == SamplingShape(8, True, True, 0, False, False, num_logprobs=20)
    assert inputs.block_tables[:4].tolist() == [[6, 8, 1, 0, 0], [3, 9, 0, 0, 0], [3, 9, 0, 0, 0], [0] * 5]
    assert inputs.context_lens.tolist() == [10, 7, 8, *[0] * 5]
    assert inputs.query_starts.tolist() == [0, 1, 2, *[3] * 6]
    assert inputs.num_decodes == 3
    assert inputs.slot_mapping.tolist() == [1 * 4 + 1, 9 * 4 + 2, 9 * 4 + 3, *[-1] * 5]
    assert inputs.token_index.tolist() == [0, 2, *[0] * 6]
    assert sampling.positions.tolist() == [10, 8, *[0] * 6]

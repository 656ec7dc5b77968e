"""From the scheduler's output to arrays, worked out by hand: blocks of 4, 8 rows, steps of at most 64 tokens."""

import numpy as np
import pytest

from jpaged.sampling_params import SamplingParams
from jpaged.scheduler import NewRow, Sample, ScheduledSequence, SchedulerOutput, TableUpdate
from jpaged.step_inputs import StepBuilder, StepShape

PLAIN = SamplingParams()


@pytest.fixture
def builder():
    return StepBuilder(block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=18, vocab_size=70)


def step(sequences, *, samples=(), new_rows=(), table_updates=()):
    sequences = tuple(ScheduledSequence(*s) for s in sequences)
    return SchedulerOutput(
        sequences=sequences,
        table_updates=tuple(TableUpdate(*u) for u in table_updates),
        new_rows=tuple(new_rows),
        samples=tuple(Sample(*s) for s in samples),
        ended=(),
        num_tokens=sum(s.num_tokens for s in sequences),
    )


def new_row(row, params=PLAIN, *, token_ids=(0, 0, 0)):
    return NewRow(row, 100 + row, 0, 3, tuple(token_ids), params, 0, frozenset(), ())


def shape_of(tokens, sequences, is_decode=False):
    """Of a step in which nobody asks for anything special."""
    return StepShape(tokens, sequences, is_decode, 16, False, False, 20, False)


def decodes(n):
    return step([(i, i, 4, 1, None) for i in range(n)], samples=[(i, i, i) for i in range(n)])


def prefills(*lengths):
    return step([(i, i, 0, n, tuple(range(n))) for i, n in enumerate(lengths)])


def test_a_mixed_step(builder):
    """Row 5 decodes its token 9, row 2 computes a chunk of three from position 6 on."""
    output = step(
        [(15, 5, 9, 1, None), (12, 2, 6, 3, (31, 32, 33))],
        samples=[(15, 5, 0), (12, 2, 3)],
        new_rows=[
            new_row(5, SamplingParams(temperature=0.5, top_k=-1, top_p=0.9, min_p=0.25), sample_index=2, seed=7),
            new_row(2, SamplingParams(temperature=0.0, top_k=40, logprobs=1), seed=2**32 + 5),
        ],
        table_updates=[(5, 0, (6, 8, 1)), (2, 0, (3, 9, 0))],
    )
    shape, inputs = builder.build(output)
    assert shape == StepShape(tokens=12, sequences=8, suppressed=16, is_decode=False)
    assert inputs.token_ids.tolist() == [-6, 31, 32, 33, *[0] * 8]
    assert inputs.positions.tolist() == [9, 6, 7, 8, *[0] * 8]
    # 18 tokens are five blocks. Position 9 is in the row's third block, at 1; 6 and 7 in the second, at 2 and 3.
    assert inputs.block_tables.tolist() == [[6, 8, 1, 0, 0], [3, 9, 0, 0, 0], *[[0] * 5] * 6]
    assert inputs.slot_mapping.tolist() == [1 * 4 + 1, 9 * 4 + 2, 9 * 4 + 3, 0, *[-1] * 8]
    assert inputs.context_lens.tolist() == [10, 9, *[0] * 6]
    assert inputs.query_starts.tolist() == [0, 1, 4, *[4] * 6]
    assert inputs.num_decodes == 1
    assert inputs.token_index.tolist() == [0, 3, *[0] * 6]
    assert inputs.rows.tolist() == [5, 2, *[8] * 6]
    assert inputs.sample_positions.tolist() == [10, 9, *[0] * 6]
    assert inputs.sample_index.tolist() == [2, 0, *[0] * 6]
    assert inputs.seed.tolist() == [[0, 7], [1, 5], *[[0, 0]] * 6]
    np.testing.assert_array_equal(inputs.temperature, np.array([0.5, *[0] * 7], np.float32))
    assert inputs.top_k.tolist() == [-1, 40, *[0] * 6]
    np.testing.assert_array_equal(inputs.top_p, np.array([0.9, *[1] * 7], np.float32))
    np.testing.assert_array_equal(inputs.min_p, np.array([0.25, *[0] * 7], np.float32))
    assert inputs.suppressed.tolist() == [[8, 8]] * 16  # no sample 8: nothing
    assert inputs.wants_logprobs


def test_dtypes(builder):
    _, inputs = builder.build(step([(0, 0, 0, 2, (1, 2))], samples=[(0, 0, 1)], new_rows=[new_row(0)]))
    floats, others = {"temperature", "top_p", "min_p"}, {"seed": np.uint32, "wants_logprobs": np.bool_}
    for name, array in inputs._asdict().items():
        expected = np.float32 if name in floats else others.get(name, np.int32)
        assert array.dtype == expected, name


def test_rows_and_tables_are_remembered(builder):
    params = SamplingParams(temperature=0.5)
    builder.build(step([(0, 3, 0, 4, (1, 2, 3, 4))], new_rows=[new_row(3, params)], table_updates=[(3, 0, (7,))]))
    shape, inputs = builder.build(step([(0, 3, 4, 1, None)], samples=[(0, 3, 0)], table_updates=[(3, 1, (2,))]))
    assert shape == StepShape(1, 1, 16, True)
    assert inputs.block_tables.tolist() == [[7, 2, 0, 0, 0]]
    assert inputs.slot_mapping.tolist() == [8]
    assert inputs.token_ids.tolist() == [-4]
    assert inputs.temperature.tolist() == [0.5]
    assert not inputs.wants_logprobs


def test_a_new_occupant_leaves_nothing_of_the_one_before(builder):
    before = SamplingParams(temperature=2.0, top_k=3, top_p=0.5, min_p=0.5, logprobs=5, min_tokens=9)
    first = new_row(1, before, sample_index=4, seed=99, stop_token_ids=[2])
    builder.build(step([(0, 1, 0, 1, (5,))], samples=[(0, 1, 0)], new_rows=[first], table_updates=[(1, 0, (4,))]))
    after = SamplingParams(temperature=0.0)
    second = step([(1, 1, 0, 1, (6,))], samples=[(1, 1, 0)], new_rows=[new_row(1, after)], table_updates=[(1, 0, (3,))])
    _, inputs = builder.build(second)
    assert (inputs.sample_index[0], inputs.temperature[0], inputs.top_k[0], inputs.top_p[0]) == (0, 0, 0, 1)
    assert (inputs.min_p[0], inputs.seed[0].tolist(), bool(inputs.wants_logprobs)) == (0, [0, 0], False)
    assert inputs.suppressed.tolist() == [[1, 1]] * 16
    assert inputs.slot_mapping.tolist() == [12]


def test_arrays_of_a_step_do_not_change_with_the_next(builder):
    """JAX on a CPU may read NumPy's memory in place, while the step runs."""
    first = step([(0, 0, 0, 1, (5,))], new_rows=[new_row(0)], table_updates=[(0, 0, (4,))])
    _, inputs = builder.build(first)
    builder.build(step([(0, 0, 1, 1, None)], table_updates=[(0, 0, (6,))]))
    assert inputs.block_tables[0, 0] == 4


def test_stop_tokens_are_suppressed_for_min_tokens(builder):
    """Three tokens of prompt and two more without a stop: at positions 3 and 4 none, at 5 all may be drawn."""
    params = SamplingParams(min_tokens=2)
    rows = [new_row(0, prompt_len=1, stop_token_ids=[1]), new_row(1, params, prompt_len=3, stop_token_ids=[2, 5])]
    builder.build(step([(0, 0, 0, 1, (9,)), (1, 1, 0, 1, (9,))], new_rows=rows))
    for start, expected in ((1, {(1, 2), (1, 5)}), (2, {(1, 2), (1, 5)}), (3, {(1, 2), (1, 5)}), (4, set())):
        output = step([(0, 0, start, 1, None), (1, 1, start, 1, None)], samples=[(0, 0, 0), (1, 1, 1)])
        _, inputs = builder.build(output)
        pairs = {tuple(pair) for pair in inputs.suppressed.tolist() if pair[0] < 2}  # else padding
        assert pairs == expected, start
        assert len(inputs.suppressed) == 16


def test_many_suppressed_pairs_are_padded_to_a_power_of_two(builder):
    row = new_row(0, SamplingParams(min_tokens=1, max_tokens=2), stop_token_ids=range(17))
    shape, inputs = builder.build(step([(0, 0, 0, 3, (7, 8, 9))], samples=[(0, 0, 2)], new_rows=[row]))
    assert shape.suppressed == len(inputs.suppressed) == 32
    assert sorted(inputs.suppressed.tolist()) == [[0, i] for i in range(17)] + [[8, 8]] * 15


@pytest.mark.parametrize(("sequences", "padded"), [(1, 1), (2, 8), (8, 8), (9, 16), (17, 20), (20, 20)])
def test_decodes_are_padded_to_few_sizes(sequences, padded):
    builder = StepBuilder(block_size=4, max_num_seqs=20, max_num_batched_tokens=64, max_model_len=18, vocab_size=70)
    shape, inputs = builder.build(decodes(sequences))
    assert shape == StepShape(padded, padded, 16, True)
    assert inputs.num_decodes == sequences
    assert len(inputs.rows) == len(inputs.token_ids) == padded


def test_decodes_stay_within_an_odd_number_of_rows():
    builder = StepBuilder(block_size=4, max_num_seqs=6, max_num_batched_tokens=64, max_model_len=18, vocab_size=70)
    assert builder.build(decodes(5))[0] == StepShape(6, 6, 16, True)


@pytest.mark.parametrize(
    ("lengths", "tokens"),
    [((2,), 12), ((12,), 12), ((13,), 16), ((17,), 24), ((10, 10, 5), 32), ((16, 17), 48), ((16, 16, 16, 16), 64)],
)
def test_prefills_are_padded_to_a_power_of_two_or_three_quarters_of_one(builder, lengths, tokens):
    shape, inputs = builder.build(prefills(*lengths))
    assert shape == StepShape(tokens, 8, 16, False)
    assert len(inputs.token_ids) == len(inputs.slot_mapping) == tokens


def test_prefills_are_padded_to_no_more_than_the_budget():
    builder = StepBuilder(block_size=4, max_num_seqs=8, max_num_batched_tokens=40, max_model_len=40, vocab_size=70)
    assert builder.build(prefills(33))[0].tokens == 40


def test_prefills_of_more_than_eight_sequences_take_all_rows():
    builder = StepBuilder(block_size=4, max_num_seqs=20, max_num_batched_tokens=64, max_model_len=18, vocab_size=70)
    assert builder.build(prefills(*[2] * 8))[0] == StepShape(16, 8, 16, False)
    assert builder.build(prefills(*[2] * 9))[0] == StepShape(24, 20, 16, False)


def test_fewer_rows_than_eight():
    builder = StepBuilder(block_size=4, max_num_seqs=2, max_num_batched_tokens=3, max_model_len=18, vocab_size=70)
    assert builder.build(prefills(3))[0] == StepShape(3, 2, 16, False)


@pytest.mark.parametrize(("seed", "words"), [(-1, [2**32 - 1, 2**32 - 1]), (-(2**63), [2**31, 0]), (2**64 + 3, [0, 3])])
def test_any_seed_is_taken_modulo_64_bits(builder, seed, words):
    _, inputs = builder.build(step([(0, 0, 0, 1, (1,))], samples=[(0, 0, 0)], new_rows=[new_row(0, seed=seed)]))
    assert inputs.seed[0].tolist() == words


def test_a_top_k_that_is_no_int32(builder):
    row = new_row(0, SamplingParams(top_k=2**40))
    _, inputs = builder.build(step([(0, 0, 0, 1, (1,))], samples=[(0, 0, 0)], new_rows=[row]))
    assert inputs.top_k[0] == 2**31 - 1


def test_min_tokens_that_are_no_int32(builder):
    row = new_row(0, SamplingParams(min_tokens=2**40, max_tokens=2**40), stop_token_ids=[3])
    _, inputs = builder.build(step([(0, 0, 0, 1, (1,))], samples=[(0, 0, 0)], new_rows=[row]))
    assert [0, 3] in inputs.suppressed.tolist()

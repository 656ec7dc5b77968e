"""What rows ask of the sampler, laid out for a step and worked out by hand: 8 rows, 70 tokens."""

import numpy as np
import pytest

from jpaged.beam_search_params import BeamSearchParams
from jpaged.sampling_params import SamplingParams
from jpaged.sampling_rows import SamplingRows, SamplingShape
from jpaged.scheduler_output import NewRow

PLAIN = SamplingParams()
NO_SAMPLE = (8, 0, 0.0, -1)  # of eight


@pytest.fixture
def rows():
    return SamplingRows(8, 70)


def occupy(
    rows,
    row,
    params: SamplingParams | BeamSearchParams = PLAIN,
    *,
    sample_index=0,
    seed=0,
    stop_token_ids=(),
    token_ids=(1, 2, 3),
    bad_words=(),
):
    stops = frozenset(stop_token_ids)
    rows.occupy(NewRow(row, 100 + row, sample_index, 3, params, seed, stops, token_ids, bad_words))


def lay_out(rows, *at, R=8):
    """The inputs of samples of (row, position)."""
    row, position = np.array(at, np.int32).reshape(-1, 2).T
    return rows.lay_out(row, position, R)[1]


def shape_of(rows, *at, R=8):
    row, position = np.array(at, np.int32).reshape(-1, 2).T
    return rows.lay_out(row, position, R)[0]


def edits(inputs):
    columns = (inputs.edit_sample, inputs.edit_token, inputs.edit_value, inputs.edit_after)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def real_edits(inputs):
    return [edit for edit in edits(inputs) if edit[0] < 8]


def test_parameters_by_row(rows):
    occupy(rows, 5, SamplingParams(temperature=0.5, top_k=-1, top_p=0.9, min_p=0.25), sample_index=2, seed=7)
    occupy(
        rows, 2, SamplingParams(temperature=0.0, top_k=40, presence_penalty=1.5, frequency_penalty=-1), seed=2**32 + 5
    )
    inputs = lay_out(rows, (5, 10), (2, 9))
    assert inputs.index.tolist() == [2, 0, *[0] * 6]
    assert inputs.seed.tolist() == [[0, 7], [1, 5], *[[0, 0]] * 6]
    np.testing.assert_array_equal(inputs.temperature, np.array([0.5, *[0] * 7], np.float32))
    assert inputs.top_k.tolist() == [-1, 40, *[0] * 6]
    np.testing.assert_array_equal(inputs.top_p, np.array([0.9, *[1] * 7], np.float32))
    np.testing.assert_array_equal(inputs.min_p, np.array([0.25, *[0] * 7], np.float32))
    assert inputs.penalties[:2].tolist() == [[0, 0, 1], [1.5, -1, 1]]
    assert edits(inputs) == []
    assert inputs.allowed.shape == (8, 0)
    assert (shape_of(rows, (5, 10)).is_penalized, shape_of(rows, (5, 10), (2, 9)).is_penalized) == (False, True)


@pytest.mark.parametrize(
    ("params", "draws", "cuts"),
    [
        (SamplingParams(temperature=0.0, top_k=5, top_p=0.5, min_p=0.5), False, False),
        (SamplingParams(), True, False),
        (SamplingParams(top_k=5), True, True),
        (SamplingParams(top_p=0.5), True, True),
        (SamplingParams(min_p=0.5), True, True),
    ],
)
def test_what_no_sample_asks_for_is_left_out(rows, params, draws, cuts):
    occupy(rows, 0, SamplingParams(temperature=0.0))
    occupy(rows, 1, params)
    occupy(rows, 2, SamplingParams(allowed_token_ids=[1], logit_bias={1: 1.0}, presence_penalty=1.0, logprobs=3))
    nothing = SamplingShape(8, False, False, 0, False, False, 0)
    assert shape_of(rows, (0, 3)) == nothing
    assert shape_of(rows, (0, 3), (1, 3)) == nothing._replace(draws=draws, cuts=cuts)
    everything = SamplingShape(8, True, cuts, 16, True, True, 20)
    assert shape_of(rows, (1, 3), (2, 3)) == everything


def test_dtypes(rows):
    occupy(rows, 0)
    floats = {"temperature", "top_p", "min_p", "penalties", "edit_value"}
    for name, array in lay_out(rows, (0, 3))._asdict().items():
        expected = np.float32 if name in floats else np.uint32 if name in ("seed", "allowed") else np.int32
        assert array.dtype == expected, name


def test_a_new_occupant_leaves_nothing_of_the_one_before(rows):
    before = SamplingParams(
        temperature=2.0, top_k=3, top_p=0.5, min_p=0.5, logprobs=5, min_tokens=9, allowed_token_ids=[1],
        repetition_penalty=2.0, logit_bias={4: 1.0}, bad_words="x",
    )  # fmt: skip
    occupy(rows, 1, before, sample_index=4, seed=99, stop_token_ids=[2], bad_words=((7,), (8, 9)))
    occupy(rows, 0, SamplingParams(allowed_token_ids=[2]))
    occupy(rows, 1, SamplingParams(temperature=0.0))
    inputs = lay_out(rows, (1, 4))
    assert (inputs.index[0], inputs.temperature[0], inputs.top_k[0], inputs.top_p[0]) == (0, 0, 0, 1)
    assert (inputs.min_p[0], inputs.seed[0].tolist(), inputs.penalties[0].tolist()) == (0, [0, 0], [0, 0, 1])
    assert edits(inputs) == []
    assert inputs.allowed.shape == (8, 0)
    assert shape_of(rows, (1, 4)) == SamplingShape(8, False, False, 0, False, False, 0)
    # Beside a row that is restricted this one may still draw every token.
    assert lay_out(rows, (0, 4), (1, 4)).allowed[1].tolist() == [2**32 - 1] * 3


def test_allowed_tokens_are_bits(rows):
    occupy(rows, 3, SamplingParams(allowed_token_ids=[0, 31, 32, 69]))
    assert lay_out(rows, (3, 4)).allowed[0].tolist() == [1 + (1 << 31), 1, 1 << 5]


def test_stop_tokens_are_suppressed_for_min_tokens(rows):
    """Three tokens of prompt and two more without a stop: at positions 3 and 4 none, at 5 all may be drawn."""
    occupy(rows, 0, stop_token_ids=[1])
    occupy(rows, 1, SamplingParams(min_tokens=2), stop_token_ids=[5, 2])
    for position, expected in ((3, True), (4, True), (5, False)):
        suppressed = [(1, 2, -np.inf, -1), (1, 5, -np.inf, -1)] if expected else []
        assert real_edits(lay_out(rows, (0, position), (1, position))) == suppressed


def test_biases_and_bad_words_of_one_token(rows):
    occupy(rows, 0, SamplingParams(logit_bias={6: 2.5, 9: -100}), bad_words=((4,),))
    inputs = lay_out(rows, (0, 3), (0, 4))
    expected = [(6, 2.5, -1), (9, -100.0, -1), (4, -np.inf, -1)]
    assert real_edits(inputs) == [(0, *edit) for edit in expected] + [(1, *edit) for edit in expected]
    assert len(edits(inputs)) == 16
    assert edits(inputs)[6:] == [NO_SAMPLE] * 10


def test_many_edits_are_padded_to_a_power_of_two(rows):
    occupy(rows, 0, SamplingParams(logit_bias=dict.fromkeys(range(17), 1.0)))
    assert len(edits(lay_out(rows, (0, 3)))) == 32


def test_ends_of_bad_words(rows):
    """After all but the last two of a word's tokens; the device looks whether the last but one is there."""
    occupy(rows, 0, SamplingParams(bad_words="x"), bad_words=((7, 8), (5, 6, 9)))
    assert real_edits(lay_out(rows, (0, 3))) == []  # nothing generated yet, whatever the prompt ends with
    after_7 = (0, 8, -np.inf, 7)
    assert real_edits(lay_out(rows, (0, 4))) == [after_7]  # one token generated, not known here
    rows.record(100, 0, 5)
    assert real_edits(lay_out(rows, (0, 4))) == [after_7]  # the same when it is
    assert real_edits(lay_out(rows, (0, 5))) == [after_7, (0, 9, -np.inf, 6)]  # 5, and one unknown
    rows.record(100, 0, 6)
    rows.record(99, 0, 7)  # what the row's last occupant still brings
    assert real_edits(lay_out(rows, (0, 5))) == [after_7, (0, 9, -np.inf, 6)]
    assert real_edits(lay_out(rows, (0, 6))) == [after_7]  # 5, 6, and one unknown


def test_bad_words_of_a_row_that_comes_back(rows):
    occupy(rows, 0, SamplingParams(bad_words="x"), token_ids=(1, 2, 3, 4, 5), bad_words=((5, 6, 9),))
    assert real_edits(lay_out(rows, (0, 6))) == [(0, 9, -np.inf, 6)]


@pytest.mark.parametrize(("seed", "words"), [(-1, [2**32 - 1, 2**32 - 1]), (-(2**63), [2**31, 0]), (2**64 + 3, [0, 3])])
def test_any_seed_is_taken_modulo_64_bits(rows, seed, words):
    occupy(rows, 0, seed=seed)
    assert lay_out(rows, (0, 3)).seed[0].tolist() == words


def test_numbers_that_are_no_int32(rows):
    occupy(rows, 0, SamplingParams(top_k=2**40, min_tokens=2**40, max_tokens=2**40), stop_token_ids=[3])
    inputs = lay_out(rows, (0, 3))
    assert inputs.top_k[0] == 2**31 - 1
    assert real_edits(inputs) == [(0, 3, -np.inf, -1)]


def test_a_beam_wants_as_many_candidates_as_could_all_end(rows):
    """Padded to a power of two where that is more than a sample may ask for."""
    occupy(rows, 0, BeamSearchParams(beam_width=11), stop_token_ids=[4, 5])
    occupy(rows, 1, BeamSearchParams(beam_width=11))
    assert rows._rows["num_logprobs"][:2].tolist() == [33, 22]
    assert (shape_of(rows, (0, 3)).num_logprobs, shape_of(rows, (1, 3)).num_logprobs) == (64, 32)
    assert lay_out(rows, (0, 3)).temperature[0] == 0
    assert edits(lay_out(rows, (0, 3))) == []

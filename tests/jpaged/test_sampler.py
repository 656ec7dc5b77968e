"""Draws and cuts against a sort in float64 and against the exact distribution."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jpaged.sampler import (
    IN_PROMPT,
    LogitEdits,
    Penalties,
    SamplingBatch,
    _cut,
    _invert,
    allow,
    edit,
    logprobs_of,
    penalize,
    sample,
    sampling_keys,
    top_logprobs,
)
from jpaged.sampling_params import MAX_LOGPROBS

VOCAB = 600  # more than two of the sampler's tiles, and no multiple of one
DRAWS = 4096

draw = jax.jit(sample)
cut = jax.jit(_cut)


def keys_of(rows, seed=0, index=0):
    """Keys as the engine makes them, one a position."""
    full = partial(jnp.full, rows, dtype=jnp.int32)
    seeds = jnp.tile(jnp.array([[seed >> 32, seed & 0xFFFFFFFF]], jnp.uint32), (rows, 1))
    return sampling_keys(seeds, full(index), jnp.arange(rows, dtype=jnp.int32))


def batch_of(rows, *, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0, min_p: Any = 0.0, keys=None):
    """A number, or one a row, of each parameter."""

    def column(value, dtype):
        return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (rows,)))

    return SamplingBatch(
        column(temperature, np.float32),
        column(top_k, np.int32),
        column(top_p, np.float32),
        column(min_p, np.float32),
        keys_of(rows) if keys is None else keys,
    )


def kept_by_sorting(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Which tokens are left, and whether a rounding error decides about one."""
    probs = scipy.special.softmax(np.asarray(logits, np.float64))
    kept = probs > 0
    if top_k > 0:
        kept &= probs >= np.sort(probs)[::-1][min(top_k, len(probs)) - 1]
    is_close = False
    if top_p < 1:
        best_first = np.sort(probs[kept])[::-1]
        mass = np.cumsum(best_first) / best_first.sum()
        last = int(np.argmax(mass >= top_p))
        is_close |= np.abs(mass - top_p).min() < 1e-5
        kept &= probs >= best_first[last]
    if min_p > 0:
        is_close |= np.abs(probs / probs.max() - min_p).min() < 1e-5 and min_p < 1
        kept &= probs >= min_p * probs.max()
    return kept, is_close


def distribution(logits, *, temperature=1.0, **cuts):
    scaled = np.asarray(logits, np.float64) / temperature
    return scipy.special.softmax(np.where(kept_by_sorting(scaled, **cuts)[0], scaled, -np.inf))


def chi_square(tokens, probs):
    """The statistic of drawn tokens and its degrees of freedom; what is expected fewer than five times is one bin."""
    expected, observed = probs * len(tokens), np.bincount(tokens, minlength=len(probs))
    is_rare = expected < 5
    expected = np.append(expected[~is_rare], expected[is_rare].sum())
    observed = np.append(observed[~is_rare], observed[is_rare].sum())
    assert observed[expected == 0].sum() == 0
    observed, expected = observed[expected > 0], expected[expected > 0]
    return ((observed - expected) ** 2 / expected).sum(), len(expected) - 1


def logits_with_a_head(seed=0):
    """A dozen likely tokens all over the vocabulary and a long tail of unlikely ones."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=VOCAB) - 2.0
    logits[rng.choice(VOCAB, 12, replace=False)] += 5.0
    return logits.astype(np.float32)


# Greedy.


def test_temperature_zero_is_the_likeliest_token_and_the_first_of_equals():
    logits = np.random.default_rng(0).normal(size=(4, VOCAB)).astype(np.float32)
    logits[0, 411] = logits[0, 57] = 9.0
    logits[1, VOCAB - 1] = 9.0
    logits[2] = -np.inf
    logits[2, 300] = -5.0
    logits[3] = 1.0
    # The cuts do not matter, nor does a neighbour that draws.
    greedy = draw(jnp.asarray(logits), batch_of(4, temperature=0.0, top_k=3, top_p=0.5, min_p=0.1))
    assert greedy.dtype == jnp.int32
    assert greedy.tolist() == [57, VOCAB - 1, 300, 0]
    assert draw(jnp.asarray(logits), batch_of(4, temperature=[0.0, 0.0, 0.0, 2.0])).tolist()[:3] == [57, VOCAB - 1, 300]


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37, 1e-45])
def test_the_smallest_temperatures_are_greedy(temperature):
    logits = np.random.default_rng(1).normal(size=(4, VOCAB)).astype(np.float32) * 20
    logits[:, 123] = 200.0
    logits[1] = -logits[1] * 10
    tokens = draw(jnp.asarray(logits), batch_of(4, temperature=temperature))
    assert tokens.tolist() == logits.argmax(-1).tolist()


# Cuts.

CUTS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": VOCAB - 1},
    {"top_k": VOCAB},
    {"top_k": 10 * VOCAB},
    {"top_k": -1, "top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.3},
    {"top_p": 0.999},
    {"min_p": 1e-4},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 9, "top_p": 0.7},
    {"top_k": 9, "min_p": 0.3},
    {"top_p": 0.95, "min_p": 0.01},
    {"top_k": 200, "top_p": 0.99, "min_p": 0.001},
]


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0, 30.0])
def test_cuts_of_random_logits_are_a_sorts(spread):
    """One row a combination, so that each row's cut is its own."""
    rng = np.random.default_rng(int(spread * 100))
    num_compared = 0
    for _ in range(3):
        logits = (rng.normal(size=(len(CUTS), VOCAB)) * spread).astype(np.float32)
        columns = {name: [asked.get(name, off) for asked in CUTS] for name, off in OFF.items()}
        left = np.asarray(cut(jnp.asarray(logits), batch_of(len(CUTS), **columns)))
        for row, asked in enumerate(CUTS):
            expected, is_close = kept_by_sorting(logits[row], **asked)
            # In float32 what is 1e-38 times as likely as all the rest together may be zero.
            matters = scipy.special.log_softmax(logits[row].astype(np.float64)) > -85
            np.testing.assert_array_equal(left[row][left[row] > -np.inf], logits[row][left[row] > -np.inf])
            if not is_close:
                num_compared += 1
                np.testing.assert_array_equal((left[row] > -np.inf)[matters], expected[matters], err_msg=str(asked))
    assert num_compared > 2 * len(CUTS)


OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def adversarial():
    equal = np.zeros(VOCAB, np.float32)
    one_hot = np.full(VOCAB, -np.inf, np.float32)
    one_hot[411] = 3.0
    half_gone = np.where(np.arange(VOCAB) % 2, -np.inf, np.linspace(0, 8, VOCAB)).astype(np.float32)
    # Groups of ten equal ones, each half as likely as the one before.
    steps = -(np.arange(VOCAB) // 10 * np.log(2)).astype(np.float32)
    huge = steps + np.float32(1e4)
    return {"equal": equal, "one_hot": one_hot, "half_gone": half_gone, "steps": steps[::-1].copy(), "huge": huge}


@pytest.mark.parametrize("name", adversarial())
def test_cuts_of_awkward_logits_are_a_sorts(name):
    logits = np.tile(adversarial()[name], (len(CUTS), 1))
    if name == "steps":  # in any order
        logits = np.random.default_rng(0).permuted(logits, axis=1)
    columns = {key: [asked.get(key, off) for asked in CUTS] for key, off in OFF.items()}
    left = np.asarray(cut(jnp.asarray(logits), batch_of(len(CUTS), **columns)))
    for row, asked in enumerate(CUTS):
        expected, is_close = kept_by_sorting(logits[row], **asked)
        matters = scipy.special.log_softmax(logits[row].astype(np.float64)) > -85
        if not is_close:
            np.testing.assert_array_equal((left[row] > -np.inf)[matters], expected[matters], err_msg=str(asked))


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"top_k": 1}, [3]),
        ({"top_k": 2}, [1, 3, 4]),  # a tie with the last one kept
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 4}, [0, 1, 3, 4]),
        ({"top_p": 0.35}, [3]),
        ({"top_p": 0.45}, [1, 3, 4]),
        ({"top_p": 0.85}, [0, 1, 3, 4]),
        ({"top_p": 0.99}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.55}, [3]),
        ({"min_p": 0.45}, [1, 3, 4]),
        # 0.4 of the 0.8 that top_k leaves is half of it.
        ({"top_k": 3, "top_p": 0.45}, [3]),
        ({"top_k": 3, "top_p": 0.55}, [1, 3, 4]),
        # min_p is of the likeliest, whatever was cut before.
        ({"top_k": 4, "min_p": 0.3}, [0, 1, 3, 4]),
        ({"top_k": 4, "min_p": 0.45}, [1, 3, 4]),
    ],
)
def test_cuts_worked_out_by_hand(asked, kept):
    probs = np.full(VOCAB, 0.0)
    probs[:5] = 0.15, 0.2, 0.05, 0.4, 0.2
    with np.errstate(divide="ignore"):
        logits = np.tile(np.log(probs).astype(np.float32), (len(CUTS), 1))
    left = np.asarray(cut(jnp.asarray(logits), batch_of(len(CUTS), **asked)))
    assert np.flatnonzero(left[0] > -np.inf).tolist() == kept


def test_nothing_asked_keeps_the_whole_tail():
    """Next to rows with cuts, and where the tail's mass vanishes in a float32 sum."""
    logits = np.tile(np.linspace(0, -60, VOCAB, dtype=np.float32), (len(CUTS), 1))
    top_p = [1.0] + [0.5] * (len(CUTS) - 1)
    left = np.asarray(cut(jnp.asarray(logits), batch_of(len(CUTS), top_p=top_p)))
    np.testing.assert_array_equal(left[0], logits[0])
    assert (left[1] > -np.inf).sum() < 10


@pytest.mark.parametrize("top_p", [1e-12, 1e-38, 1e-45, 1e-300])
def test_the_smallest_top_p_keeps_the_likeliest_token(top_p):
    logits = np.tile(logits_with_a_head(), (len(CUTS), 1))
    left = np.asarray(cut(jnp.asarray(logits), batch_of(len(CUTS), top_p=top_p)))
    assert np.flatnonzero(left[0] > -np.inf).tolist() == [logits[0].argmax()]


# Draws.


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 20},
        {"top_p": 0.6},
        {"min_p": 0.05},
        {"temperature": 1.5, "top_k": 100, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_frequencies_are_the_distribution(asked):
    logits = logits_with_a_head()
    tokens = np.asarray(draw(jnp.tile(logits[None], (DRAWS, 1)), batch_of(DRAWS, **asked)))
    probs = distribution(logits, **asked)
    assert probs[tokens].all(), "a token was drawn that had been cut"
    # The keys are fixed; a right sampler would exceed the bound with one set of keys in a million.
    statistic, freedom = chi_square(tokens, probs)
    assert statistic < scipy.stats.chi2.isf(1e-6, freedom)
    # The bound tells distributions apart: of a temperature a quarter higher it would not hold.
    others = distribution(logits, **(asked | {"temperature": asked.get("temperature", 1.0) * 1.25}))
    statistic, freedom = chi_square(tokens[others[tokens] > 0], others)
    assert statistic > scipy.stats.chi2.isf(1e-6, freedom)


def test_two_samples_of_a_request_are_independent():
    """Pairs of tokens are as frequent as the product of their probabilities: for indices, positions and seeds."""
    logits = np.log(np.array([0.5, 0.3, 0.2] + [0.0] * (VOCAB - 3)) + 1e-30).astype(np.float32)
    rows = jnp.tile(logits[None], (DRAWS, 1))
    first = np.asarray(draw(rows, batch_of(DRAWS)))
    pairs = np.outer([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]).ravel()
    for keys in (keys_of(DRAWS, index=1), keys_of(DRAWS, seed=1), keys_of(DRAWS, seed=1 << 32)):
        second = np.asarray(draw(rows, batch_of(DRAWS, keys=keys)))
        statistic, freedom = chi_square(first * 3 + second, pairs)
        assert statistic < scipy.stats.chi2.isf(1e-6, freedom)
    next_position = np.roll(first, -1)
    statistic, freedom = chi_square(first * 3 + next_position, pairs)
    assert statistic < scipy.stats.chi2.isf(1e-6, freedom)


def test_tokens_of_probability_zero_are_never_drawn():
    """Each row has one token in a hundred left, the first and last of a tile among them."""
    logits = np.random.default_rng(3).normal(size=(DRAWS, VOCAB)).astype(np.float32)
    logits[np.random.default_rng(4).random((DRAWS, VOCAB)) < 0.99] = -np.inf
    logits[:, 255:257] = -3.0
    tokens = np.asarray(draw(jnp.asarray(logits), batch_of(DRAWS)))
    assert (logits[np.arange(DRAWS), tokens] > -np.inf).all()
    assert len(set(tokens.tolist())) > VOCAB // 2


def test_inverting_a_distribution_never_lands_on_a_weight_of_zero():
    """At every edge between two weights, where rounding could: sums of parallel prefixes do not ascend strictly."""
    rng = np.random.default_rng(0)
    weights = np.exp(3 * rng.normal(size=(512, 501))).astype(np.float32)  # the tiles of 128256 tokens
    weights[rng.random(weights.shape) < 0.7] = 0
    sums = np.asarray(jax.jit(partial(jnp.cumsum, axis=-1))(weights))
    invert = jax.jit(_invert)
    for column in range(0, 501, 5):
        index, left = invert(jnp.asarray(weights), jnp.asarray(sums[:, column]))
        assert (weights[np.arange(512), np.asarray(index)] > 0).all()
        assert (np.asarray(left) >= 0).all()


def test_a_rows_token_is_its_own_whatever_the_others_are():
    """At another place, among others' logits, parameters and number."""
    rng = np.random.default_rng(5)
    mine = (rng.normal(size=(8, VOCAB)) * 2).astype(np.float32)
    keys = keys_of(8, seed=77)
    asked = {"temperature": [0.7] * 4 + [1.0] * 4, "top_k": [0, 0, 5, 50] * 2, "top_p": [1.0, 0.8] * 4, "min_p": 0.0}
    tokens = np.asarray(draw(jnp.asarray(mine), batch_of(8, **asked, keys=keys)))
    places = rng.permutation(len(CUTS))[:8]
    logits = (rng.normal(size=(len(CUTS), VOCAB)) * 2).astype(np.float32)
    logits[places] = mine
    crowd = {name: np.full(len(CUTS), value) for name, value in {"temperature": 1.3, "top_k": 3, "top_p": 0.5}.items()}
    for name in crowd:
        crowd[name][places] = asked[name]
    all_keys = np.asarray(keys_of(len(CUTS), seed=8)).copy()
    all_keys[places] = keys
    crowded = draw(jnp.asarray(logits), batch_of(len(CUTS), **crowd, keys=jnp.asarray(all_keys)))
    np.testing.assert_array_equal(np.asarray(crowded)[places], tokens)


def test_equal_keys_give_equal_tokens_and_others_do_not():
    logits = jnp.zeros((DRAWS, VOCAB))
    tokens = draw(logits, batch_of(DRAWS))
    np.testing.assert_array_equal(tokens, draw(logits, batch_of(DRAWS)))
    assert (np.asarray(tokens) != np.asarray(draw(logits, batch_of(DRAWS, keys=keys_of(DRAWS, seed=1))))).mean() > 0.9
    same = draw(logits, batch_of(DRAWS, keys=jnp.tile(keys_of(1), (DRAWS, 1))))
    assert len(set(same.tolist())) == 1


def test_a_key_depends_on_every_bit_of_seed_index_and_position():
    zero = (0, 0, 0, 0)
    words = [zero]
    for word, bits in enumerate((32, 32, 31, 31)):
        words += [tuple(1 << bit if place == word else 0 for place in range(4)) for bit in range(bits)]
    # The same sum of index and position, and the two exchanged.
    words += [(1, 2, 3, 4), (1, 2, 4, 3), (2, 1, 3, 4), (1, 2, 2, 5), (1, 2, 5, 2)]
    table = np.array(words, np.uint32)
    index, position = (jnp.asarray(table[:, column].astype(np.int32)) for column in (2, 3))
    keys = sampling_keys(jnp.asarray(table[:, :2]), index, position)
    assert keys.dtype == jnp.uint32
    assert len({tuple(key) for key in keys.tolist()}) == len(words)
    # A row's key is its own: alone it is the same.
    np.testing.assert_array_equal(
        sampling_keys(jnp.asarray(table[40:41, :2]), index[40:41], position[40:41])[0], keys[40]
    )


# Log-probabilities.


def test_logprobs_are_log_softmax():
    rng = np.random.default_rng(6)
    logits = (rng.normal(size=(8, VOCAB)) * 10).astype(np.float32)
    logits[1] += 1e4
    logits[2] -= 1e4
    logits[3, ::2] = -np.inf
    token_ids = rng.integers(0, VOCAB // 2, 8) * 2 + 1
    token_ids[4] = logits[4].argmax()
    expected = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)[np.arange(8), token_ids]
    chosen = logprobs_of(jnp.asarray(logits), jnp.asarray(token_ids, jnp.int32))
    # The float32 logits of rows 1 and 2 are a thousandth apart, and so may the sum of two be.
    is_large = np.isin(np.arange(8), (1, 2))
    np.testing.assert_allclose(chosen[~is_large], expected[~is_large], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(chosen[is_large], expected[is_large], atol=2e-3)
    assert logprobs_of(jnp.asarray(logits), jnp.zeros(8, jnp.int32))[3] == -np.inf


def test_the_likeliest_tokens_come_best_first():
    rng = np.random.default_rng(7)
    logits = np.stack([rng.permutation(VOCAB) * 0.01 for _ in range(4)]).astype(np.float32)
    token_ids, logprobs = top_logprobs(jnp.asarray(logits), MAX_LOGPROBS)
    expected = np.argsort(-logits, axis=-1)[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(token_ids, expected)
    all_logprobs = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(logprobs, np.take_along_axis(all_logprobs, expected, -1), atol=1e-5)


def test_a_small_vocabulary_is_ranked_whole():
    token_ids, logprobs = top_logprobs(jnp.log(jnp.array([[0.2, 0.5, 0.3]])), MAX_LOGPROBS)
    assert token_ids.tolist() == [[1, 2, 0]]
    np.testing.assert_allclose(jnp.exp(logprobs), [[0.5, 0.3, 0.2]], rtol=1e-6)


# What is changed before the draw.


def test_only_allowed_tokens_are_left():
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(3, VOCAB)).astype(np.float32)
    allowed = np.zeros((3, -(-VOCAB // 32) * 32), np.uint8)
    allowed[0, [0, 31, 32, VOCAB - 1]] = 1
    allowed[1] = 1
    words = jnp.asarray(np.packbits(allowed, axis=1, bitorder="little").view("<u4"))
    left = np.asarray(jax.jit(allow)(jnp.asarray(logits), words))
    np.testing.assert_array_equal(left, np.where(allowed[:, :VOCAB] == 1, logits, -np.inf))


def edits_of(*edits, pad_to=8):
    rows = [*edits, *[(3, 0, 9.0, -1)] * (pad_to - len(edits))]  # there is no sample 3
    sample, token_id, value, after = zip(*rows, strict=True)
    return LogitEdits(
        jnp.array(sample, jnp.int32), jnp.array(token_id, jnp.int32), jnp.array(value), jnp.array(after, jnp.int32)
    )


def test_edits_are_added_where_they_apply():
    logits = np.zeros((3, VOCAB), np.float32)
    logits[1, 7] = 2.0
    edits = edits_of((1, 7, 1.5, -1), (1, 7, -4.0, -1), (0, 5, -np.inf, 11), (2, 5, -np.inf, 11), (2, 0, 3.0, -1))
    expected = logits.copy()
    expected[1, 7] = -0.5
    expected[0, 5] = -np.inf  # its sample follows token 11, and sample 2 does not
    expected[2, 0] = 3.0
    previous = jnp.array([11, 11, 12], jnp.int32)
    np.testing.assert_array_equal(jax.jit(edit)(jnp.asarray(logits), edits, previous), expected)
    np.testing.assert_array_equal(jax.jit(edit)(jnp.asarray(logits), edits_of(), previous), logits)


def test_penalties_by_their_formulas():
    """OpenAI's for presence and frequency, CTRL's for repetition; the prompt counts for the last alone."""
    logits = np.array([[1.0, -1.0, 2.0, -2.0, 0.5, 0.0]] * 2, np.float32)
    times = np.array([[0, 0, 1, 3, 0, 2]] * 2)
    in_prompt = np.array([[1, 1, 0, 1, 0, 0]] * 2, bool)
    presence, frequency, repetition = np.array([0.5, -2.0]), np.array([0.25, 0.0]), np.array([2.0, 1.0])
    said = times + np.where(in_prompt, IN_PROMPT, 0)
    arrays = [jnp.asarray(array, jnp.float32) for array in (presence, frequency, repetition)]
    found = jax.jit(penalize)(jnp.asarray(logits), Penalties(jnp.asarray(said, jnp.int32), *arrays))
    # Row 0 by hand: 1/2; -1*2; 2/2 - 0.25 - 0.5; -2*2 - 3*0.25 - 0.5; as it was; 0 - 2*0.25 - 0.5.
    np.testing.assert_allclose(found[0], [0.5, -2.0, 0.25, -5.25, 0.5, -1.0])
    np.testing.assert_allclose(found[1], [1.0, -1.0, 4.0, 0.0, 0.5, 2.0])

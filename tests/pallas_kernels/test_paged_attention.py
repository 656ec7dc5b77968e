"""Attention through block tables against a loop over tokens in float64, in a cache full of NaN (`paged_oracle`)."""

import itertools
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from paged_oracle import LAYER, Step, assert_sequences_exact

from pallas_kernels import KVCache, PagedBatch, paged_attention, write_kv


@pytest.fixture
def no_annotation_checks() -> Iterator[None]:
    """Lets wrong shapes through to the function's own checks, which is what a user without this suite meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@partial(jax.jit, static_argnames=("scale", "logits_soft_cap", "local_window_size", "implementation"))
def run(query, cache, batch, key, value, layer=LAYER, **options):
    cache = write_kv(cache, batch, layer, key, value)
    return paged_attention(query, cache, batch, layer, **options)


def assert_as_exact(step, *, left=None, **options):
    """The rule, for both implementations."""
    query, *rest = step.arguments()
    window = {} if left is None else {"local_window_size": (left, 0)}
    for implementation in ("xla", "reference"):
        out = run(query, *rest, **window, **options, implementation=implementation)
        assert (out.shape, out.dtype) == (query.shape, query.dtype)
        assert_sequences_exact(step, out, left=left, name=implementation, **options)


# Contexts of one tile (128 tokens) exactly, one less and one more; decodes before chunks before whole prompts.
MIXES = {
    "mixed": [(1, 5), (1, 300), (1, 129), (7, 7), (70, 200), (20, 130)],
    "prefills": [(64, 64), (65, 193), (2, 2)],
    "decodes": [(1, context) for context in (128, 127, 129, 1, 256, 257)],
    "nothing": [],
}


@pytest.mark.parametrize("block_size", [1, 16, 32, 128, 256])
def test_any_mix_is_the_formula(block_size):
    for seed, sequences in enumerate(MIXES.values()):
        assert_as_exact(Step(sequences, block_size=block_size, seed=seed, H=16))


def test_one_new_token_may_also_be_a_prefill():
    """Whatever stands past `num_decodes`."""
    sequences = [(1, 40), (1, 1), (1, 129), (9, 9), (1, 17)]
    for num_decodes in (0, 2):
        assert_as_exact(Step(sequences, num_decodes=num_decodes, H=16))


@pytest.mark.parametrize(("N", "K"), [(4, 4), (6, 2), (4, 1)])
def test_heads_share_their_kv_head(N, K):
    assert_as_exact(Step(MIXES["mixed"], N=N, K=K, H=20))


@pytest.mark.parametrize(
    "options",
    [
        {"left": 0},
        {"left": 20},
        {"left": 128, "logits_soft_cap": 2.0},
        {"logits_soft_cap": 15.0, "scale": 0.5},
    ],
)
def test_windows_caps_and_scales_are_the_formula(options):
    for name in ("mixed", "decodes"):
        assert_as_exact(Step(MIXES[name], H=16), **options)


def test_bfloat16_is_as_good_as_the_plain_formula_in_it():
    for name in ("mixed", "decodes"):
        assert_as_exact(Step(MIXES[name], dtype=ml_dtypes.bfloat16))


def test_a_window_of_one_number_and_its_right_half_change_nothing():
    """To the right there is nothing to see."""
    arguments = Step(MIXES["mixed"], H=16).arguments()
    expected = run(*arguments, local_window_size=(20, 0), implementation="xla")
    for window in (20, (20, 7)):
        np.testing.assert_array_equal(run(*arguments, local_window_size=window, implementation="xla"), expected)


# Decodes of many sequences: more tiles than the 8 of one turn, sequences that begin and end within a turn.
CONTEXTS = [1, 700, 128, 129, 2, 127, 256, 1024, 3, 257, 255, 64, 1, 1, 900, 16, 17, 15, 384, 385]


def decodes(block_size=16, **changes):
    shape = {"rows": 24, "tokens": 24, "max_context": 1024, "H": 16, "max_query_len": 1}
    return Step([(1, context) for context in CONTEXTS], block_size=block_size, **shape | changes)


@pytest.mark.parametrize("options", [{}, {"left": 130, "logits_soft_cap": 5.0}])
@pytest.mark.parametrize("block_size", [16, 256])
def test_many_decodes_are_the_formula(block_size, options):
    assert_as_exact(decodes(block_size), **options)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_decodes_bits_do_not_depend_on_the_batch(dtype):
    """In another order, among fewer, and alone, at the same shape and at smaller ones.

    (Below eight rows a turn takes fewer tiles, and a matmul over them may round otherwise.)
    """
    step = decodes(dtype=dtype)
    together = np.asarray(run(*step.arguments()))
    order = np.random.default_rng(0).permutation(len(CONTEXTS))
    shuffled = np.asarray(run(*step.arguments(order)))
    np.testing.assert_array_equal(shuffled[: len(order)], together[order])
    few = np.asarray(run(*step.arguments(order[:5])))
    np.testing.assert_array_equal(few[:5], together[order[:5]])
    for rows in (24, 8):
        for i in range(len(CONTEXTS)):
            alone = np.asarray(run(*step.arguments([i], rows=rows, tokens=rows)))
            np.testing.assert_array_equal(alone[0], together[i], err_msg=f"context {CONTEXTS[i]}")
    pair = np.asarray(run(*step.arguments([7, 1], rows=8, tokens=8)))
    np.testing.assert_array_equal(pair[:2], together[[7, 1]])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_prefills_bits_do_not_depend_on_the_batch(dtype):
    """In another order, alone, alone in a batch of another shape, and beside decodes."""
    step = Step([(1, 300), (1, 17), (7, 7), (70, 200), (20, 130)], H=16, dtype=dtype)
    together = np.asarray(run(*step.arguments()))
    starts = np.cumsum([0, *(new for new, _ in step.sequences)])
    mine = [together[start:end] for start, end in itertools.pairwise(starts)]
    shuffled = np.asarray(run(*step.arguments([1, 4, 2, 3])))
    np.testing.assert_array_equal(shuffled[:98], np.concatenate([mine[i] for i in (1, 4, 2, 3)]))
    for i in (2, 3, 4):
        alone = np.asarray(run(*step.arguments([i])))
        np.testing.assert_array_equal(alone[: len(mine[i])], mine[i])
    smaller = np.asarray(run(*step.arguments([3], rows=1, tokens=70)))
    np.testing.assert_array_equal(smaller, mine[3])


def test_the_same_input_gives_the_same_bits():
    arguments = Step(MIXES["mixed"], H=16).arguments()
    np.testing.assert_array_equal(run(*arguments), run(*arguments))


def test_chunks_of_a_prompt_give_what_the_whole_gives():
    """Each chunk's keys are written and then attended to, with those of the chunks before."""
    whole = Step([(90, 90)], H=16)
    expected = np.asarray(run(*whole.arguments()))[:90]
    query, cache, batch, key, value = whole.arguments()
    done = 0
    for new in (16, 1, 40, 33):
        here = slice(done, done + new)
        pad = [(0, 160 - new), (0, 0), (0, 0)]
        chunk = PagedBatch(
            block_tables=batch.block_tables,
            context_lens=batch.context_lens.at[0].set(done + new),
            query_starts=batch.query_starts.at[1:].set(new),
            slot_mapping=jnp.pad(batch.slot_mapping[here], (0, 160 - new), constant_values=-1),
            num_decodes=jnp.int32(new == 1),
            max_query_len=128,
        )
        cache = jax.jit(write_kv)(cache, chunk, LAYER, *(jnp.pad(array[here], pad) for array in (key, value)))
        out = jax.jit(paged_attention)(jnp.pad(query[here], pad), cache, chunk, LAYER)
        np.testing.assert_allclose(out[:new], expected[here], rtol=1e-4, atol=1e-5)
        done += new


def test_the_layer_may_be_traced():
    """One scan over the layers, the cache carried, is the layers one after the other."""
    step = Step(MIXES["mixed"], H=16)
    query, cache, batch, key, value = step.arguments()
    cache = jax.tree.map(lambda pages: jnp.stack([pages[LAYER], 2 * pages[LAYER]]), cache)

    @jax.jit
    def scanned(cache):
        def body(cache, layer):
            cache = write_kv(cache, batch, layer, key, value)
            return cache, paged_attention(query, cache, batch, layer)

        return jax.lax.scan(body, cache, jnp.arange(2))[1]

    both = scanned(cache)
    for layer in range(2):
        expected = run(query, cache, batch, key, value, layer)
        np.testing.assert_allclose(both[layer], expected, rtol=1e-5, atol=1e-6)
    assert np.abs(both[0] - both[1]).max() > 0.1


@pytest.mark.usefixtures("no_annotation_checks")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"query": jnp.zeros((3, 4, 8))},
            "query must be [tokens, q_heads, head_dim] = (2, q_heads, 8), got (3, 4, 8)",
        ),
        (
            {"query": jnp.zeros((2, 4, 9))},
            "query must be [tokens, q_heads, head_dim] = (2, q_heads, 8), got (2, 4, 9)",
        ),
        ({"query": jnp.zeros((2, 32))}, "query must be [tokens, q_heads, head_dim] = (2, q_heads, 8), got (2, 32)"),
        ({"query": jnp.zeros((2, 3, 8))}, "query heads must be a multiple of the cache's 2 kv heads, got 3"),
        ({"query": jnp.zeros((2, 4, 8), jnp.bfloat16)}, "query must have the cache's dtype float32, got bfloat16"),
        ({"layer": 2}, "layer must be in [0, 2), got 2"),
        ({"layer": -1}, "layer must be in [0, 2), got -1"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap must be positive or None, got 0.0"),
        ({"logits_soft_cap": -3.0}, "logits_soft_cap must be positive or None, got -3.0"),
        ({"local_window_size": -1}, "neither of them negative, got -1"),
        ({"local_window_size": (4, -1)}, "neither of them negative, got (4, -1)"),
        ({"implementation": "cuda"}, "implementation must be 'mosaic', 'xla', 'reference' or None, got 'cuda'"),
    ],
)
def test_bad_arguments_are_named_with_expected_and_actual(change, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        attend_to_small_batch(**change)


@pytest.mark.usefixtures("no_annotation_checks")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("context_lens", (3,)),
        ("query_starts", (2,)),
        ("block_tables", (3, 4)),
        ("block_tables", (2,)),
        ("shared_prefix_lens", (1,)),
    ],
)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_batch_whose_parts_do_not_fit_is_refused(name, shape, implementation):
    with pytest.raises(ValueError, match=f"{name}.*got {re.escape(str(shape))}"):
        attend_to_small_batch(implementation=implementation, **{name: jnp.zeros(shape, jnp.int32)})


def attend_to_small_batch(**changes):
    cache = KVCache.create(num_layers=2, num_blocks=4, block_size=4, num_kv_heads=2, head_dim=8)
    batch: dict[str, Any] = {
        "block_tables": jnp.zeros((2, 4), jnp.int32),
        "context_lens": jnp.array([1, 1], jnp.int32),
        "query_starts": jnp.array([0, 1, 2], jnp.int32),
        "slot_mapping": jnp.array([0, 4], jnp.int32),
        "num_decodes": jnp.int32(2),
        "max_query_len": 1,
        "shared_prefix_lens": None,
    }
    batch |= {name: changes.pop(name) for name in list(changes) if name in batch}
    arguments: dict[str, Any] = {"query": jnp.zeros((2, 4, 8)), "layer": 0} | changes
    return paged_attention(cache=cache, batch=PagedBatch(**batch), **arguments)

"""paged_attention's Hopper kernels on the card, in a cache full of NaN, against the formula in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from paged_oracle import LAYER, Step, assert_sequences_exact

from pallas_kernels import KVCache, PagedBatch, paged_attention, write_kv

pytestmark = pytest.mark.gpu

CONTEXTS = [1, 700, 128, 129, 2, 127, 256, 1024, 3, 257, 255, 64, 65, 63, 900, 16, 17, 15, 384, 2000]


def decodes(contexts=CONTEXTS, **changes):
    shape = {"rows": 24, "tokens": 24, "max_context": 2048, "max_query_len": 1, "dtype": ml_dtypes.bfloat16, "H": 128}
    return Step([(1, context) for context in contexts], **shape | changes)


@partial(jax.jit, static_argnames=("logits_soft_cap", "local_window_size"))
def run(query, cache, batch, key, value, layer=LAYER, **options):
    cache = write_kv(cache, batch, layer, key, value)
    return paged_attention(query, cache, batch, layer, **options, implementation="mosaic")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"block_size": 8}, {}),
        ({"block_size": 32, "N": 32, "K": 4}, {}),
        ({"block_size": 64, "N": 8, "K": 8, "H": 64}, {}),
        ({"block_size": 128, "N": 16, "K": 1, "H": 64}, {}),
        ({"block_size": 256, "N": 8, "K": 2, "H": 256}, {}),
        ({"N": 9, "K": 3, "H": 64}, {"logits_soft_cap": 5.0}),
        ({"N": 6, "K": 2, "H": 80}, {"left": 300}),
        ({"N": 8, "K": 2}, {"left": 64}),
        ({"N": 32, "K": 1, "H": 192, "block_size": 32}, {"left": 0}),
        ({"N": 2, "K": 1, "H": 40}, {}),
    ],
)
def test_decodes_are_the_formula(changes, options, dtype):
    step = decodes(dtype=dtype, **changes)
    given = {name: value for name, value in options.items() if name != "left"}
    window = {"local_window_size": (options["left"], 0)} if "left" in options else {}
    assert_sequences_exact(step, run(*step.arguments(), **given, **window), **options)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"N": 32, "K": 4}, {}),
        ({"block_size": 32, "N": 9, "K": 3, "H": 64}, {"logits_soft_cap": 5.0}),
        ({"N": 12, "K": 12, "H": 64}, {}),
        ({"N": 16, "K": 1, "H": 256}, {}),
        ({"N": 8, "K": 2, "H": 80}, {"left": 300}),
    ],
)
def test_decodes_that_share_prefixes_are_the_formula(changes, options):
    """Groups of nine, one, two and two, and singles; alone, or with others of its group, each has the same bits."""
    groups = [("a", 1024)] * 9 + [("-", 0)] * 2 + [("b", 64)] + [("c", 640)] * 2 + [("d", 640)] * 2 + [("-", 0)]
    contexts = [(1, prefix + own) for (_, prefix), own in zip(groups, CONTEXTS, strict=False)]
    shape = {"rows": 24, "tokens": 24, "max_context": 2048, "max_query_len": 1, "dtype": ml_dtypes.bfloat16, "H": 128}
    step = Step(contexts, shared=groups, **shape | changes)
    given = {name: value for name, value in options.items() if name != "left"}
    window = {"local_window_size": (options["left"], 0)} if "left" in options else {}
    out = np.asarray(run(*step.arguments(), **given, **window))
    assert_sequences_exact(step, out, **options)
    for chosen in ([8, 2, 5], [7], [13, 12, 14, 11]):
        again = np.asarray(run(*step.arguments(chosen), **given, **window))
        np.testing.assert_array_equal(again[: len(chosen)], out[chosen])


MIX = [(1, 5), (1, 1300), (1, 129), (7, 7), (300, 1200), (20, 130), (193, 193), (64, 2000), (1, 64), (700, 701)]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"block_size": 8, "N": 3, "K": 3}, {}),
        ({"block_size": 32, "N": 16, "K": 2, "H": 64}, {}),
        ({"block_size": 64, "H": 256}, {}),
        ({"block_size": 128}, {"logits_soft_cap": 5.0}),
        ({"block_size": 256, "H": 64}, {"left": 300}),
        ({"H": 80}, {"left": 0}),
        ({"N": 6, "K": 2, "H": 192}, {"left": 100, "logits_soft_cap": 20.0}),
        ({"num_decodes": 1}, {}),
    ],
)
def test_any_mix_is_the_formula(changes, options, dtype):
    shape = {"rows": 16, "tokens": 1400, "max_context": 2048, "max_query_len": 1024, "dtype": dtype, "H": 128}
    step = Step(MIX, **shape | changes)
    given = {name: value for name, value in options.items() if name != "left"}
    window = {"local_window_size": (options["left"], 0)} if "left" in options else {}
    assert_sequences_exact(step, run(*step.arguments(), **given, **window), **options)


def test_a_prefills_bits_do_not_depend_on_the_batch():
    step = Step(MIX, rows=16, tokens=1400, max_context=2048, max_query_len=1024, dtype=ml_dtypes.bfloat16, H=128)
    together = np.asarray(run(*step.arguments()))
    ends = np.cumsum([new for new, _ in MIX])
    mine = [together[end - new : end] for (new, _), end in zip(MIX, ends, strict=True)]
    for chosen in ([9, 4, 3, 8], [4], [7]):
        out = np.asarray(run(*step.arguments(chosen)))
        expected = np.concatenate([mine[i] for i in chosen])
        np.testing.assert_array_equal(out[: len(expected)], expected)
    first = run(*step.arguments())
    changed = sum((run(*step.arguments()) != first).any().astype(jnp.int32) for _ in range(50))
    assert not int(changed), f"{int(changed)} of 50 runs changed"


def test_a_decodes_bits_do_not_depend_on_the_batch():
    step = decodes(N=32, K=4)
    together = np.asarray(run(*step.arguments()))
    order = np.random.default_rng(0).permutation(len(CONTEXTS))
    shuffled = np.asarray(run(*step.arguments(order)))
    np.testing.assert_array_equal(shuffled[: len(order)], together[order])
    for rows in (24, 1):
        for i in range(len(CONTEXTS)):
            alone = np.asarray(run(*step.arguments([i], rows=rows, tokens=rows)))
            np.testing.assert_array_equal(alone[0], together[i], err_msg=f"context {CONTEXTS[i]}")


@pytest.mark.parametrize(("R", "context", "N", "K"), [(64, 8192, 32, 4), (1, 65536, 32, 8), (64, 1024, 32, 32)])
def test_the_same_bits_250_times(R, context, N, K):
    """What the interpreter cannot see: a race shows as a result that changes."""
    blocks = R * context // 16
    shape = (1, blocks, 16, K, 128)
    keys, values = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(2))
    rng = np.random.default_rng(0)
    batch = PagedBatch(
        block_tables=jnp.asarray(rng.permutation(blocks).reshape(R, -1), jnp.int32),
        context_lens=jnp.asarray(rng.integers(context // 2, context + 1, R), jnp.int32),
        query_starts=jnp.arange(R + 1, dtype=jnp.int32),
        slot_mapping=jnp.full(R, -1, jnp.int32),
        num_decodes=jnp.int32(R),
        max_query_len=1,
    )
    query = jax.random.normal(jax.random.key(2), (R, N, 128), jnp.bfloat16)

    @jax.jit
    def attend(query, keys, values, batch):
        return paged_attention(query, KVCache(keys, values), batch, 0, implementation="mosaic")

    first = attend(query, keys, values, batch)
    other = paged_attention(query, KVCache(keys, values), batch, 0, implementation="xla")
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (first, other)), atol=2e-3, rtol=2e-2)
    changed = sum((attend(query, keys, values, batch) != first).any().astype(jnp.int32) for _ in range(250))
    assert not int(changed), f"{int(changed)} of 250 runs changed"


def test_none_takes_the_hopper_kernels_where_they_can_serve():
    step = decodes([5, 70])
    query, cache, batch, key, value = step.arguments()
    cache = write_kv(cache, batch, LAYER, key, value)
    chosen, asked = (paged_attention(query, cache, batch, LAYER, implementation=name) for name in (None, "mosaic"))
    np.testing.assert_array_equal(chosen, asked)
    small = decodes([5, 70], block_size=4)
    query, cache, batch, key, value = small.arguments()
    with pytest.raises(NotImplementedError, match="block sizes"):
        paged_attention(query, cache, batch, LAYER, implementation="mosaic")
    cache = write_kv(cache, batch, LAYER, key, value)
    assert_sequences_exact(small, paged_attention(query, cache, batch, LAYER))

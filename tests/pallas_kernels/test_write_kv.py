"""Writes into the cache against a loop over slots; what is not named keeps its bits."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_oracle import bits, random_cache

from pallas_kernels import KVCache, PagedBatch, paged_attention, write_kv


def writes_to(slots):
    """A batch of which only the slots matter."""
    return PagedBatch(
        block_tables=jnp.zeros((1, 1), jnp.int32),
        context_lens=jnp.zeros(1, jnp.int32),
        query_starts=jnp.zeros(2, jnp.int32),
        slot_mapping=jnp.asarray(slots, jnp.int32),
        num_decodes=jnp.int32(0),
        max_query_len=1,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_only_the_named_slots_change(block_size, dtype):
    rng = np.random.default_rng(block_size)
    shape = (2, 7, block_size, 2, 4)
    num_slots = 7 * block_size
    write = jax.jit(write_kv)
    chosen = rng.permutation(num_slots)
    for slots in (
        [*chosen[:3], -1, -1],
        [-1, *chosen[:3], -1],
        [num_slots - 1, 0, num_slots - 2, -1, 1],  # the last slot, which -1 may not be taken for
        [-1, num_slots - 2, -1, 0, -1],
        [-1] * 5,
    ):
        pages, cache = random_cache(rng, shape, dtype)
        new = [rng.standard_normal((5, 2, 4)).astype(dtype) for _ in range(2)]
        written = write(cache, writes_to(slots), 1, *(jnp.asarray(array) for array in new))
        for before, now, array in zip(pages, (written.keys, written.values), new, strict=True):
            expected = before.copy()
            for token, slot in enumerate(slots):
                if slot >= 0:
                    expected[1, slot // block_size, slot % block_size] = array[token]
            assert now.dtype == dtype
            np.testing.assert_array_equal(bits(now), bits(expected))


@pytest.mark.parametrize("is_traced", [False, True])
def test_the_layer_may_be_a_number_or_traced(is_traced):
    rng = np.random.default_rng(0)
    _, cache = random_cache(rng, (3, 5, 4, 2, 8))
    batch = writes_to([6, -1, 19])
    keys, values = (jnp.asarray(rng.standard_normal((3, 3, 2, 8)), jnp.float32) for _ in range(2))
    if is_traced:

        def body(cache, layer):
            index, key, value = layer
            return write_kv(cache, batch, index, key, value), None

        written = jax.jit(lambda cache: jax.lax.scan(body, cache, (jnp.arange(3), keys, values))[0])(cache)
    else:
        written = cache
        for layer in range(3):
            written = write_kv(written, batch, layer, keys[layer], values[layer])
    for before, now, new in ((cache.keys, written.keys, keys), (cache.values, written.values, values)):
        expected = np.asarray(before).copy()
        expected[:, 1, 2], expected[:, 4, 3] = new[:, 0], new[:, 2]
        np.testing.assert_array_equal(bits(now), bits(expected))


@pytest.mark.usefixtures("no_annotation_checks")  # lowering puts descriptions of arguments in their places
@pytest.mark.parametrize("is_scanned", [False, True])
def test_a_donated_cache_is_written_in_place(is_scanned):
    """The compiled step, writes and attention of all layers, reuses the cache's memory and holds no copy of it."""
    cache = KVCache.create(num_layers=4, num_blocks=512, block_size=16, num_kv_heads=2, head_dim=64)
    R, T = 4, 36
    batch = PagedBatch(
        block_tables=jnp.zeros((R, 8), jnp.int32),
        context_lens=jnp.array([1, 1, 1, 33], jnp.int32),
        query_starts=jnp.array([0, 1, 2, 3, 36], jnp.int32),
        slot_mapping=jnp.full(T, -1, jnp.int32),
        num_decodes=jnp.int32(3),
        max_query_len=64,
    )
    query, key = jnp.ones((T, 4, 64)), jnp.ones((T, 2, 64))

    @partial(jax.jit, donate_argnums=0)
    def step(cache, batch, query, key):
        def layer(carry, index):
            cache, query = carry
            # As in a model, a layer's keys come from the layer before: no write can be done ahead of time.
            new = key + query[:, :2]
            cache = write_kv(cache, batch, index, new, new)
            return (cache, paged_attention(query, cache, batch, index)), None

        if is_scanned:
            return jax.lax.scan(layer, (cache, query), jnp.arange(4))[0]
        carry = cache, query
        for index in range(4):
            carry, _ = layer(carry, index)
        return carry

    memory = step.lower(cache, batch, query, key).compile().memory_analysis()
    assert memory is not None
    cache_bytes = cache.keys.nbytes + cache.values.nbytes
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 8
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < cache_bytes / 8


@pytest.mark.usefixtures("no_annotation_checks")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"key": jnp.zeros((3, 2, 8))}, "key must be [tokens, kv_heads, head_dim] = (2, 2, 8), got (3, 2, 8)"),
        ({"value": jnp.zeros((2, 4, 8))}, "value must be [tokens, kv_heads, head_dim] = (2, 2, 8), got (2, 4, 8)"),
        ({"value": jnp.zeros((2, 2, 9))}, "value must be [tokens, kv_heads, head_dim] = (2, 2, 8), got (2, 2, 9)"),
        ({"key": jnp.zeros((2, 16))}, "key must be [tokens, kv_heads, head_dim] = (2, 2, 8), got (2, 16)"),
        ({"key": jnp.zeros((2, 2, 8), jnp.bfloat16)}, "key must have the cache's dtype float32, got bfloat16"),
        ({"value": jnp.zeros((2, 2, 8), jnp.int32)}, "value must have the cache's dtype float32, got int32"),
        # Not dropped in silence.
        ({"layer": 3}, "layer must be in [0, 3), got 3"),
        ({"layer": -1}, "layer must be in [0, 3), got -1"),
    ],
)
def test_bad_arguments_are_named_with_expected_and_actual(change, expected):
    arguments = {"layer": 0, "key": jnp.zeros((2, 2, 8)), "value": jnp.zeros((2, 2, 8))} | change
    cache = KVCache.create(num_layers=3, num_blocks=5, block_size=4, num_kv_heads=2, head_dim=8)
    with pytest.raises(ValueError, match=re.escape(expected)):
        write_kv(cache, writes_to([0, 1]), **arguments)

"""The kernels that copy, write and swap cache blocks, on the card, against loops in NumPy."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from attention_oracle import assert_as_exact
from cache_oracle import assert_same_bits, bits, random_cache

from pallas_kernels import (
    HostPool,
    KVCache,
    PagedBatch,
    copy_blocks,
    gather_blocks,
    rotate_and_write_kv,
    scatter_blocks,
    write_kv,
)

pytestmark = pytest.mark.gpu

DTYPES: list[Any] = [np.float32, np.float16, ml_dtypes.bfloat16]
SHAPES = [(1, 1, 16), (8, 3, 64), (16, 40, 80), (5, 2, 256), *((size, 8, 128) for size in (16, 32, 64, 128, 256))]
# Block size, kv heads and head dim; dtype.
CASES = [(shape, ml_dtypes.bfloat16) for shape in SHAPES] + [(SHAPES[i], dtype) for i in (1, 4) for dtype in DTYPES[:2]]


def batch_of(slots):
    none = jnp.zeros(1, jnp.int32)
    return PagedBatch(none[:, None], none, jnp.zeros(2, jnp.int32), jnp.asarray(slots), none[0], max_query_len=1)


def slots_of(rng, count, num_slots):
    """A third of them outside of the cache, on either side."""
    outside = rng.choice([-1, -2, -num_slots, num_slots, num_slots + 1, 2**31 - 1], size=count)
    return np.where(rng.random(count) < 0.3, outside, rng.permutation(num_slots)[:count]).astype(np.int32)


def with_rows(pages, slots, rows, layer):
    pages = pages.copy()
    by_slot = pages.reshape(pages.shape[0], -1, *pages.shape[3:])
    for slot, row in zip(slots, rows, strict=True):
        if 0 <= slot < by_slot.shape[1]:
            by_slot[layer, slot] = row
    return pages


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_blocks_are_copied_and_nothing_else_changes(shape, dtype):
    rng = np.random.default_rng(sum(shape))
    pages, cache = random_cache(rng, (3, 40, *shape), dtype)
    order = rng.permutation(40)
    copies = np.stack([order[rng.integers(0, 10, 20)], order[10:30]], axis=1)
    outside = [(-1, 5), (5, -1), (40, 5), (5, 40), (-(2**31), 5), (5, 2**31 - 1)]
    pairs = rng.permutation(np.concatenate([copies, outside])).astype(np.int32)
    found = jax.jit(partial(copy_blocks, implementation="mosaic"), donate_argnums=0)(cache, jnp.asarray(pairs))
    for array in pages:
        array[:, copies[:, 1]] = array[:, copies[:, 0]]
    assert_same_bits(found, pages)


@pytest.mark.parametrize("T", [1, 63, 1000])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_rows_go_to_their_slots_and_nothing_else_changes(shape, dtype, T):
    rng = np.random.default_rng(sum(shape) + T)
    num_blocks = T // shape[0] + 2
    pages, cache = random_cache(rng, (3, num_blocks, *shape), dtype)
    slots = slots_of(rng, T, num_blocks * shape[0])
    key, value = (rng.standard_normal((T, *shape[1:])).astype(dtype) for _ in range(2))
    write = jax.jit(partial(write_kv, implementation="mosaic"), donate_argnums=0)
    for layer in (-1, 3):  # outside of the cache, unknown where it is traced
        cache = write(cache, batch_of(slots), jnp.int32(layer), key, value)
    assert_same_bits(cache, pages)
    cache = write(cache, batch_of(slots), jnp.int32(1), key, value)
    assert_same_bits(cache, [with_rows(a, slots, new, 1) for a, new in zip(pages, (key, value), strict=True)])


@pytest.mark.parametrize("T", [1, 63, 1000])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_queries_and_keys_are_rotated_on_the_way(shape, dtype, T):
    block_size, K, H = shape
    rng = np.random.default_rng(sum(shape) + T)
    num_blocks = T // block_size + 2
    pages, cache = random_cache(rng, (3, num_blocks, *shape), dtype)
    slots = slots_of(rng, T, num_blocks * block_size)
    query, key, value = (rng.standard_normal((T, heads, H)).astype(dtype) for heads in (4 * K, K, K))
    qkv = np.concatenate([query.reshape(T, K, 4, H), key[:, :, None], value[:, :, None]], axis=2)
    angles = rng.uniform(0, 2 * np.pi, (T, H // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    run = jax.jit(partial(rotate_and_write_kv, implementation="mosaic"), donate_argnums=0)
    found, cache = run(cache, batch_of(slots), jnp.int32(1), qkv, cos, sin)

    def rotated(x, kind):
        a, b = (half.astype(kind) for half in np.split(x, 2, axis=-1))
        c, s = (angle.astype(kind)[:, None] for angle in (cos, sin))
        return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    assert_as_exact(found, rotated(query, np.float64), rotated(query, dtype), dtype, name="query")
    np.testing.assert_array_equal(bits(cache.values), bits(with_rows(pages[1], slots, value, 1)))
    real = (slots >= 0) & (slots < num_blocks * block_size)
    keys = np.asarray(cache.keys)
    rows = keys[1].reshape(-1, K, H)[slots[real]]
    assert_as_exact(rows, rotated(key, np.float64)[real], rotated(key, dtype)[real], dtype, name="key")
    # What was not named: put back what was before, and nothing differs.
    before = pages[0][1].reshape(-1, K, H)[slots[real]]
    np.testing.assert_array_equal(bits(with_rows(keys, slots[real], before, 1)), bits(pages[0]))


def test_a_cache_beyond_two_to_the_31_elements():
    """Where an offset of 32 bits would wrap: the last layer and block of 2.4 billion elements."""
    shape = (2, 9200, 16, 8, 1024)
    keys, values = (jnp.zeros(shape, jnp.bfloat16) for _ in range(2))
    cache = KVCache(keys, values)
    new = jnp.ones((3, 8, 1024), jnp.bfloat16)
    slots = jnp.array([9199 * 16 + 15, -1, 9198 * 16], jnp.int32)
    write = jax.jit(partial(write_kv, implementation="mosaic"), donate_argnums=0)
    cache = write(cache, batch_of(slots), 1, new, 2 * new)
    pairs = jnp.array([[9199, 9000], [-1, -1]], jnp.int32)
    cache = jax.jit(partial(copy_blocks, implementation="mosaic"), donate_argnums=0)(cache, pairs)
    counts = jax.jit(lambda x: jnp.count_nonzero(x, axis=(2, 3, 4)))
    for pages, number in ((cache.keys, 1), (cache.values, 2)):
        found = np.asarray(counts(pages))
        expected = np.zeros_like(found)
        expected[1, [9199, 9198, 9000]] = 8 * 1024
        np.testing.assert_array_equal(found, expected)
        assert (np.asarray(pages[1, 9000, 15]) == number).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 5, 37])
def test_blocks_come_back_from_pinned_host_memory(count, dtype):
    rng = np.random.default_rng(count)
    pages, cache = random_cache(rng, (3, 40, 16, 8, 128), dtype)
    sources, targets = (rng.permutation(40)[:count] for _ in range(2))
    hosts = rng.permutation(50)[:count]
    pool = HostPool(50)
    pool.store(cache, np.stack([sources, hosts], axis=1).astype(np.int32))
    kinds = {block.sharding.memory_kind for block in pool.blocks if block is not None}
    assert kinds == {"pinned_host"}
    others, cache = random_cache(rng, (3, 40, 16, 8, 128), dtype)
    cache = pool.load(cache, np.stack([hosts, targets], axis=1).astype(np.int32))
    assert cache.keys.sharding.memory_kind == cache.values.sharding.memory_kind == "device"
    for array, other in zip(pages, others, strict=True):
        other[:, targets] = array[:, sources]
    assert_same_bits(cache, others)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_blocks_scatter_back(dtype):
    rng = np.random.default_rng(0)
    pages, cache = random_cache(rng, (3, 40, 16, 8, 128), dtype)
    ids = np.array([39, -1, 0, 17], np.int32)
    blocks = jax.jit(gather_blocks)(cache, ids)
    for found, block in zip(np.asarray(blocks), ids, strict=True):
        expected = np.stack([array[:, block] for array in pages]) if block >= 0 else np.zeros_like(found)
        np.testing.assert_array_equal(bits(found), bits(expected))
    targets = np.array([3, -1, 4, 5], np.int32)
    cache = jax.jit(scatter_blocks, donate_argnums=0)(cache, targets, blocks)
    for array in pages:
        array[:, [3, 4, 5]] = array[:, [39, 0, 17]]
    assert_same_bits(cache, pages)


def test_the_same_bits_100_times():
    """A race shows as a result that changes."""
    rng = np.random.default_rng(0)
    _, cache = random_cache(rng, (4, 256, 16, 8, 128), ml_dtypes.bfloat16)
    order = rng.permutation(256).astype(np.int32)
    pairs = jnp.asarray(np.stack([order[:128], order[128:]], axis=1))
    slots = jnp.asarray(rng.permutation(4096)[:1000], jnp.int32)
    qkv = jnp.asarray(rng.standard_normal((1000, 8, 6, 128)), jnp.bfloat16)
    cos, sin = (jnp.asarray(rng.standard_normal((1000, 64)), jnp.float32) for _ in range(2))

    @jax.jit
    def run(cache):
        copied = copy_blocks(cache, pairs, implementation="mosaic")
        return copied, rotate_and_write_kv(cache, batch_of(slots), 1, qkv, cos, sin, implementation="mosaic")

    as_bits = jax.jit(lambda tree: [jax.lax.bitcast_convert_type(x, jnp.uint16) for x in jax.tree.leaves(tree)])
    first = as_bits(run(cache))
    for _ in range(100):
        again = as_bits(run(cache))
        assert all(bool((a == b).all()) for a, b in zip(first, again, strict=True))

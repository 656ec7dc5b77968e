"""Blocks swapped out to host memory and back in, bit for bit."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cache_oracle import assert_same_bits, random_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import HostPool, KVCache
from pallas_kernels.host_pool import CHUNK

DTYPES: list[Any] = [np.float32, np.float16, ml_dtypes.bfloat16]
NUM_BLOCKS, NUM_HOST_BLOCKS = 41, 37
SHAPE = (2, NUM_BLOCKS, 3, 2, 5)


def pairs_of(*pairs):
    return np.array(pairs, np.int32).reshape(-1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
def test_blocks_come_back_with_the_same_bits(count, dtype):
    rng = np.random.default_rng(count)
    pages, cache = random_cache(rng, SHAPE, dtype)
    pool = HostPool(NUM_HOST_BLOCKS)
    sources, others = (rng.permutation(NUM_BLOCKS)[:count] for _ in range(2))
    hosts = rng.permutation(NUM_HOST_BLOCKS)[:count]
    pool.store(cache, np.stack([sources, hosts], axis=1).astype(np.int32))
    assert_same_bits(cache, pages)
    others_pages, other_cache = random_cache(rng, SHAPE, dtype)
    loaded = pool.load(other_cache, np.stack([hosts, others], axis=1).astype(np.int32))
    for array, other in zip(pages, others_pages, strict=True):
        other[:, others] = array[:, sources]
    assert_same_bits(loaded, others_pages)
    assert other_cache.keys.is_deleted() == (count > 0)  # donated


def test_stored_blocks_lie_whole_in_pinned_host_memory():
    _, cache = random_cache(np.random.default_rng(0), SHAPE)
    pool = HostPool(3)
    pool.store(cache, pairs_of((4, 1), (7, 2)))
    blocks = [block for block in pool.blocks if block is not None]
    assert [(block.shape, block.sharding.memory_kind) for block in blocks] == [((2, 2, 3, 2, 5), "pinned_host")] * 2


def test_unpinned_where_memory_cannot_be_pinned(monkeypatch):
    _, cache = random_cache(np.random.default_rng(0), SHAPE)
    device = jax.devices()[0]
    kept = [memory for memory in device.addressable_memories() if memory.kind != "pinned_host"]
    monkeypatch.setattr(type(device), "addressable_memories", lambda self: kept)
    pool = HostPool(3)
    pool.store(cache, pairs_of((4, 1)))
    assert pool.blocks[1] is not None
    assert pool.blocks[1].sharding.memory_kind == "unpinned_host"


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_order_of_stores_and_loads(data):
    """Against a dictionary of blocks."""
    pages, cache = random_cache(np.random.default_rng(0), SHAPE)
    pool, stored = HostPool(5), {}
    for _ in range(data.draw(st.integers(1, 5))):
        if stored and data.draw(st.booleans()):
            sources = data.draw(st.lists(st.sampled_from(sorted(stored)), max_size=4))
            targets = data.draw(st.permutations(range(NUM_BLOCKS)))[: len(sources)]
            cache = pool.load(cache, pairs_of(*zip(sources, targets, strict=True)))
            for source, target in zip(sources, targets, strict=True):
                for array, block in zip(pages, stored[source], strict=True):
                    array[:, target] = block
        else:
            targets = data.draw(st.permutations(range(5)))[: data.draw(st.integers(0, 5))]
            sources = [data.draw(st.integers(0, NUM_BLOCKS - 1)) for _ in targets]
            pool.store(cache, pairs_of(*zip(sources, targets, strict=True)))
            stored |= {
                target: [array[:, source].copy() for array in pages]
                for source, target in zip(sources, targets, strict=True)
            }
        assert_same_bits(cache, pages)


def test_a_cache_sharded_over_its_heads_stays_so():
    pages, cache = random_cache(np.random.default_rng(3), SHAPE)
    sharding = NamedSharding(jax.sharding.Mesh(jax.devices()[:2], ("model",)), P(None, None, None, "model"))
    cache = jax.device_put(cache, sharding)
    pool = HostPool(2)
    pool.store(cache, pairs_of((40, 1)))
    stored = pool.blocks[1]
    assert stored is not None
    assert [shard.data.shape for shard in stored.addressable_shards] == [(2, 2, 3, 1, 5)] * 2
    loaded = pool.load(cache, pairs_of((1, 0)))
    assert loaded.keys.sharding.is_equivalent_to(sharding, 5)
    for array in pages:
        array[:, 0] = array[:, 40]
    assert_same_bits(loaded, pages)


@pytest.mark.usefixtures("no_annotation_checks")
@pytest.mark.parametrize(
    ("function", "pairs", "expected"),
    [
        ("store", np.zeros((2, 3), np.int32), "pairs must be int32 [n, 2], got int32 [2, 3]"),
        ("store", np.zeros((2, 2)), "pairs must be int32 [n, 2], got float64 [2, 2]"),
        ("store", pairs_of((41, 0)), "store: sources must be in [0, 41), got 41"),
        ("store", pairs_of((-1, 0)), "store: sources must be in [0, 41), got -1"),
        ("store", pairs_of((0, 2), (1, 3)), "store: targets must be in [0, 3), got 3"),
        ("store", pairs_of((0, 1), (2, 1)), "store: targets must be unique, got [1, 1]"),
        ("load", pairs_of((3, 0)), "load: sources must be in [0, 3), got 3"),
        ("load", pairs_of((0, 41)), "load: targets must be in [0, 41), got 41"),
        ("load", pairs_of((0, 5), (1, 5)), "load: targets must be unique, got [5, 5]"),
        ("load", pairs_of((0, 1), (2, 5)), "load: block 2 of the pool was never stored"),
    ],
)
def test_bad_pairs_are_named_and_change_nothing(function, pairs, expected):
    pages, cache = random_cache(np.random.default_rng(0), SHAPE)
    pool = HostPool(3)
    pool.store(cache, pairs_of((8, 0), (9, 1)))
    with pytest.raises(ValueError, match=re.escape(expected)):
        getattr(pool, function)(cache, pairs)
    for array in pages:
        array[:, 1:3] = array[:, 8:10]
    assert_same_bits(pool.load(cache, pairs_of((0, 1), (1, 2))), pages)


def test_blocks_of_another_cache_are_refused():
    _, cache = random_cache(np.random.default_rng(0), SHAPE)
    pool = HostPool(3)
    pool.store(cache, pairs_of((8, 0)))
    expected = re.escape("must be float32 (2, 2, 4, 2, 5) for this cache, got float32 (2, 2, 3, 2, 5)")
    other = KVCache.create(num_layers=2, num_blocks=3, block_size=4, num_kv_heads=2, head_dim=5)
    with pytest.raises(ValueError, match=expected):
        pool.load(other, pairs_of((0, 0)))
    other = KVCache(cache.keys.astype(jnp.bfloat16), cache.values.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=re.escape("must be bfloat16 (2, 2, 3, 2, 5) for this cache, got float32")):
        pool.load(other, pairs_of((0, 0)))


def test_a_pool_has_no_negative_size():
    assert HostPool(0).num_blocks == 0
    with pytest.raises(ValueError, match=r"num_blocks must not be negative, got -1$"):
        HostPool(-1)

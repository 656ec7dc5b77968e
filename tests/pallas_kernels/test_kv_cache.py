"""The cache itself: its shape, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import KVCache

SIZES: Any = {"num_layers": 3, "num_blocks": 5, "block_size": 4, "num_kv_heads": 2, "head_dim": 8}


def test_an_empty_cache_is_zeros_of_the_asked_shape():
    cache = KVCache.create(**SIZES, dtype=jnp.bfloat16)
    for pages in (cache.keys, cache.values):
        assert (pages.shape, pages.dtype) == ((3, 5, 4, 2, 8), jnp.bfloat16)
        assert not pages.any()
    assert (cache.num_blocks, cache.block_size, cache.num_kv_heads, cache.head_dim) == (5, 4, 2, 8)
    assert KVCache.create(**SIZES).keys.dtype == jnp.float32
    assert cache.keys is not cache.values  # each can be donated


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_below_one_are_refused(name, size):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {size}$"):
        KVCache.create(**SIZES | {name: size})


def test_a_cache_is_a_pytree_of_its_two_arrays():
    cache = KVCache.create(**SIZES)
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == [(3, 5, 4, 2, 8)] * 2
    assert isinstance(jax.jit(lambda cache: cache)(cache), KVCache)

"""The write of a step's new keys and values into the cache."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .kv_cache import KVCache, check_layer
from .paged_batch import PagedBatch


def write_kv(
    cache: KVCache,
    batch: PagedBatch,
    layer: int | Int32[Array, ""],
    key: Float[Array, "T K H"],
    value: Float[Array, "T K H"],
) -> KVCache:
    """Writes the step's keys and values into their slots of one layer; slot -1 (padding) writes nothing.

    In place when the cache is donated to the enclosing `jax.jit` (or carried through its loop).
    Raises ValueError where shapes or dtypes of key, value, cache and batch disagree.
    """
    expected = (batch.slot_mapping.shape[0], cache.num_kv_heads, cache.head_dim)
    for name, array in (("key", key), ("value", value)):
        if array.shape != expected:
            raise ValueError(f"write_kv: {name} must be [tokens, kv_heads, head_dim] = {expected}, got {array.shape}")
        if array.dtype != cache.keys.dtype:
            raise ValueError(f"write_kv: {name} must have the cache's dtype {cache.keys.dtype}, got {array.dtype}")
    check_layer("write_kv", cache, layer)
    # Floor division keeps -1 negative; a negative index is then out of range, and dropped, instead of wrapping.
    block, offset = jnp.divmod(batch.slot_mapping, cache.block_size)

    def scatter(pages: Array, new: Array) -> Array:
        return pages.at[layer, block, offset].set(new, mode="drop", wrap_negative_indices=False)

    return replace(cache, keys=scatter(cache.keys, key), values=scatter(cache.values, value))

"""The write of a step's new keys and values into the cache."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .devices import Implementation, mosaic_module
from .kv_cache import KVCache, check_layer
from .paged_batch import PagedBatch
from .rotary import rotate


def write_kv(
    cache: KVCache,
    batch: PagedBatch,
    layer: int | Int32[Array, ""],
    key: Float[Array, "T K H"],
    value: Float[Array, "T K H"],
    *,
    implementation: Implementation | None = None,
) -> KVCache:
    """Writes the step's keys and values into their slots of one layer; slot -1 (padding) writes nothing.

    Slots outside the cache write nothing either, and -1 never stands for the last slot. In place when the cache is
    donated to the enclosing `jax.jit` (or carried through its loop); where it is sharded over its kv heads, call this
    inside `jax.shard_map`, with the same batch for all; outside of it, XLA serves.

    `implementation` is "mosaic" (Hopper GPUs, one launch), "xla" (anywhere), or None for the first that can serve.

    Raises ValueError where shapes or dtypes of key, value, cache and batch disagree, NotImplementedError where the
    implementation asked for cannot serve.
    """
    _check("write_kv", cache, batch, layer, key, value)
    if kernel := mosaic_module("write_kv", implementation, cache):
        return kernel.write_kv(cache, batch.slot_mapping, jnp.asarray(layer, jnp.int32), key, value)
    # Floor division keeps -1 negative; a negative index is then out of range, and dropped, instead of wrapping.
    block, offset = jnp.divmod(batch.slot_mapping, cache.block_size)

    def scatter(pages: Array, new: Array) -> Array:
        return pages.at[layer, block, offset].set(new, mode="drop", wrap_negative_indices=False)

    return replace(cache, keys=scatter(cache.keys, key), values=scatter(cache.values, value))


def rotate_and_write_kv(
    cache: KVCache,
    batch: PagedBatch,
    layer: int | Int32[Array, ""],
    query: Float[Array, "T N H"],
    key: Float[Array, "T K H"],
    value: Float[Array, "T K H"],
    cos: Float[Array, "T H_half"],
    sin: Float[Array, "T H_half"],
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "T N H"], KVCache]:
    """The rotated queries, and `write_kv` of the rotated keys and the values: what stands between a layer's
    projections and its attention, in one launch.

    As `rotate` and `write_kv`, whose arguments, errors and promises these are.
    """
    _check("rotate_and_write_kv", cache, batch, layer, key, value)
    expected = (key.shape[0], cache.head_dim)
    if query.ndim != 3 or query.shape[::2] != expected or query.dtype != key.dtype:
        raise ValueError(
            "rotate_and_write_kv: query must be [tokens, q_heads, head_dim] = "
            f"{key.dtype} ({expected[0]}, q_heads, {expected[1]}), got {query.dtype} {query.shape}"
        )
    expected = (key.shape[0], cache.head_dim // 2)
    for name, array in (("cos", cos), ("sin", sin)):
        if array.shape != expected or array.dtype != jnp.float32:
            raise ValueError(
                f"rotate_and_write_kv: {name} must be [tokens, head_dim / 2] = float32 {expected}, "
                f"got {array.dtype} {array.shape}"
            )
    if kernel := mosaic_module("rotate_and_write_kv", implementation, cache):
        layer = jnp.asarray(layer, jnp.int32)
        return kernel.rotate_and_write_kv(cache, batch.slot_mapping, layer, query, key, value, cos, sin)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    return query, write_kv(cache, batch, layer, key, value, implementation="xla")


def _check(function: str, cache: KVCache, batch: PagedBatch, layer: int | Array, key: Array, value: Array) -> None:
    expected = (batch.slot_mapping.shape[0], cache.num_kv_heads, cache.head_dim)
    for name, array in (("key", key), ("value", value)):
        if array.shape != expected:
            raise ValueError(f"{function}: {name} must be [tokens, kv_heads, head_dim] = {expected}, got {array.shape}")
        if array.dtype != cache.keys.dtype:
            raise ValueError(f"{function}: {name} must have the cache's dtype {cache.keys.dtype}, got {array.dtype}")
    check_layer(function, cache, layer)

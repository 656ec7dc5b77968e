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
    _check(cache, batch, layer, key, value)
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
    qkv: Float[Array, "T K heads H"],
    cos: Float[Array, "T H_half"],
    sin: Float[Array, "T H_half"],
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "T N H"], KVCache]:
    """The rotated queries, and `write_kv` of the rotated keys and the values: what stands between a layer's projection
    and its attention, in one launch.

    Args:
      qkv: of each token and kv head, its G query heads, its key and its value, as one product brings them. Query head
        n is the n % G-th of kv head n // G.
      cos, sin: float32, see `rotate`.

    As `rotate` and `write_kv`, whose other arguments, errors and promises these are.
    """
    expected = (batch.slot_mapping.shape[0], cache.num_kv_heads, cache.head_dim)
    if qkv.ndim != 4 or (*qkv.shape[:2], qkv.shape[3]) != expected or qkv.shape[2] < 3:
        raise ValueError(
            "rotate_and_write_kv: qkv must be [tokens, kv_heads, query heads of each + 2, head_dim] = "
            f"({expected[0]}, {expected[1]}, at least 3, {expected[2]}), got {qkv.shape}"
        )
    if qkv.dtype != cache.keys.dtype:
        raise ValueError(f"rotate_and_write_kv: qkv must have the cache's dtype {cache.keys.dtype}, got {qkv.dtype}")
    check_layer("rotate_and_write_kv", cache, layer)
    expected = (qkv.shape[0], cache.head_dim // 2)
    for name, array in (("cos", cos), ("sin", sin)):
        if array.shape != expected or array.dtype != jnp.float32:
            raise ValueError(
                f"rotate_and_write_kv: {name} must be [tokens, head_dim / 2] = float32 {expected}, "
                f"got {array.dtype} {array.shape}"
            )
    if kernel := mosaic_module("rotate_and_write_kv", implementation, cache):
        layer = jnp.asarray(layer, jnp.int32)
        return kernel.rotate_and_write_kv(cache, batch.slot_mapping, layer, qkv, cos, sin)
    query, key = rotate(qkv[:, :, :-2].reshape(len(qkv), -1, cache.head_dim), cos, sin), rotate(qkv[:, :, -2], cos, sin)
    return query, write_kv(cache, batch, layer, key, qkv[:, :, -1], implementation="xla")


def _check(cache: KVCache, batch: PagedBatch, layer: int | Array, key: Array, value: Array) -> None:
    expected = (batch.slot_mapping.shape[0], cache.num_kv_heads, cache.head_dim)
    for name, array in (("key", key), ("value", value)):
        if array.shape != expected:
            raise ValueError(f"write_kv: {name} must be [tokens, kv_heads, head_dim] = {expected}, got {array.shape}")
        if array.dtype != cache.keys.dtype:
            raise ValueError(f"write_kv: {name} must have the cache's dtype {cache.keys.dtype}, got {array.dtype}")
    check_layer("write_kv", cache, layer)

"""Copies of blocks within the cache (copy-on-write), and between it and an array of whole blocks (swapping)."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from .devices import Implementation, mosaic_module
from .kv_cache import KVCache

Ids = Array | np.ndarray


def copy_blocks(cache: KVCache, pairs: Int32[Ids, "n 2"], *, implementation: Implementation | None = None) -> KVCache:
    """Copies block pairs[i, 0] to block pairs[i, 1] for every pair at once: all layers, keys and values.

    One block may be the source of several pairs. Destinations are unique, and none is also a source: the copies
    happen in no order. A pair with an id outside of the cache, such as the padding (-1, -1), copies nothing; -1 never
    stands for the last block. In place when the cache is donated to the enclosing `jax.jit`; where it is sharded over
    its kv heads, call this inside `jax.shard_map`, with the same pairs for all; outside of it, XLA serves.

    `implementation` is "mosaic" (Hopper GPUs, one launch), "xla" (anywhere), or None for the first that can serve.

    Raises ValueError for wrong shapes, and where `pairs` is a NumPy array, whose values are known, for ids past the
    cache's end, destinations that repeat, and destinations that are also sources. Raises NotImplementedError where
    the implementation asked for cannot serve.

    >>> cache = KVCache.create(num_layers=2, num_blocks=8, block_size=16, num_kv_heads=4, head_dim=64)
    >>> cache = copy_blocks(cache, np.array([[3, 5], [3, 6], [-1, -1]], np.int32))
    """
    _check_ids("copy_blocks", "pairs", pairs, "[n, 2]", cache)
    if isinstance(pairs, np.ndarray):
        _check_order(pairs)
    pairs = jnp.asarray(pairs)
    if not len(pairs):
        return cache
    if kernel := mosaic_module("copy_blocks", implementation, cache):
        return kernel.copy_blocks(cache, pairs)
    source, target = pairs.T
    target = jnp.where((source >= 0) & (source < cache.num_blocks), target, -1)

    def copy(pages: Array) -> Array:
        blocks = pages.at[:, source].get(mode="clip", wrap_negative_indices=False)
        return pages.at[:, target].set(blocks, mode="drop", wrap_negative_indices=False)

    return replace(cache, keys=copy(cache.keys), values=copy(cache.values))


def gather_blocks(cache: KVCache, ids: Int32[Ids, " n"]) -> Float[Array, "n 2 L block_size K H"]:
    """The blocks with these ids, keys and values of all layers of a block contiguous; zeros for padding (-1).

    Raises ValueError for wrong shapes, and for ids past the cache's end where they are a NumPy array.

    >>> cache = KVCache.create(num_layers=3, num_blocks=8, block_size=16, num_kv_heads=4, head_dim=64)
    >>> gather_blocks(cache, np.array([5, 2, -1], np.int32)).shape
    (3, 2, 3, 16, 4, 64)
    """
    _check_ids("gather_blocks", "ids", ids, "[n]", cache)
    ids = jnp.asarray(ids)

    def gather(pages: Array) -> Array:
        return pages.at[:, ids].get(mode="fill", fill_value=0, wrap_negative_indices=False).swapaxes(0, 1)

    return jnp.stack([gather(cache.keys), gather(cache.values)], axis=1)


def scatter_blocks(cache: KVCache, ids: Int32[Ids, " n"], blocks: Float[Array, "n 2 L block_size K H"]) -> KVCache:
    """Puts what `gather_blocks` returned into the blocks with these ids, which are unique; -1 puts nothing anywhere.

    In place when the cache is donated to the enclosing `jax.jit`. Raises ValueError for shapes or dtypes that do not
    fit the cache, and where ids are a NumPy array, for ids past the cache's end or that repeat.

    >>> cache = KVCache.create(num_layers=3, num_blocks=8, block_size=16, num_kv_heads=4, head_dim=64)
    >>> ids = np.array([5, 2, -1], np.int32)
    >>> cache = scatter_blocks(cache, ids, gather_blocks(cache, ids))
    """
    L, _, *block = cache.keys.shape
    _check_ids("scatter_blocks", "ids", ids, "[n]", cache)
    expected = (len(ids), 2, L, *block)
    if blocks.shape != expected:
        raise ValueError(
            "scatter_blocks: blocks must be [ids, 2, layers, block_size, kv_heads, head_dim] = "
            f"{expected}, got {blocks.shape}"
        )
    if blocks.dtype != cache.keys.dtype:
        raise ValueError(f"scatter_blocks: blocks must have the cache's dtype {cache.keys.dtype}, got {blocks.dtype}")
    if isinstance(ids, np.ndarray):
        _check_unique("scatter_blocks: ids", ids[ids >= 0])
    ids = jnp.asarray(ids)

    def scatter(pages: Array, new: Array) -> Array:
        return pages.at[:, ids].set(new.swapaxes(0, 1), mode="drop", wrap_negative_indices=False)

    return replace(cache, keys=scatter(cache.keys, blocks[:, 0]), values=scatter(cache.values, blocks[:, 1]))


def _check_ids(function: str, name: str, ids: Ids, shape: str, cache: KVCache) -> None:
    tail = (2,) if shape == "[n, 2]" else ()
    if ids.ndim != 1 + len(tail) or ids.shape[1:] != tail or ids.dtype != jnp.int32:
        raise ValueError(f"{function}: {name} must be int32 {shape}, got {ids.dtype} {list(ids.shape)}")
    if isinstance(ids, np.ndarray) and ids.size and ids.max() >= cache.num_blocks:
        raise ValueError(f"{function}: block ids must be below {cache.num_blocks}, the cache's blocks, got {ids.max()}")


def _check_order(pairs: np.ndarray) -> None:
    source, target = pairs[(pairs >= 0).all(axis=1)].T
    _check_unique("copy_blocks: destinations", target)
    both = np.intersect1d(source, target)
    if both.size:
        raise ValueError(f"copy_blocks: no destination may also be a source, got {both.tolist()} as both")


def _check_unique(what: str, ids: np.ndarray) -> None:
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{what} must be unique, got {values[counts > 1].tolist()} more than once")

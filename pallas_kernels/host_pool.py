"""Blocks that were swapped out of the cache, in host memory."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int32

from .copy_blocks import gather_blocks, scatter_blocks
from .kv_cache import KVCache

# Blocks that move in one call, at most. Calls of 16, 8, 4, 2 and 1 blocks move any number with five programs.
CHUNK = 16


class HostPool:
    """Room for `num_blocks` blocks in host memory, to swap a cache's blocks out to and in from.

    A block, keys and values of all layers, is one array [2, L, block_size, K, H] there, pinned where the device can
    pin memory, so that it crosses the bus in one piece. It is only ever moved, for a GPU does not compute on the
    host's memory; a cache that is sharded over its kv heads stays so on the way. Moves are asynchronous, like
    everything that JAX dispatches. Memory is taken when a block is first stored.

    >>> cache = KVCache.create(num_layers=2, num_blocks=8, block_size=16, num_kv_heads=4, head_dim=64)
    >>> pool = HostPool(num_blocks=100)
    >>> pool.store(cache, np.array([[5, 0], [2, 99]], np.int32))
    >>> cache = pool.load(cache, np.array([[99, 7]], np.int32))  # block 7 now is what block 2 was
    """

    def __init__(self, num_blocks: int):
        if num_blocks < 0:
            raise ValueError(f"HostPool: num_blocks must not be negative, got {num_blocks}")
        self.blocks: list[Array | None] = [None] * num_blocks
        """Each block's array, None before something was stored there; written by `store` alone."""

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def store(self, cache: KVCache, pairs: Int32[np.ndarray, "n 2"]) -> None:
        """Copies block pairs[i, 0] of the cache to block pairs[i, 1] of the pool, for every pair.

        Raises ValueError for ids that the cache or the pool does not have, and for targets that repeat; then nothing
        has been copied.
        """
        self._check("store", pairs, sources=cache.num_blocks, targets=self.num_blocks)
        for chunk in _chunks(pairs):
            for block, target in zip(_gather(cache, chunk[:, 0]), chunk[:, 1], strict=True):
                self.blocks[target] = jax.device_put(block, _on_host(block.sharding))

    def load(self, cache: KVCache, pairs: Int32[np.ndarray, "n 2"]) -> KVCache:
        """Copies block pairs[i, 0] of the pool to block pairs[i, 1] of the cache, which is donated.

        Raises ValueError for ids that the cache or the pool does not have, for targets that repeat, for a block that
        was never stored, and for blocks of a cache of another shape; then nothing has been copied.
        """
        self._check("load", pairs, sources=self.num_blocks, targets=cache.num_blocks)
        L, _, *block = cache.keys.shape
        for source in pairs[:, 0]:
            stored = self.blocks[source]
            if stored is None:
                raise ValueError(f"HostPool.load: block {source} of the pool was never stored")
            if stored.shape != (2, L, *block) or stored.dtype != cache.keys.dtype:
                raise ValueError(
                    f"HostPool.load: block {source} of the pool must be {cache.keys.dtype} {(2, L, *block)} for this "
                    f"cache, got {stored.dtype} {stored.shape}"
                )
        for chunk in _chunks(pairs):
            blocks = [self.blocks[source] for source in chunk[:, 0]]
            moved = [jax.device_put(block, _on_device(block.sharding)) for block in blocks if block is not None]
            cache = _scatter(cache, chunk[:, 1], moved)
        return cache

    def _check(self, function: str, pairs: np.ndarray, *, sources: int, targets: int) -> None:
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != np.int32:
            raise ValueError(f"HostPool.{function}: pairs must be int32 [n, 2], got {pairs.dtype} {list(pairs.shape)}")
        for name, ids, count in (("sources", pairs[:, 0], sources), ("targets", pairs[:, 1], targets)):
            wrong = ids[(ids < 0) | (ids >= count)]
            if wrong.size:
                raise ValueError(f"HostPool.{function}: {name} must be in [0, {count}), got {wrong[0]}")
        if len(set(pairs[:, 1].tolist())) < len(pairs):
            raise ValueError(f"HostPool.{function}: targets must be unique, got {pairs[:, 1].tolist()}")


def _chunks(pairs: np.ndarray) -> Iterator[np.ndarray]:
    start = 0
    while start < len(pairs):
        count = min(CHUNK, 1 << (len(pairs) - start).bit_length() - 1)
        yield pairs[start : start + count]
        start += count


def _on_host(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    kinds = {memory.kind for device in sharding.addressable_devices for memory in device.addressable_memories()}
    return sharding.with_memory_kind("pinned_host" if "pinned_host" in kinds else "unpinned_host")


def _on_device(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    device = next(iter(sharding.addressable_devices))
    return sharding.with_memory_kind(device.default_memory().kind)


@jax.jit
def _gather(cache: KVCache, ids: Array) -> tuple[Array, ...]:
    return tuple(gather_blocks(cache, ids))


@partial(jax.jit, donate_argnums=0)
def _scatter(cache: KVCache, ids: Array, blocks: list[Array]) -> KVCache:
    return scatter_blocks(cache, ids, jnp.stack(blocks))

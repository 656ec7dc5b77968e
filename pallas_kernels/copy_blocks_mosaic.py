"""Copies of blocks on Hopper GPUs: one launch for every pair and layer, keys and values."""

import math

import jax
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Int32

from .kv_cache import KVCache

# A thread block moves so much of keys and of values at most. At this size seven of them fit in a multiprocessor's
# shared memory, which has as many bytes in flight as the memory's latency asks for.
TILE_BYTES = 16 * 1024


def unsupported(cache: KVCache) -> str | None:
    """Why the kernel cannot copy this cache's blocks, or None."""
    block_bytes = math.prod(cache.keys.shape[2:]) * cache.keys.dtype.itemsize
    if block_bytes % 16:
        return f"a block of one layer must be a multiple of 16 bytes, got {block_bytes}"
    return None


def copy_blocks(cache: KVCache, pairs: Int32[Array, "n 2"]) -> KVCache:
    L, P, *block = cache.keys.shape
    size = math.prod(block)  # of a block of one layer, which is contiguous
    tile = _tile(size, cache.keys.dtype.itemsize)

    def kernel(pairs_ref, keys_ref, values_ref, tiles, full):
        pair, layer = lax.axis_index("pair"), lax.axis_index("layer")
        source, target = pairs_ref[pair, 0], pairs_ref[pair, 1]
        part = pl.ds(lax.axis_index("tile") * tile, tile)

        @pl.when((source >= 0) & (source < P) & (target >= 0) & (target < P))
        def copy():
            pages = (keys_ref, values_ref)
            for i, ref in enumerate(pages):
                in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # so a bulk copy, which needs no tensor map
                plgpu.copy_gmem_to_smem(ref.at[layer, source, part], tiles.at[i], full.at[i], oob_mode=in_bounds)
            for i, ref in enumerate(pages):
                plgpu.barrier_wait(full.at[i])
                plgpu.copy_smem_to_gmem(tiles.at[i], ref.at[layer, target, part])
            plgpu.wait_smem_to_gmem(0)

    refs = [jax.new_ref(pages.reshape(L, P, size)) for pages in (cache.keys, cache.values)]
    plgpu.kernel(
        kernel,
        grid=(pairs.shape[0], L, size // tile),
        grid_names=("pair", "layer", "tile"),
        scratch_types=[plgpu.SMEM((2, tile), cache.keys.dtype), plgpu.Barrier(num_barriers=2)],
        kernel_name="copy_blocks",
    )(pairs, *refs)
    return KVCache(*(jax.freeze(ref).reshape(cache.keys.shape) for ref in refs))


def _tile(size: int, itemsize: int) -> int:
    """The largest part of a block that fits, divides it, and can be copied in bulk: by 16 bytes."""
    sixteen = 16 // itemsize
    parts = range(1, size // sixteen + 1)
    return next(
        size // n for n in parts if size % n == 0 and size // n % sixteen == 0 and size // n * itemsize <= TILE_BYTES
    )

"""Copies of blocks on Hopper GPUs: one launch for every pair and layer, keys and values."""

import math

import jax
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Int32

from .kv_cache import KVCache

# A thread block moves one tile of keys and one of values. At this size seven of them fit in a multiprocessor's shared
# memory, which has as many bytes in flight as the memory's latency asks for.
TILE_BYTES = 16 * 1024


def unsupported(cache: KVCache) -> str | None:
    """Why the kernel cannot copy this cache's blocks, or None."""
    block_bytes = math.prod(cache.keys.shape[2:]) * cache.keys.dtype.itemsize
    if block_bytes % 16:
        return f"a block of one layer must be a multiple of 16 bytes, got {block_bytes}"
    return None


def copy_blocks(cache: KVCache, pairs: Int32[Array, "n 2"]) -> KVCache:
    L, P, *block = cache.keys.shape
    # A block of one layer, which is contiguous, as rows that TMA takes: at most 256 by 256 elements in one copy.
    columns = math.gcd(math.prod(block), 128)
    rows = math.prod(block) // columns
    most = min(rows, 256, TILE_BYTES // (columns * cache.keys.dtype.itemsize))
    tile = max(size for size in range(1, most + 1) if rows % size == 0)

    def kernel(pairs_ref, keys_ref, values_ref, tiles, full):
        pair, layer = lax.axis_index("pair"), lax.axis_index("layer")
        source, target = pairs_ref[pair, 0], pairs_ref[pair, 1]
        part = pl.ds(lax.axis_index("tile") * tile, tile)

        @pl.when((source >= 0) & (source < P) & (target >= 0) & (target < P))
        def copy():
            pages = (keys_ref, values_ref)
            for i, ref in enumerate(pages):
                plgpu.copy_gmem_to_smem(ref.at[layer, source, part], tiles.at[i], full.at[i])
            for i, ref in enumerate(pages):
                plgpu.barrier_wait(full.at[i])
                plgpu.copy_smem_to_gmem(tiles.at[i], ref.at[layer, target, part])
            plgpu.wait_smem_to_gmem(0)

    refs = [jax.new_ref(pages.reshape(L, P, rows, columns)) for pages in (cache.keys, cache.values)]
    plgpu.kernel(
        kernel,
        grid=(pairs.shape[0], L, rows // tile),
        grid_names=("pair", "layer", "tile"),
        scratch_types=[plgpu.SMEM((2, tile, columns), cache.keys.dtype), plgpu.Barrier(num_barriers=2)],
        kernel_name="copy_blocks",
    )(pairs, *refs)
    return KVCache(*(jax.freeze(ref).reshape(cache.keys.shape) for ref in refs))

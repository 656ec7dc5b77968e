"""Writes into the cache on Hopper GPUs: one launch for keys and values, each token's row to its slot."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .kv_cache import KVCache
from .mosaic_common import Ref

# Tokens of a thread block: few, so that a decode step of 64 sequences still spreads over the card, and fewer where
# their keys or values are more bytes than this.
MOST_TOKENS = 4
TILE_BYTES = 32 * 1024
MOST_BYTES = 96 * 1024


def unsupported(cache: KVCache) -> str | None:
    """Why the kernel cannot write into this cache, or None."""
    row_bytes = cache.num_kv_heads * cache.head_dim * cache.keys.dtype.itemsize
    if row_bytes % 16 or row_bytes > MOST_BYTES:
        return f"the heads of a token must be a multiple of 16 bytes up to {MOST_BYTES}, got {row_bytes}"
    return None


def write_kv(cache: KVCache, slots: Array, layer: Array, key: Array, value: Array) -> KVCache:
    T = slots.shape[0]
    if not T:
        return cache
    width = cache.num_kv_heads * cache.head_dim  # of all heads of a token, which are contiguous
    count = min(MOST_TOKENS, max(1, TILE_BYTES // (width * cache.keys.dtype.itemsize)))

    def kernel(slots_ref, layer_ref, key_ref, value_ref, keys_ref, values_ref, tiles, full):
        start = lax.axis_index("tile") * count
        for i, source in enumerate((key_ref, value_ref)):
            # Past the last token there is nothing to load and nothing will be stored.
            undefined = plgpu.OOBFillMode.UNDEFINED
            plgpu.copy_gmem_to_smem(source.at[pl.ds(start, count)], tiles.at[i], full.at[i], oob_mode=undefined)
        token_slots = slots_of(slots_ref, start, count)
        for i, pages in enumerate((keys_ref, values_ref)):
            plgpu.barrier_wait(full.at[i])
            store_tokens(token_slots, pages, layer_ref[0], lambda token, i=i: [(tiles.at[i, token], ())])
        plgpu.wait_smem_to_gmem(0)

    refs = slot_refs(cache, (width,))
    plgpu.kernel(
        kernel,
        grid=(pl.cdiv(T, count),),
        grid_names=("tile",),
        scratch_types=[plgpu.SMEM((2, count, width), cache.keys.dtype), plgpu.Barrier(num_barriers=2)],
        kernel_name="write_kv",
    )(slots, layer.reshape(1), key.reshape(T, width), value.reshape(T, width), *refs)
    return cache_of(refs, cache)


def slot_refs(cache: KVCache, row: tuple[int, ...]) -> list[Ref]:
    """Keys and values as [layers, slots, *row], to be written in place."""
    L, P, block_size, *_ = cache.keys.shape
    return [jax.new_ref(pages.reshape(L, P * block_size, *row)) for pages in (cache.keys, cache.values)]


def cache_of(refs: Sequence[Ref], cache: KVCache) -> KVCache:
    """What `slot_refs` refers to, in the cache's shape."""
    return KVCache(*(jax.freeze(ref).reshape(cache.keys.shape) for ref in refs))


def slots_of(slots_ref: Ref, start: Array, count: int) -> list[Array]:
    """The slots of `count` tokens; -1 for those past the last."""
    T = slots_ref.shape[0]
    tokens = [start + token for token in range(count)]
    return [jnp.where(token < T, slots_ref[jnp.minimum(token, T - 1)], -1) for token in tokens]


def store_tokens(
    slots: Sequence[Array], pages: Ref, layer: Array, parts: Callable[[int], Sequence[tuple[Ref, tuple]]]
) -> None:
    """Starts the copies of each token's parts to pages[layer, slot, *index].

    A slot or a layer outside the cache gets none: a bulk copy would find its way to another layer's slot.
    """
    num_layers, num_slots = pages.shape[:2]
    for token, slot in enumerate(slots):

        @pl.when((layer >= 0) & (layer < num_layers) & (slot >= 0) & (slot < num_slots))
        def store(token=token, slot=slot):
            for source, index in parts(token):
                plgpu.copy_smem_to_gmem(source, pages.at[(layer, slot, *index)])

"""Rotary positions and the write into the cache on Hopper GPUs: one launch for queries, keys and values."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .kv_cache import KVCache
from .write_kv_mosaic import cache_of, slot_refs, slots_of, store_tokens

# Tokens of a thread block, which owns one head of them.
TOKENS = 16


def unsupported(cache: KVCache) -> str | None:
    """Why the kernel cannot serve this cache, or None."""
    if cache.head_dim % 16 or cache.head_dim > 256:
        return f"head_dim must be a multiple of 16 up to 256, got {cache.head_dim}"
    return None


def rotate_and_write_kv(
    cache: KVCache, slots: Array, layer: Array, qkv: Array, cos: Array, sin: Array
) -> tuple[Array, KVCache]:
    T, K, _, H = qkv.shape
    group, half, dtype = qkv.shape[2] - 2, H // 2, qkv.dtype
    N = K * group
    out = jax.ShapeDtypeStruct((T, N, H), dtype)
    if not T:
        return jnp.zeros(out.shape, dtype), cache

    def kernel(slots_ref, layer_ref, qkv_ref, cos_ref, sin_ref, keys_ref, values_ref, out_ref, memory):
        start, head = lax.axis_index("tile") * TOKENS, lax.axis_index("head")
        tokens = pl.ds(start, TOKENS)
        halves = (pl.ds(0, half), pl.ds(half, half))
        tiles, angles, full = memory["halves"], memory["angles"], memory["full"]

        def rotate(kv_head: Array, member: Array | int) -> None:
            """Leaves a head's rotated halves in `tiles`."""
            for i, part in enumerate(halves):
                plgpu.copy_gmem_to_smem(qkv_ref.at[tokens, kv_head, member, part], tiles.at[i], full)
            for i, angle in enumerate((cos_ref, sin_ref)):
                plgpu.copy_gmem_to_smem(angle.at[tokens], angles.at[i], full)
            plgpu.barrier_wait(full)
            a, b = (tiles[i].astype(jnp.float32) for i in range(2))
            cos, sin = angles[0], angles[1]
            tiles[0] = (a * cos - b * sin).astype(dtype)
            tiles[1] = (b * cos + a * sin).astype(dtype)
            plgpu.commit_smem()

        @pl.when(head < N)
        def of_query():
            rotate(lax.div(head, jnp.int32(group)), lax.rem(head, jnp.int32(group)))
            for i, part in enumerate(halves):
                plgpu.copy_smem_to_gmem(tiles.at[i], out_ref.at[tokens, head, part])

        @pl.when(head >= N)
        def of_key_and_value():
            kv_head = head - N
            plgpu.copy_gmem_to_smem(qkv_ref.at[tokens, kv_head, group + 1], memory["value"], memory["value_full"])
            token_slots = slots_of(slots_ref, start, TOKENS)
            rotate(kv_head, group)
            store_tokens(
                token_slots,
                keys_ref,
                layer_ref[0],
                lambda token: [(tiles.at[i, token], (kv_head, part)) for i, part in enumerate(halves)],
            )
            plgpu.barrier_wait(memory["value_full"])
            store_tokens(token_slots, values_ref, layer_ref[0], lambda token: [(memory["value"].at[token], (kv_head,))])

        plgpu.wait_smem_to_gmem(0)

    memory = {
        "halves": plgpu.SMEM((2, TOKENS, half), dtype),
        "angles": plgpu.SMEM((2, TOKENS, half), jnp.float32),
        "value": plgpu.SMEM((TOKENS, H), dtype),
        "full": plgpu.Barrier(num_arrivals=4),
        "value_full": plgpu.Barrier(),
    }
    refs = slot_refs(cache, (K, H))
    rotated = plgpu.kernel(
        kernel,
        out_type=out,
        grid=(pl.cdiv(T, TOKENS), N + K),
        grid_names=("tile", "head"),
        scratch_types=[memory],
        kernel_name="rotate_and_write_kv",
    )(slots, layer.reshape(1), qkv, cos, sin, *refs)
    return rotated, cache_of(refs, cache)

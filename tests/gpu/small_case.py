"""Each Hopper kernel once at small size, for compute-sanitizer (`test_sanitizer.py`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import KVCache, PagedBatch, copy_blocks, flash_attention, paged_attention, rotate_and_write_kv

CONTEXTS, NEW, BLOCK_SIZE, N, K, H = (70, 1000, 200), (1, 1, 150), 16, 8, 2, 64


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16)


def flash(causal: bool) -> jax.Array:
    """Forward and backward, at a length that ends within a tile."""
    query, key = normal(1, 203, N, H), normal(1, 203, K, H)

    def loss(query, key, value):
        return flash_attention(query, key, value, is_causal=causal, implementation="mosaic").astype(jnp.float32).sum()

    return jnp.stack([x.astype(jnp.float32).sum() for x in jax.grad(loss, (0, 1, 2))(query, key, key)]).sum()


def paged() -> jax.Array:
    """New tokens written, two decodes and a prefill over them, a block copied."""
    blocks = [-(-context // BLOCK_SIZE) for context in CONTEXTS]
    starts = np.cumsum([0, *blocks], dtype=np.int32)
    slots = [
        start * BLOCK_SIZE + token
        for start, context, new in zip(starts[:-1], CONTEXTS, NEW, strict=True)
        for token in range(context - new, context)
    ]
    batch = PagedBatch(
        block_tables=jnp.minimum(starts[:-1, None] + np.arange(max(blocks), dtype=np.int32), starts[-1] - 1),
        context_lens=jnp.asarray(CONTEXTS, jnp.int32),
        query_starts=jnp.asarray(np.cumsum([0, *NEW]), jnp.int32),
        slot_mapping=jnp.asarray(slots, jnp.int32),
        num_decodes=jnp.int32(2),
        max_query_len=max(NEW),
    )
    pages = normal(1, sum(blocks), BLOCK_SIZE, K, H)
    T = sum(NEW)
    qkv = normal(T, K, N // K + 2, H)
    cos, sin = (jnp.ones((T, H // 2), jnp.float32) for _ in range(2))
    layer = jnp.int32(0)
    query, cache = rotate_and_write_kv(KVCache(pages, pages), batch, layer, qkv, cos, sin, implementation="mosaic")
    cache = copy_blocks(cache, jnp.asarray([[0, 1]], jnp.int32), implementation="mosaic")
    return paged_attention(query, cache, batch, layer, implementation="mosaic").astype(jnp.float32).sum()


def main() -> None:
    for case in (lambda: flash(False), lambda: flash(True), paged):
        total = jax.jit(case)()
        if not jnp.isfinite(total):
            raise SystemExit(f"expected a finite sum, got {total}")
    print("all ran")


if __name__ == "__main__":
    main()

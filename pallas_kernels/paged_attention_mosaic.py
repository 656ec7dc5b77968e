"""PagedAttention on Hopper GPUs: decodes and prefills of one step, each sent to its kernel."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from . import paged_decode
from .kv_cache import KVCache
from .paged_batch import PagedBatch
from .paged_decode import DecodeConfig
from .paged_merge import merge


def unsupported(query: Array, cache: KVCache, batch: PagedBatch) -> str | None:
    """Why these kernels cannot serve the call, or None."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"its kernels are for bfloat16 and float16, and the cache is {query.dtype}"
    K, H = cache.num_kv_heads, cache.head_dim
    if batch.max_query_len > 1:
        return "it only decodes"
    return paged_decode.unsupported(cache.block_size, K, query.shape[1] // K, H)


@partial(jax.jit, static_argnames=("scale", "logits_soft_cap", "window_left", "config"))
def paged_attention_mosaic(
    query: Array,
    cache: KVCache,
    batch: PagedBatch,
    layer: Array,
    *,
    scale: float,
    logits_soft_cap: float | None,
    window_left: int | None,
    config: DecodeConfig | None = None,
) -> Array:
    """See `paged_attention`, which checks the arguments. Jitted, so that a model's layers share one trace."""
    T, N, H = query.shape
    K, block_size = cache.num_kv_heads, cache.block_size
    R = min(T, batch.block_tables.shape[0])
    config = config or paged_decode.default_config(K, N // K, H)
    tables = batch.block_tables[:R] + layer * cache.num_blocks
    lengths = jnp.where(jnp.arange(R) < batch.num_decodes, batch.context_lens[:R], 0)
    items = paged_decode.split(lengths, window_left, tables.shape[1] * block_size, config)
    parts, lse = paged_decode.attend(
        query[:R], cache.keys, cache.values, tables, items, scale=scale, soft_cap=logits_soft_cap, config=config
    )
    out = merge(parts, lse, items.runs, paged_decode.columns_of_heads(N, K), dtype=query.dtype)
    return jnp.pad(out[..., :H], ((0, T - R), (0, 0), (0, 0)))

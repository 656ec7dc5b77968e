"""PagedAttention on Hopper GPUs: decodes and prefills of one step, each sent to its kernel."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from . import paged_decode, paged_decode_config, paged_merge, paged_prefill
from .flash_forward_config import ForwardConfig
from .kv_cache import KVCache
from .paged_batch import PagedBatch, prefix_groups
from .paged_decode_config import DecodeConfig


def unsupported(query: Array, cache: KVCache, batch: PagedBatch, scale: float) -> str | None:
    """Why these kernels cannot serve the call, or None."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"its kernels are for bfloat16 and float16, and the cache is {query.dtype}"
    if scale <= 0.0:
        return f"its kernels take positive scales, not {scale}"
    K, H = cache.num_kv_heads, cache.head_dim
    return paged_decode.unsupported(cache.block_size, K, query.shape[1] // K, H)


@partial(jax.jit, static_argnames=("scale", "logits_soft_cap", "window_left"))
def paged_attention_mosaic(
    query: Array,
    cache: KVCache,
    batch: PagedBatch,
    layer: Array,
    *,
    scale: float,
    logits_soft_cap: float | None,
    window_left: int | None,
) -> Array:
    """See `paged_attention`, which checks the arguments. Jitted, so that a model's layers share one trace."""
    options = Options(scale, logits_soft_cap, window_left)
    T, H = query.shape[0], cache.head_dim
    # All layers' blocks are one array to the kernels.
    tables = batch.block_tables + layer * cache.num_blocks
    decoded = decode(query, cache, batch, tables, options)[..., :H]
    decoded = jnp.pad(decoded, ((0, T - len(decoded)), (0, 0), (0, 0)))
    if batch.max_query_len == 1:
        return decoded
    prefilled = prefill(query, cache, batch, tables, options)[..., :H]
    token = jnp.arange(T)[:, None, None]
    is_prefill = (token >= batch.num_decodes) & (token < batch.query_starts[-1])
    return jnp.where(is_prefill, prefilled, decoded)


class Options(NamedTuple):
    """What is static about one call."""

    scale: float
    logits_soft_cap: float | None
    window_left: int | None


def decode(
    query: Array,
    cache: KVCache,
    batch: PagedBatch,
    tables: Array,
    options: Options,
    config: DecodeConfig | None = None,
    shared_config: DecodeConfig | None = None,
) -> Array:
    """The output of the first rows, which are the decodes'; zeros in those that are not. The head dim is padded.

    Prefixes that they share go first, several sequences an item. With a window they do not: it differs between them,
    and leaves little of a prefix.
    """
    T, N, H = query.shape
    K, R = cache.num_kv_heads, min(T, len(tables))
    config = config or paged_decode_config.default_config(K, N // K, H)
    max_tokens = tables.shape[1] * cache.block_size
    attend = partial(
        paged_decode.attend,
        query[:R],
        cache.keys,
        cache.values,
        tables,
        scale=options.scale,
        soft_cap=options.logits_soft_cap,
    )
    lengths = jnp.where(jnp.arange(R) < batch.num_decodes, batch.context_lens[:R], 0)
    low, sources = jnp.zeros_like(lengths), []
    if options.window_left is not None:
        low = jnp.maximum(lengths - 1 - options.window_left, 0)
    elif (groups := prefix_groups(batch, R)) is not None:
        members = paged_decode.MAX_COLUMNS // (N // K)
        shared_config = shared_config or paged_decode_config.default_config(K, members * (N // K), H)
        row = jnp.arange(R, dtype=jnp.int32)
        place = (row - groups.starts) % members
        items = paged_decode.split(
            low, groups.lens, max_tokens, shared_config, place, jnp.minimum(groups.stops - row, members)
        )
        parts = attend(items, config=shared_config, members=members)
        sources.append(paged_merge.Parts(*parts, items.runs, paged_decode.columns_of_heads(N, K, members)))
        low = groups.lens
    items = paged_decode.split(low, lengths, max_tokens, config)
    if items.single and not sources:  # nothing to merge
        return attend(items, config=config, dtype=query.dtype)[0][:, :N]
    parts = attend(items, config=config)
    sources.append(paged_merge.Parts(*parts, items.runs, paged_decode.columns_of_heads(N, K)))
    return paged_merge.merge(sources, group=N // K, dtype=query.dtype)


def prefill(
    query: Array,
    cache: KVCache,
    batch: PagedBatch,
    tables: Array,
    options: Options,
    config: ForwardConfig | None = None,
) -> Array:
    """The output of the tokens of all sequences after the decodes; anything in other rows. The head dim is padded."""
    config = config or paged_prefill.default_config(cache.head_dim)
    tile = config.rows * config.warpgroups
    items = paged_prefill.split(batch.context_lens, batch.query_starts, batch.num_decodes, len(query), tile)
    return paged_prefill.attend(
        query,
        cache.keys,
        cache.values,
        tables,
        items,
        scale=options.scale,
        soft_cap=options.logits_soft_cap,
        window_left=options.window_left,
        config=config,
    )

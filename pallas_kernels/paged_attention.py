"""Attention of a step's new tokens over the KV cache, read through block tables: the operation and its plain form."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .arguments import check_implementation, check_soft_cap, window_sides
from .devices import lacks_mosaic, lacks_own_shard
from .kv_cache import KVCache, check_layer
from .paged_attention_xla import paged_attention_xla
from .paged_batch import PagedBatch

Implementation = Literal["mosaic", "xla", "reference"]


def paged_attention(
    query: Float[Array, "T N H"],
    cache: KVCache,
    batch: PagedBatch,
    layer: int | Int32[Array, ""],
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "T N H"]:
    """PagedAttention (arXiv 2309.06180, eq. 4): causal attention of packed new tokens over paged keys and values.

    Any mix of decodes and (chunked) prefills: the last new token of a sequence stands at position
    `context_lens - 1` and sees its whole context, the one before it one token less, and so on. The keys and
    values of the new tokens themselves must have been written (`write_kv`) before. Where the cache is sharded over
    its kv heads, call this inside `jax.shard_map` (`kv_head_sharding`); outside of it, XLA serves.

    Prefixes that decodes share (`PagedBatch.shared_prefix_lens`) are read once for a group of them, by "xla" and by
    "mosaic" (there for as many sequences as have 32 query heads a kv head together), and added to the rest by their
    log-sum-exp. With a window, "mosaic" reads each sequence's blocks for itself, as "reference" always does.

    Args:
      query: T packed tokens, N query heads of dimension H; N is a multiple of the cache's kv heads.
      cache, batch: the blocks, and the tables that say whose they are.
      layer: which layer of the cache.
      scale: factor of the logits; None means 1 / sqrt(H).
      logits_soft_cap: logits become cap * tanh(logits / cap), before masking.
      local_window_size: (left, right) or both at once: a token sees at most `left` tokens before itself. What
        lies to the right is masked by causality in any case.
      implementation: "mosaic" is for Hopper GPUs; "xla" works through tiles with an online softmax, at a cost that
        follows the contexts' lengths; "reference" is the plain formula in float32. None takes the first that can.

    Returns the attention's output in the query's dtype; tokens past the last sequence give zeros.

    Raises ValueError for shapes, dtypes or options that do not fit together, and NotImplementedError where "mosaic" is
    asked for and cannot serve.

    >>> cache = KVCache.create(num_layers=1, num_blocks=4, block_size=2, num_kv_heads=1, head_dim=8)
    >>> batch = PagedBatch(block_tables=jnp.array([[3, 1]], jnp.int32), context_lens=jnp.array([3], jnp.int32),
    ...     query_starts=jnp.array([0, 3], jnp.int32), slot_mapping=jnp.array([6, 7, 2], jnp.int32),
    ...     num_decodes=jnp.int32(0), max_query_len=3)
    >>> cache = write_kv(cache, batch, 0, jnp.ones((3, 1, 8)), jnp.ones((3, 1, 8)))
    >>> paged_attention(jnp.ones((3, 2, 8)), cache, batch, 0).shape
    (3, 2, 8)
    """
    _check(query, cache, batch, layer)
    check_soft_cap("paged_attention", logits_soft_cap)
    check_implementation("paged_attention", implementation)
    window = window_sides("paged_attention", local_window_size)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    return _backend(query, cache, batch, scale, implementation)(
        query,
        cache,
        batch,
        jnp.asarray(layer, jnp.int32),
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        window_left=None if window is None else window[0],
    )


def _backend(
    query: Array, cache: KVCache, batch: PagedBatch, scale: float, name: Implementation | None
) -> Callable[..., Array]:
    if name == "reference":
        return _reference
    if name == "xla":
        return paged_attention_xla
    reason = lacks_mosaic() or lacks_own_shard(cache.keys)
    if reason is None:
        # Imported at first use: only a GPU needs Mosaic, and loading it takes a while.
        from . import paged_attention_mosaic as mosaic

        reason = mosaic.unsupported(query, cache, batch, scale)
        if reason is None:
            return mosaic.paged_attention_mosaic
    if name == "mosaic":
        raise NotImplementedError(f"paged_attention: mosaic cannot serve: {reason}")
    return paged_attention_xla


def _check(query: Array, cache: KVCache, batch: PagedBatch, layer: int | Array) -> None:
    tokens = batch.slot_mapping.shape[0]
    _check_batch(batch)
    if query.ndim != 3 or query.shape[0] != tokens or query.shape[2] != cache.head_dim:
        raise ValueError(
            "paged_attention: query must be [tokens, q_heads, head_dim] = "
            f"({tokens}, q_heads, {cache.head_dim}), got {query.shape}"
        )
    if query.shape[1] % cache.num_kv_heads:
        raise ValueError(
            f"paged_attention: query heads must be a multiple of the cache's {cache.num_kv_heads} kv heads, "
            f"got {query.shape[1]}"
        )
    if query.dtype != cache.keys.dtype:
        raise ValueError(f"paged_attention: query must have the cache's dtype {cache.keys.dtype}, got {query.dtype}")
    check_layer("paged_attention", cache, layer)


def _check_batch(batch: PagedBatch) -> None:
    """Raises ValueError where the tables, lengths and starts are not of the same number of sequences."""
    sizes = (*batch.block_tables.shape[:1], *batch.context_lens.shape, batch.query_starts.size - 1)
    R = max(sizes, key=sizes.count)
    for name, shape, expected in (
        ("block_tables", batch.block_tables.shape, (R, *batch.block_tables.shape[1:2])),
        ("context_lens", batch.context_lens.shape, (R,)),
        ("query_starts", batch.query_starts.shape, (R + 1,)),
        ("shared_prefix_lens", getattr(batch.shared_prefix_lens, "shape", (R,)), (R,)),
    ):
        if shape != expected or (name == "block_tables" and len(shape) != 2):
            wanted = f"[{R}, max_blocks]" if name == "block_tables" else expected
            raise ValueError(f"paged_attention: batch.{name} must be {wanted} for {R} sequences, got {shape}")


@partial(jax.jit, static_argnames=("scale", "logits_soft_cap", "window_left"))
def _reference(
    query: Array,
    cache: KVCache,
    batch: PagedBatch,
    layer: Array,
    *,
    scale: float,
    logits_soft_cap: float | None,
    window_left: int | None,
) -> Array:
    """Every token against the whole table of its sequence, S = max_blocks * block_size keys, in float32."""
    T, N, H = query.shape
    K = cache.num_kv_heads
    token = jnp.arange(T)
    row = jnp.searchsorted(batch.query_starts[1:], token, side="right")  # of each token; R for padding
    is_real = token < batch.query_starts[-1]
    row = jnp.where(is_real, row, 0)
    position = batch.context_lens[row] - batch.query_starts[row + 1] + token

    def gather(pages: Array) -> Array:
        pages = pages[layer, batch.block_tables[row]].astype(jnp.float32)
        return pages.reshape(T, -1, K, H)

    key, value = gather(cache.keys), gather(cache.values)
    key_position = jnp.arange(key.shape[1])
    visible = is_real[:, None] & (key_position[None] <= position[:, None])
    if window_left is not None:
        visible &= key_position[None] >= position[:, None] - window_left
    visible = visible[:, None, None]  # [T, 1, 1, S]
    logits = jnp.einsum("tkgh,tskh->tkgs", query.astype(jnp.float32).reshape(T, K, N // K, H), key) * scale
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    probs = jax.nn.softmax(logits, axis=-1, where=visible)
    # What nobody owns may hold anything, NaN too: 0 * NaN must not reach the sum.
    value = jnp.where(visible[:, 0, 0, :, None, None], value, 0.0)
    out = jnp.einsum("tkgs,tskh->tkgh", probs, value).reshape(T, N, H)
    return jnp.where(is_real[:, None, None], out, 0.0).astype(query.dtype)

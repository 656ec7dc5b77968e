"""PagedAttention in plain XLA operations: tiles with an online softmax, at a cost that follows the real lengths."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .kv_cache import KVCache
from .online_softmax import LEAST
from .paged_batch import PagedBatch, PrefixGroups, prefix_groups

KV_TILE = 128  # tokens; rounded up to whole blocks
QUERY_TILE = 64  # tokens of a prefill
DECODE_ITEMS = 8  # (sequence, tile) pairs a turn
SHARING = 8  # sequences a turn over the tile of a prefix that they share


class Options(NamedTuple):
    """What is static about one call."""

    scale: float
    logits_soft_cap: float | None
    window_left: int | None
    tile: int


@partial(jax.jit, static_argnames=("scale", "logits_soft_cap", "window_left"))
def paged_attention_xla(
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
    tile = -(-KV_TILE // cache.block_size) * cache.block_size
    options = Options(scale, logits_soft_cap, window_left, tile)
    # A tile may reach past the end of the table: widen that by whole tiles, any block will do.
    pages_per_tile = tile // cache.block_size
    tables = jnp.pad(batch.block_tables, ((0, 0), (0, -batch.block_tables.shape[1] % pages_per_tile)))
    out = _decode(query, cache, batch, tables, layer, options)
    if batch.max_query_len > 1:
        out = _prefill(query, cache, batch, tables, layer, options, out)
    return out


def _decode(query: Array, cache: KVCache, batch: PagedBatch, tables: Array, layer: Array, options: Options) -> Array:
    """The decodes' output; zeros elsewhere.

    A worklist of (sequence, tile) items in order, several a turn, as many turns as there are items. A turn's
    partial results are folded one after the other into a running softmax that starts anew at each sequence's
    first tile: what a sequence adds up, and in which order, never depends on its neighbours. Where the sequence
    shares a prefix, it starts from the prefix's softmax, and the first tile is that of the prefix's end.
    """
    T, N, H = query.shape
    R, K, tile = min(T, tables.shape[0]), cache.num_kv_heads, options.tile
    items_a_turn = min(DECODE_ITEMS, max(R, 2))
    # One matmul serves all kv heads: query head n holds its vector in the columns of its own kv head and
    # zeros in the others', so that pages are used as they lie, rows of K * H, without a transpose.
    wide = query[:R].reshape(R, K, N // K, 1, H) * jnp.eye(K, dtype=query.dtype).reshape(1, K, 1, K, 1)
    wide = wide.reshape(R, N, K * H)

    lens = jnp.where(jnp.arange(R) < batch.num_decodes, batch.context_lens[:R], 0)
    low = jnp.zeros_like(lens)  # the first token that is visible, and is no part of a shared prefix
    if options.window_left is not None:
        low = jnp.maximum(lens - 1 - options.window_left, 0)
    start = (jnp.full((R, N), LEAST), jnp.zeros((R, N)), jnp.zeros((R, N, H)))
    if (groups := prefix_groups(batch, R)) is not None:
        start = _shared(query[:R], cache, groups, low, tables, layer, options, start)
        low = jnp.maximum(low, groups.lens)
    first_tile = low // tile
    ends = jnp.cumsum(-(-lens // tile) - first_tile)  # of each sequence's items in the worklist
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])

    def turn(state: tuple) -> tuple:
        item, softmax, out = state
        items = item + jnp.arange(items_a_turn)
        is_real = items < ends[-1]
        row = jnp.searchsorted(ends, items, side="right", method="compare_all")
        row = jnp.where(is_real, row, 0)
        t = jnp.where(is_real, items - starts[row] + first_tile[row], 0)
        key, value = _load_tile(cache, layer, tables, row, t, tile)
        position = (t * tile)[:, None] + jnp.arange(tile)[None]
        visible = (position >= low[row][:, None]) & (position < lens[row][:, None])
        logits = jnp.einsum(
            "inc,itc->int", wide[row], key.reshape(*key.shape[:2], -1), preferred_element_type=jnp.float32
        )
        logits = _mask(logits, visible[:, None], options)
        m = jnp.maximum(logits.max(-1), LEAST)
        p = jnp.exp(logits - m[..., None])
        value = jnp.where(visible[..., None, None], value, 0).reshape(*value.shape[:2], -1)
        acc = jnp.einsum("int,itc->inc", p.astype(value.dtype), value, preferred_element_type=jnp.float32)
        acc = acc.reshape(-1, K, N // K, K, H)
        acc = jnp.stack([acc[:, k, :, k] for k in range(K)], axis=1).reshape(-1, N, H)
        partials = (m, p.sum(-1), acc)
        begun = jax.tree.map(lambda x: x[row], start)
        softmax, merged = lax.scan(_fold, softmax, (partials, begun, items == starts[row]))
        finished = jnp.where(is_real & (items == ends[row] - 1), row, T)
        return item + items_a_turn, softmax, out.at[finished].set(merged.astype(out.dtype), mode="drop")

    state = (jnp.int32(0), jax.tree.map(lambda x: x[0], start), jnp.zeros_like(query))
    return lax.while_loop(lambda state: state[0] < ends[-1], turn, state)[2]


def _shared(
    query: Array,
    cache: KVCache,
    groups: PrefixGroups,
    low: Array,
    tables: Array,
    layer: Array,
    options: Options,
    start: tuple,
) -> tuple:
    """The running softmax of each sequence after its shared prefix, from `low` on; `start` where it shares none.

    A tile is loaded once for a group, and its sequences take their turns with it.
    """
    R, N, H = query.shape
    K, tile = cache.num_kv_heads, options.tile
    leads = (groups.lens > 0) & (groups.starts == jnp.arange(R))
    (leaders,) = jnp.nonzero(leads, size=R, fill_value=0)
    # The last turn of a group may reach past the last sequence.
    query, low, softmax = jax.tree.map(
        lambda x: jnp.pad(x, [(0, SHARING)] + [(0, 0)] * (x.ndim - 1)), (query, low, start)
    )

    def add(softmax: tuple, row: Array, stop: Array, key: Array, value: Array, position: Array, length: Array) -> tuple:
        """One more tile into the running softmax of the rows from `row` on, but not from `stop` on."""
        q, first, *mine = (lax.dynamic_slice_in_dim(x, row, SHARING) for x in (query, low, *softmax))
        m, total, acc = mine
        q = q.reshape(SHARING, K, N // K, H)
        logits = jnp.einsum("rkgh,tkh->rkgt", q, key, preferred_element_type=jnp.float32).reshape(SHARING, N, tile)
        visible = (position >= first[:, None]) & (position < length)
        logits = _mask(logits, visible[:, None], options)
        m_new = jnp.maximum(m, logits.max(-1))
        alpha, p = jnp.exp(m - m_new), jnp.exp(logits - m_new[..., None])
        weights = p.astype(value.dtype).reshape(SHARING, K, N // K, tile)
        pv = jnp.einsum("rkgt,tkh->rkgh", weights, value, preferred_element_type=jnp.float32).reshape(acc.shape)
        new = (m_new, total * alpha + p.sum(-1), acc * alpha[..., None] + pv)
        member = row + jnp.arange(SHARING) < stop
        kept = (jnp.where(jnp.expand_dims(member, range(1, x.ndim)), x, old) for x, old in zip(new, mine, strict=True))
        return tuple(lax.dynamic_update_slice_in_dim(x, y, row, 0) for x, y in zip(softmax, kept, strict=True))

    def group(index: Array, softmax: tuple) -> tuple:
        first = leaders[index]
        stop, length = groups.stops[first], groups.lens[first]
        row = jnp.arange(R + SHARING)
        least = jnp.where((row >= first) & (row < stop), low, length).min()  # what anybody sees

        def step(t: Array, softmax: tuple) -> tuple:
            key, value = _load_tile(cache, layer, tables, first[None], t[None], tile)
            position = (t * tile + jnp.arange(tile))[None]
            seen = (position[0] >= least) & (position[0] < length)
            value = jnp.where(seen[:, None, None], value[0], 0)

            def turn(turn: Array, softmax: tuple) -> tuple:
                return add(softmax, first + turn * SHARING, stop, key[0], value, position, length)

            return lax.fori_loop(0, -(-(stop - first) // SHARING), turn, softmax)

        return lax.fori_loop(least // tile, -(-length // tile), step, softmax)

    softmax = lax.fori_loop(0, leads.sum(), group, softmax)
    return jax.tree.map(lambda x: x[:R], softmax)


def _fold(softmax: tuple, item: tuple) -> tuple:
    """One more tile into the running (maximum, sum, output) of Algorithm 1, arXiv 2205.14135."""
    (m_tile, total_tile, acc_tile), begun, is_first = item
    m, total, acc = jax.tree.map(partial(jnp.where, is_first), begun, softmax)
    m_new = jnp.maximum(m, m_tile)
    alpha, beta = jnp.exp(m - m_new), jnp.exp(m_tile - m_new)
    total = total * alpha + total_tile * beta
    acc = acc * alpha[:, None] + acc_tile * beta[:, None]
    return (m_new, total, acc), acc / jnp.where(total > 0, total, 1.0)[:, None]


def _prefill(
    query: Array,
    cache: KVCache,
    batch: PagedBatch,
    tables: Array,
    layer: Array,
    options: Options,
    out: Array,
) -> Array:
    """`out` with the rows of all sequences after the decodes filled in, a tile of queries at a time."""
    T, N, H = query.shape
    K, G = cache.num_kv_heads, N // cache.num_kv_heads
    R, tile = tables.shape[0], options.tile
    query_tile = min(QUERY_TILE, batch.max_query_len)
    query_lens = jnp.where(jnp.arange(R) >= batch.num_decodes, jnp.diff(batch.query_starts), 0)
    ends = jnp.cumsum(-(-query_lens // query_tile))
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])

    def attend(item: Array, out: Array) -> Array:
        row = jnp.searchsorted(ends, item, side="right", method="compare_all")
        offset = (item - starts[row]) * query_tile + jnp.arange(query_tile)
        token = jnp.where(offset < query_lens[row], batch.query_starts[row] + offset, T)  # T: none
        first_position = batch.context_lens[row] - query_lens[row]
        position = first_position + offset
        last_position = jnp.minimum(position[-1], batch.context_lens[row] - 1)
        q = query.at[token].get(mode="fill", fill_value=0).reshape(query_tile, K, G, H)
        q = q.transpose(1, 2, 0, 3).reshape(K, G * query_tile, H)

        def step(t: Array, softmax: tuple) -> tuple:
            m, total, acc = softmax
            key, value = _load_tile(cache, layer, tables, row[None], t[None], tile)
            key_position = t * tile + jnp.arange(tile)
            visible = key_position[None] <= position[:, None]
            if options.window_left is not None:
                visible &= key_position[None] >= position[:, None] - options.window_left
            logits = jnp.einsum("kqh,tkh->kqt", q, key[0], preferred_element_type=jnp.float32)
            logits = _mask(logits, jnp.tile(visible, (G, 1)), options)
            m_new = jnp.maximum(m, logits.max(-1))
            alpha, p = jnp.exp(m - m_new), jnp.exp(logits - m_new[..., None])
            value = jnp.where((key_position <= last_position)[:, None, None], value[0], 0)
            pv = jnp.einsum("kqt,tkh->kqh", p.astype(value.dtype), value, preferred_element_type=jnp.float32)
            return m_new, total * alpha + p.sum(-1), acc * alpha[..., None] + pv

        rows = (K, G * query_tile)
        softmax = (jnp.full(rows, LEAST), jnp.zeros(rows), jnp.zeros((*rows, H)))
        first = 0
        if options.window_left is not None:
            first = jnp.maximum(position[0] - options.window_left, 0) // tile
        _, total, acc = lax.fori_loop(first, last_position // tile + 1, step, softmax)
        acc = acc / jnp.where(total > 0, total, 1.0)[..., None]
        acc = acc.reshape(K, G, query_tile, H).transpose(2, 0, 1, 3).reshape(query_tile, N, H)
        return out.at[token].set(acc.astype(out.dtype), mode="drop")

    return lax.fori_loop(0, ends[-1], attend, out)


def _load_tile(cache: KVCache, layer: Array, tables: Array, row: Array, t: Array, tile: int) -> tuple[Array, Array]:
    """Tile t[i] of sequence row[i]: keys and values [items, tile, K, H], through the block table."""
    pages_per_tile = tile // cache.block_size
    pages = tables[row[:, None], (t * pages_per_tile)[:, None] + jnp.arange(pages_per_tile)[None]]
    shape = (-1, tile, cache.num_kv_heads, cache.head_dim)
    return cache.keys[layer, pages].reshape(shape), cache.values[layer, pages].reshape(shape)


def _mask(logits: Array, visible: Array, options: Options) -> Array:
    logits = logits * options.scale
    if options.logits_soft_cap is not None:
        logits = options.logits_soft_cap * jnp.tanh(logits / options.logits_soft_cap)
    return jnp.where(visible, logits, -jnp.inf)

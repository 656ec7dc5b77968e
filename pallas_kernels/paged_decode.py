"""Paged decode on Hopper GPUs: one new token of each sequence against its cached keys and values, at memory's speed.

The work is a list of items, a run of tokens of one sequence each, worked off by as many thread blocks as the GPU's
multiprocessors hold at once. In a block one warpgroup loads pages by TMA through the block table, into rings that
stay full from one item to the next; the other computes. It works on S^T = K Q^T and O^T = V^T P^T, so that the tensor
cores' 64 rows are tokens and the queries of a kv head are the 8 to 64 columns: no row is wasted on padding, and the
softmax has little to do. Each item leaves its output and log-sum-exp in float32, which `paged_merge` adds up; where no
sequence can have two items, it leaves the output itself.

How a sequence is cut depends on its own length and on static sizes alone, and each part is computed and added up in
the same order whatever else the batch holds: so are its bits.

Where sequences share a prefix, an item of it has the queries of several of them as its columns, and leaves a part for
each; that is a launch of its own, before that of what they have for themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from .mosaic_common import (
    PANEL,
    WGMMA,
    Ref,
    Scalar,
    broadcast,
    drain,
    load_tile,
    positions,
    slot,
    store_untiled,
    tile_memory,
    tile_views,
)
from .online_softmax import LEAST, LOG2E
from .paged_decode_config import MAX_COLUMNS, REDUCTION_BYTES, TILE, DecodeConfig, padded_columns
from .paged_merge import whole_segments
from .paged_tiles import PageTiles, padded, row_tiles


def unsupported(block_size: int, num_kv_heads: int, group: int, head_dim: int) -> str | None:
    """Why the kernel cannot take these sizes, or None."""
    if block_size % 8:
        return f"its block sizes are multiples of 8, got {block_size}"
    if head_dim > 256:
        return f"its head dims are at most 256, got {head_dim}"
    if num_kv_heads * head_dim % 8:
        return f"a token's keys must be a multiple of 16 bytes, got {num_kv_heads} kv heads of head dim {head_dim}"
    if group > MAX_COLUMNS:
        return f"it takes at most {MAX_COLUMNS} query heads a kv head, got {group}"
    return None


def columns_of_heads(query_heads: int, kv_heads: int, members: int = 1) -> Int32[Array, " N"]:
    """The column of each query head of an item's first sequence among the padded ones of all kv heads."""
    group = query_heads // kv_heads
    head = jnp.arange(query_heads, dtype=jnp.int32)
    return head // group * padded_columns(members * group) + head % group


class Items(NamedTuple):
    """The work: `total` items, in order of the sequences, and of each sequence its parts."""

    fields: Int32[Array, "items 7"]
    """Sequence, first token (a multiple of TILE), end, the first token that is visible, the part that the item leaves,
    and for how many sequences from this one on, how many parts apart."""
    total: Int32[Array, "1"]
    runs: Int32[Array, "R 3"]
    """The first part, how many, and how many sequences before this one are in its items."""

    @property
    def single(self) -> bool:
        """Whether, unless they share any, each sequence has the part of its own number alone: none can be longer."""
        return len(self.fields) == len(self.runs)


def split(
    low: Int32[Array, " R"],
    stop: Int32[Array, " R"],
    max_tokens: int,
    config: DecodeConfig,
    place: Int32[Array, " R"] | None = None,
    members: Int32[Array, " R"] | None = None,
) -> Items:
    """Cuts the tokens low <= t < stop of each sequence into items; max_tokens: none has more.

    No tokens give no item, but an empty one where each sequence has a single one.

    Where sequences share items, `place` counts those before each one in its items, and `members` all in them.
    """
    alone = place is None
    place = jnp.zeros_like(low) if place is None else place
    members = jnp.ones_like(low) if members is None else members
    first = low // TILE * TILE
    visible = stop - first
    most = 1 if max_tokens <= config.whole else min(config.splits, -(-max_tokens // config.chunk))
    counts = jnp.where(visible <= config.whole, 1, jnp.clip(-(-visible // config.chunk), 1, most))
    size = jnp.maximum(-(-visible // (counts * TILE)), 1) * TILE  # alike, so that blocks have alike to do
    if most > 1 or not alone:
        counts = -(-visible // size)
    parts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    own = jnp.where(place == 0, counts, 0)
    ends = jnp.cumsum(own, dtype=jnp.int32)
    item = jnp.arange(low.shape[0] * most, dtype=jnp.int32)
    row = jnp.searchsorted(ends, item, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, low.shape[0] - 1)
    nth = item - (ends - own)[row]
    start = first[row] + nth * size[row]
    fields = (
        row,
        start,
        jnp.minimum(start + size[row], stop[row]),
        low[row],
        parts[row] + nth,
        members[row],
        counts[row],
    )
    return Items(jnp.stack(fields, -1), ends[-1:], jnp.stack([parts, counts, place], -1))


def attend(
    query: Float[Array, "R N H"],
    keys: Float[Array, "L P block_size K H"],
    values: Float[Array, "L P block_size K H"],
    tables: Int32[Array, "R max_blocks"],
    items: Items,
    *,
    scale: float,
    soft_cap: float | None,
    config: DecodeConfig,
    members: int = 1,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "parts heads padded"], Float[Array, "parts columns"]]:
    """Output and log2-sum-exp2 of each part; entries of parts that do not exist are left as they were.

    tables: blocks of `keys` and `values`, those of all layers counted on. members: sequences of an item at most. The
    output's head dim is padded, its heads are those of `whole_segments`, and the log-sum-exp, always float32, has the
    padded columns of all heads (`columns_of_heads`).
    """
    R, N, H = query.shape
    block_size, K = keys.shape[2:4]
    query = jnp.pad(query, ((0, 0), (0, 0), (0, padded(H) - H)))
    if members > 1:  # the queries of neighbouring sequences and the same kv head side by side
        query = query.reshape(R, K, N // K, -1).swapaxes(0, 1).reshape(K, R * N // K, -1)
    launch = _Launch(members, N // K, H, block_size, K // config.heads, scale, soft_cap, config)

    def paged_decode(*refs):
        block = _Block(launch, *refs)
        pl.when(lax.axis_index("warpgroup") == 0)(block.compute)
        pl.when(lax.axis_index("warpgroup") == 1)(block.load)

    out, lse = plgpu.kernel(
        paged_decode,
        out_type=[
            jax.ShapeDtypeStruct((len(items.fields), whole_segments(N, padded(H)), padded(H)), dtype),
            jax.ShapeDtypeStruct((len(items.fields), launch.groups * launch.columns), jnp.float32),
        ],
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[launch.memory(query.dtype, dtype)],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=REDUCTION_BYTES),
    )(query, launch.pages.cut(keys), launch.pages.cut(values), tables, items.fields, items.total)
    return out, lse


@dataclass(frozen=True)
class _Launch:
    """What is static about one launch."""

    members: int  # sequences of an item
    group: int  # query heads a kv head
    head_dim: int
    block_size: int
    groups: int  # of kv heads
    scale: float
    soft_cap: float | None
    config: DecodeConfig

    @property
    def head_columns(self) -> int:
        """Queries of an item and one of its kv heads, padded."""
        return padded_columns(self.members * self.group)

    @property
    def columns(self) -> int:
        """Queries of an item, padded."""
        return self.config.heads * self.head_columns

    @property
    def pages(self) -> PageTiles:
        """The rings of keys and of values."""
        return PageTiles(TILE, self.config.stages, self.block_size, self.config.heads, self.head_dim)

    def memory(self, dtype: jnp.dtype, out_dtype: DTypeLike) -> dict[str, Any]:
        """The shared memory of a block."""
        pages = self.pages
        full = plgpu.Barrier(num_arrivals=pages.copies, num_barriers=pages.stages)
        free = plgpu.Barrier(num_barriers=pages.stages)
        return {
            "queries": tile_memory(pages.heads, pages.head_panels, self.head_columns, PANEL, dtype=dtype),
            "keys": pages.memory(dtype),
            "values": pages.memory(dtype),
            "weights": row_tiles(self.columns, TILE, dtype=dtype),
            "out": plgpu.SMEM((self.columns, padded(self.head_dim)), out_dtype),
            "lse": plgpu.SMEM((self.columns,), jnp.float32),
            "queries_full": plgpu.Barrier(num_arrivals=pages.panels),
            "keys_full": full,
            "values_full": full,
            "keys_free": free,
            "values_free": free,
        }


class _Item(NamedTuple):
    """One item, as the kernel reads it."""

    heads: Scalar  # which group of kv heads
    sequence: Scalar
    start: Scalar
    stop: Scalar
    low: Scalar
    part: Scalar
    members: Scalar
    stride: Scalar

    @property
    def steps(self) -> Scalar:
        return lax.div(self.stop - self.start + (TILE - 1), jnp.int32(TILE))


class _Block:
    """What one thread block does, in the kernel."""

    def __init__(self, launch, queries, keys, values, tables, fields, count, out, lse, memory):
        self.launch, self.config, self.memory = launch, launch.config, memory
        self.queries, self.keys, self.values, self.tables = queries, keys, values, tables
        self.fields, self.out, self.lse = fields, out, lse
        self.block = lax.axis_index("block")
        self.count = lax.div(
            count[0] * launch.groups - self.block + (self.config.blocks - 1), jnp.int32(self.config.blocks)
        )

    def each_item(self, body: Callable[[_Item, Scalar], None]) -> Scalar:
        """Runs body(item, steps done before) for the block's items; returns the steps of all."""

        def one(index, done):
            number = self.block + index * self.config.blocks
            place = lax.div(number, jnp.int32(self.launch.groups))
            heads = lax.rem(number, jnp.int32(self.launch.groups))
            item = _Item(heads, *(self.fields[place, i] for i in range(7)))
            body(item, done)
            return done + item.steps

        return lax.fori_loop(0, self.count, one, jnp.int32(0))

    def load(self) -> None:
        """The warpgroup that fills the rings."""
        done = self.each_item(self.load_item)
        drain(done, self.config.stages, self.memory["keys_free"])
        drain(done, self.config.stages, self.memory["values_free"])

    def load_item(self, item: _Item, done: Scalar) -> None:
        pages, memory = self.launch.pages, self.memory

        @pl.loop(0, item.steps)
        def _(step):
            at, first = slot(done + step, pages.stages), item.start + step * TILE
            # Read before the wait for a free slot, which hides how long it takes.
            pieces = list(pages.pieces(self.tables, item.sequence, first, item.stop))
            for source, name in ((self.keys, "keys"), (self.values, "values")):
                full, free = memory[f"{name}_full"].at[at], memory[f"{name}_free"].at[at]
                pl.when(done + step >= pages.stages)(partial(plgpu.barrier_wait, free))
                pages.load(source, pieces, item.heads, memory[name], at, full, first, item.low, item.stop)

    def compute(self) -> None:
        """The warpgroup that computes."""
        self.each_item(self.compute_item)
        plgpu.wait_smem_to_gmem(0)

    def compute_item(self, item: _Item, done: Scalar) -> None:
        launch, memory = self.launch, self.memory
        heads, columns, panels = self.config.heads, launch.columns, launch.pages.head_panels
        query_tma, _ = tile_views(memory["queries"])
        first_head = item.heads * heads
        for head in range(heads):
            outer, inner = item.sequence, first_head + head
            if launch.members > 1:
                outer, inner = inner, outer
            place = (outer, pl.ds(inner * launch.group, launch.head_columns))
            load_tile(self.queries, place, query_tma.at[head], memory["queries_full"])
        plgpu.barrier_wait(memory["queries_full"])

        state = (
            plgpu.layout_cast(jnp.full((columns,), LEAST, jnp.float32), WGMMA.reduce(0)),
            plgpu.layout_cast(jnp.zeros((TILE, columns), jnp.float32), WGMMA),
            [plgpu.layout_cast(jnp.zeros((PANEL, columns), jnp.float32), WGMMA)] * panels,
        )
        m, sums, out = lax.fori_loop(0, item.steps, lambda step, state: self.step(item, step, done, *state), state)
        total = sums.sum(axis=0)
        safe = jnp.where(total > 0, total, 1.0)
        plgpu.wait_smem_to_gmem(0)  # what the item before left has been read
        for panel in range(panels):
            scaled = out[panel] * broadcast(1 / safe, out[panel].shape, 1)
            target = memory["out"].at[:, pl.ds(panel * PANEL, PANEL)].transpose((1, 0))
            store_untiled(target, plgpu.layout_cast(scaled.astype(self.out.dtype), plgpu.Layout.WGMMA_TRANSPOSED))
        memory["lse"][...] = jnp.where(total > 0, m + jnp.log2(safe), -jnp.inf)
        plgpu.commit_smem()
        if launch.members == 1:
            self.store(item, 0)
        else:
            pl.loop(0, item.members)(partial(self.store, item))

    def store(self, item: _Item, member: Scalar) -> None:
        """Starts the copies of one sequence's output and of all columns' log-sum-exp to its part."""
        launch, part = self.launch, item.part + member * item.stride
        for head in range(self.config.heads):
            own = self.memory["out"].at[pl.ds(head * launch.head_columns + member * launch.group, launch.group)]
            place = pl.ds((item.heads * self.config.heads + head) * launch.group, launch.group)
            plgpu.copy_smem_to_gmem(own, self.out.at[part, place])
        place = pl.ds(item.heads * launch.columns, launch.columns)
        plgpu.copy_smem_to_gmem(self.memory["lse"], self.lse.at[part, place])

    def step(self, item: _Item, step: Scalar, done: Scalar, m: Array, sums: Array, out: list[Array]) -> tuple:
        """One tile of keys and values into the running softmax (algorithm 1 of arXiv 2205.14135), by columns."""
        launch, memory, dtype = self.launch, self.memory, self.queries.dtype
        at = lax.optimization_barrier(slot(done + step, self.config.stages))
        first = item.start + step * TILE
        low, high = item.low - first, item.stop - first  # the visible tokens of this tile
        hides = (low > 0) | (high < TILE)
        plgpu.barrier_wait(memory["keys_full"].at[at])
        s = pl.run_scoped(lambda acc: self.scores(acc, at), plgpu.ACC((TILE, launch.columns), jnp.float32))
        plgpu.barrier_arrive(memory["keys_free"].at[at])
        factor = launch.scale * LOG2E
        if launch.soft_cap is not None:
            s, factor = jnp.tanh(s * (launch.scale / launch.soft_cap)), launch.soft_cap * LOG2E

        def visible(shape):
            token = positions(shape, 0)
            return (token >= low) & (token < high)

        s = lax.cond(hides, lambda s: jnp.where(visible(s.shape), s, -jnp.inf), lambda s: s, s)
        m_new = jnp.maximum(m, s.max(axis=0) * factor)
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s * factor - broadcast(m_new, s.shape, 1))
        sums = sums * broadcast(alpha, sums.shape, 1) + p
        memory["weights"].transpose((1, 0))[...] = plgpu.layout_cast(p.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.barrier_wait(memory["values_full"].at[at])

        @pl.when(hides)
        def _():
            # Unowned memory may hold NaN, and 0 * NaN is not 0.
            for panel in range(launch.pages.panels):
                tile = launch.pages.panel(memory["values"], at, panel)
                value = tile[...]
                tile[...] = jnp.where(visible(value.shape), value, jnp.zeros_like(value))

        plgpu.commit_smem()
        accumulator = plgpu.ACC((PANEL, launch.columns), jnp.float32)
        for panel, before in enumerate(out):
            added = pl.run_scoped(partial(self.weighted, at, panel), accumulator)
            out[panel] = before * broadcast(alpha, before.shape, 1) + added
        plgpu.barrier_arrive(memory["values_free"].at[at])
        return m_new, sums, out

    def scores(self, product: Ref, at: Scalar) -> Array:
        """K Q^T, a kv head's queries beside the other's."""
        queries = tile_views(self.memory["queries"])[1]
        for head in range(self.config.heads):
            for panel in range(self.launch.pages.head_panels):
                key = self.launch.pages.panel(self.memory["keys"], at, head * self.launch.pages.head_panels + panel)
                plgpu.wgmma(self.of_head(product, head), key, queries.at[head, panel].transpose((1, 0)))
        return product[...]

    def weighted(self, at: Scalar, panel: int, product: Ref) -> Array:
        """A panel of V^T P^T."""
        for head in range(self.config.heads):
            own = pl.ds(head * self.launch.head_columns, self.launch.head_columns)
            value = self.launch.pages.panel(self.memory["values"], at, head * self.launch.pages.head_panels + panel)
            weights = self.memory["weights"].at[own].transpose((1, 0))
            plgpu.wgmma(self.of_head(product, head), value.transpose((1, 0)), weights)
        return product[...]

    def of_head(self, product: Ref, head: int) -> Ref:
        """The columns of a kv head's queries."""
        if self.config.heads == 1:
            return product
        return product.at[:, pl.ds(head * self.launch.head_columns, self.launch.head_columns)]

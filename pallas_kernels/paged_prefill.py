"""Paged prefill on Hopper GPUs: any number of new tokens of any number of sequences, each against its own cached keys
and values and those of the tokens before it.

The work is a list of items, a tile of query rows of one sequence each, so that nothing is padded to the longest. An
item and query head are a thread block, which is flash attention's (`flash_attention_mosaic`): one warpgroup loads, the
others compute, each 64 rows, with the causal diagonal of a sequence where its cached prefix puts it. Tiles of keys and
values come through the block table; what lies past a sequence's end is no part of any product.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from .devices import interpreted
from .flash_forward_config import ForwardConfig
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
    tile_memory,
    tile_views,
)
from .online_softmax import LEAST, LOG2E
from .paged_tiles import PageTiles, padded
from .tiles import TileRange, tile_range
from .tuned_tables import tuned


def default_config(head_dim: int) -> ForwardConfig:
    """Flash attention's fastest."""
    return ForwardConfig(**tuned("flash_forward", padded(head_dim)))


class Items(NamedTuple):
    """The work: `total` tiles of query rows, in order of the sequences."""

    fields: Int32[Array, "items 5"]
    """Sequence, first row in the packed tokens, number of rows, position of the first, and the sequence's length."""
    total: Int32[Array, "1"]


def split(
    context_lens: Int32[Array, " R"],
    query_starts: Int32[Array, " R+1"],
    num_decodes: Int32[Array, ""],
    tokens: int,
    tile: int,
) -> Items:
    """Cuts the sequences after the decodes into tiles of at most `tile` rows."""
    R = len(context_lens)
    lengths = jnp.where(jnp.arange(R) >= num_decodes, jnp.diff(query_starts), 0)
    counts = -(-lengths // tile)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    item = jnp.arange(-(-tokens // tile) + R, dtype=jnp.int32)
    row = jnp.searchsorted(ends, item, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, R - 1)
    offset = (item - (ends - counts)[row]) * tile
    position = context_lens[row] - lengths[row] + offset
    count = jnp.minimum(lengths[row] - offset, tile)
    fields = jnp.stack([row, query_starts[row] + offset, count, position, context_lens[row]], -1)
    return Items(fields, ends[-1:])


def attend(
    query: Float[Array, "T N H"],
    keys: Float[Array, "L P block_size K H"],
    values: Float[Array, "L P block_size K H"],
    tables: Int32[Array, "R max_blocks"],
    items: Items,
    *,
    scale: float,
    soft_cap: float | None,
    window_left: int | None,
    config: ForwardConfig,
) -> Float[Array, "T N padded"]:
    """The output of the items' tokens; other rows are left as they were. Its head dim is padded.

    tables: blocks of `keys` and `values`, those of all layers counted on.
    """
    T, N, H = query.shape
    block_size, K = keys.shape[2:4]
    query = jnp.pad(query, ((0, 0), (0, 0), (0, padded(H) - H)))
    pages = PageTiles(config.keys, config.stages, block_size, 1, H)
    launch = _Launch(config, pages, N // K, scale, soft_cap, window_left, query.dtype)

    def kernel(queries, keys, values, tables, fields, total, out, memory):
        item, head = lax.axis_index("item"), lax.axis_index("head")

        @pl.when(item < total[0])
        def _():
            block = _Block(launch, head, fields.at[item], queries, keys, values, tables, out, memory)
            pl.when(block.warpgroup == config.warpgroups)(block.load)
            pl.when(block.warpgroup < config.warpgroups)(block.compute)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((T, N, padded(H)), query.dtype),
        grid=(N, len(items.fields)),
        grid_names=("head", "item"),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[launch.memory()],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(query, pages.cut(keys), pages.cut(values), tables, *items)


@dataclass(frozen=True)
class _Launch:
    """What is static about one launch."""

    config: ForwardConfig
    pages: PageTiles
    group: int  # query heads a kv head
    scale: float
    soft_cap: float | None
    window_left: int | None
    dtype: jnp.dtype

    def memory(self) -> dict[str, Any]:
        """The shared memory of a block."""
        config, pages, dtype = self.config, self.pages, self.dtype
        full = plgpu.Barrier(num_arrivals=pages.copies, num_barriers=pages.stages)
        free = plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=pages.stages)
        memory = {
            "q": tile_memory(config.warpgroups, pages.panels, config.rows, PANEL, dtype=dtype),
            "k": pages.memory(dtype),
            "v": pages.memory(dtype),
            "out": plgpu.SMEM((config.warpgroups, config.rows, PANEL), dtype),
            "q_full": plgpu.Barrier(num_arrivals=pages.panels, num_barriers=config.warpgroups),
            "k_full": full,
            "v_full": full,
            "k_free": free,
            "v_free": free,
            "v_clean": plgpu.Barrier(),
        }
        if interpreted():
            vector = plgpu.SMEM((config.warpgroups, config.rows), jnp.float32)
            memory["staging"] = plgpu.SMEM((config.warpgroups, config.rows, config.keys), dtype)
            acc = plgpu.SMEM((config.warpgroups, config.rows, PANEL), jnp.float32)
            memory["state"] = (vector, vector, [acc] * pages.panels)
        return memory


class _Block:
    """What one thread block does, in the kernel, for one item, of which `fields` tells."""

    def __init__(self, launch, head, fields, queries, keys, values, tables, out, memory):
        self.launch, self.config, self.pages = launch, launch.config, launch.pages
        self.head, self.fields, self.memory = head, fields, memory
        self.queries, self.sources, self.tables, self.out = queries, {"k": keys, "v": values}, tables, out
        self.warpgroup = lax.axis_index("warpgroup")
        self.length = fields[4]
        self.tiles = self.seen(fields[3], fields[2])
        self.position = fields[3] + self.warpgroup * self.config.rows  # of the warpgroup's first row

    def rows(self) -> tuple[Scalar, Scalar]:
        """Where the warpgroup's rows begin in the packed tokens, and how many they are. Read where it is needed: kept,
        they would take up registers throughout."""
        offset = self.warpgroup * self.config.rows
        count = lax.clamp(jnp.int32(0), self.fields[2] - offset, jnp.int32(self.config.rows))
        return self.fields[1] + offset, count

    def seen(self, position: Scalar, count: Scalar) -> TileRange:
        """The tiles of keys that so many rows see."""
        left = self.launch.window_left
        last = position + count - 1
        return tile_range(position, last, self.length, self.config.keys, None if left is None else -left, 0)

    @property
    def steps(self) -> Scalar:
        return self.tiles.stop - self.tiles.start

    def load(self) -> None:
        """The warpgroup that fills the rings of keys and values."""
        config, pages, memory = self.config, self.pages, self.memory
        plgpu.set_max_registers(config.registers[1], action="decrease")
        head = lax.div(self.head, jnp.int32(self.launch.group))

        @pl.loop(0, self.steps)
        def _(step):
            at, first = slot(step, pages.stages), (self.tiles.start + step) * config.keys
            for x, source in self.sources.items():
                pl.when(step >= pages.stages)(partial(plgpu.barrier_wait, memory[f"{x}_free"].at[at]))
                pieces = pages.pieces(self.tables, self.fields[0], first, self.length)
                full = memory[f"{x}_full"].at[at]
                pages.load(source, pieces, head, memory[x], at, full, first, jnp.int32(0), self.length)

        for x in self.sources:
            drain(self.steps, pages.stages, memory[f"{x}_free"])

    def compute(self) -> None:
        """A warpgroup that computes its rows."""
        plgpu.set_max_registers(self.config.registers[0], action="increase")
        q_tma, _ = tile_views(self.memory["q"])
        q_full = self.memory["q_full"].at[self.warpgroup]
        place = (pl.ds(self.rows()[0], self.config.rows), self.head)
        load_tile(self.queries, place, q_tma.at[self.warpgroup], q_full)
        plgpu.barrier_wait(q_full)
        self.store(*self.running(self.sweep))

    def sweep(self, m: Ref, total: Ref, accs: Sequence[Ref]) -> None:
        """Steps through the item's tiles, those that the warpgroup's own rows see."""
        _, count = self.rows()
        own = self.seen(self.position, count)
        start = own.start
        stop = jnp.where(count > 0, own.stop, start)
        if self.launch.window_left is not None:
            start, stop = (lax.clamp(self.tiles.start, bound, self.tiles.stop) for bound in (start, stop))
            pl.loop(self.tiles.start, start)(self.idle)
        pl.loop(start, stop)(lambda tile: self.step(tile, m, total, accs))
        pl.loop(stop, self.tiles.stop)(self.idle)

    def idle(self, tile: Scalar) -> None:
        """Lets a tile pass."""
        at = slot(tile - self.tiles.start, self.pages.stages)
        plgpu.barrier_wait(self.memory["k_full"].at[at])
        plgpu.barrier_arrive(self.memory["k_free"].at[at])
        self.clean_values(tile, at)
        self.await_values(tile, at)
        plgpu.barrier_arrive(self.memory["v_free"].at[at])

    def ends(self, tile: Scalar) -> Array:
        """Whether the sequence ends within the tile."""
        return self.length - tile * self.config.keys < self.config.keys

    def await_values(self, tile: Scalar, at: Scalar) -> None:
        pl.when(~self.ends(tile))(lambda: plgpu.barrier_wait(self.memory["v_full"].at[at]))

    def clean_values(self, tile: Scalar, at: Scalar) -> None:
        """Where the sequence ends within the tile, awaits the values; the first warpgroup zeroes those past the end.

        Unowned memory may hold NaN, and 0 * NaN is not 0. To be called while few registers are in use.
        """

        @pl.when(self.ends(tile))
        def _():
            plgpu.barrier_wait(self.memory["v_full"].at[at])

            @pl.when(self.warpgroup == 0)
            def _():
                end = self.length - tile * self.config.keys
                for panel, first in itertools.product(range(self.pages.panels), range(0, self.config.keys, 64)):
                    values = self.pages.panel(self.memory["v"], at, panel).at[pl.ds(first, 64)]
                    value = values[...]
                    values[...] = jnp.where(positions(value.shape, 0) < end - first, value, jnp.zeros_like(value))
                plgpu.commit_smem()
                plgpu.barrier_arrive(self.memory["v_clean"])

            plgpu.barrier_wait(self.memory["v_clean"])

    def running(self, sweep: Callable[[Ref, Ref, Sequence[Ref]], None]) -> tuple[Array, Array, list[Array]]:
        """Runs sweep on the running maximum, sum and output, and returns what it leaves in them.

        They are in registers; interpreted, which knows no such state, in shared memory.
        """
        rows, panels = self.config.rows, self.pages.panels
        m, total = jnp.full((rows,), LEAST, jnp.float32), jnp.zeros((rows,), jnp.float32)
        acc = jnp.zeros((rows, PANEL), jnp.float32)
        if not interpreted():
            m, total = (plgpu.layout_cast(x, WGMMA.reduce(1)) for x in (m, total))
            accs = [plgpu.ACC.init(plgpu.layout_cast(acc, WGMMA))] * panels
            return pl.run_state(lambda refs: sweep(*refs))((m, total, accs))
        refs = jax.tree.map(lambda ref: ref.at[self.warpgroup], self.memory["state"])
        for ref, value in zip(jax.tree.leaves(refs), [m, total] + [acc] * panels, strict=True):
            ref[...] = value
        sweep(*refs)
        m, total, accs = refs
        return m[...], total[...], [acc[...] for acc in accs]

    def step(self, tile: Scalar, m: Ref, total: Ref, accs: Sequence[Ref]) -> None:
        """One tile of keys and values into the running state."""
        launch, memory, shape = self.launch, self.memory, (self.config.rows, self.config.keys)
        at = slot(tile - self.tiles.start, self.pages.stages)
        q_tile = tile_views(memory["q"])[1].at[self.warpgroup]

        def product(acc):
            for panel in range(self.pages.panels):
                key = self.pages.panel(memory["k"], at, panel)
                plgpu.wgmma(acc, q_tile.at[panel], key.transpose((1, 0)))
            return acc[...]

        self.clean_values(tile, at)
        plgpu.barrier_wait(memory["k_full"].at[at])
        s = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
        plgpu.barrier_arrive(memory["k_free"].at[at])
        factor = launch.scale * LOG2E
        if launch.soft_cap is not None:
            s, factor = jnp.tanh(s * (launch.scale / launch.soft_cap)), launch.soft_cap * LOG2E
        s = lax.cond(self.hides(tile), lambda s: self.hide(s, tile), lambda s: s, s)
        m_old = m[...]
        m_new = jnp.maximum(m_old, s.max(axis=1) * factor)
        alpha = jnp.exp2(m_old - m_new)
        p = jnp.exp2(s * factor - broadcast(m_new, shape, 0))
        total[...] = total[...] * alpha + p.sum(axis=1)
        m[...] = m_new
        for acc in accs:
            acc[...] = acc[...] * broadcast(alpha, acc.shape, 0)
        p = p.astype(launch.dtype)
        self.await_values(tile, at)
        self.accumulate(accs, p, at)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(memory["v_free"].at[at])

    def hides(self, tile: Scalar) -> Array:
        """Whether some row does not see all of the tile."""
        first = tile * self.config.keys
        hides = first + self.config.keys > self.position + 1
        if self.launch.window_left is not None:
            hides |= first < self.position + (self.config.rows - 1 - self.launch.window_left)
        return hides

    def hide(self, s: Array, tile: Scalar) -> Array:
        """Scores with -inf where a key comes after the row's own token, or before its window."""
        # A thread's columns are a constant of each register plus the lane's share, bits 1 and 2: with that on the side
        # of the row, of which a thread has two, each comparison is with a constant.
        column = positions(s.shape, 1)
        lane = column & 6
        column = column & ~6
        row = positions(s.shape, 0) - lane + lax.optimization_barrier(self.position - tile * self.config.keys)
        checks = [column <= row]
        if self.launch.window_left is not None:
            checks.append(column >= row - self.launch.window_left)
        return jnp.where(functools.reduce(operator.and_, checks), s, -jnp.inf)

    def accumulate(self, accs: Sequence[Ref], p: Array, at: Scalar) -> None:
        """accs += P V, one accumulator a panel. Interpreted, P goes through shared memory, and wgmma into zeros."""
        values = [self.pages.panel(self.memory["v"], at, panel) for panel in range(len(accs))]
        if not interpreted():
            for acc, value in zip(accs, values, strict=True):
                plgpu.wgmma(acc, p, value)
            return
        staging = self.memory["staging"].at[self.warpgroup]
        staging[...] = p
        plgpu.commit_smem()

        def product(value, zero):
            plgpu.wgmma(zero, staging, value)
            return zero[...]

        for acc, value in zip(accs, values, strict=True):
            acc[...] = acc[...] + pl.run_scoped(partial(product, value), plgpu.ACC(acc.shape, jnp.float32))

    def store(self, m: Array, total: Array, accs: Sequence[Array]) -> None:
        """Writes the output of the warpgroup's rows, and of no others: the next belong to another sequence."""
        staging = self.memory["out"].at[self.warpgroup]
        first, count = self.rows()
        inverse = 1 / jnp.where(total > 0, total, 1.0)
        for panel, acc in enumerate(accs):
            staging[...] = (acc * broadcast(inverse, acc.shape, 0)).astype(self.launch.dtype)
            plgpu.commit_smem()
            size = self.config.rows
            while size:  # powers of two, whose sum is the number of rows
                start = count & (-2 * size)

                @pl.when((count & size) != 0)
                def _(size=size, start=start, panel=panel):
                    place = (pl.ds(first + start, size), self.head, pl.ds(panel * PANEL, PANEL))
                    plgpu.copy_smem_to_gmem(staging.at[pl.ds(start, size)], self.out.at[place])

                size //= 2
            plgpu.wait_smem_to_gmem(0, wait_read_only=panel + 1 < len(accs))

"""Flash attention on Hopper GPUs: FlashAttention's forward pass (arXiv 2205.14135, algorithm 1, in the loop order of
arXiv 2307.08691), with the division of labour of FlashAttention-3 (arXiv 2407.08608).

A thread block owns one tile of query rows for each computing warpgroup. One warpgroup loads tiles of keys and of values
by TMA into two rings of shared memory; the others, each at its own pace, compute S = Q K^T, its softmax, and O += P V
with P kept in registers. While one has its softmax, the tensor cores work for the others.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from . import dropout
from .attention_spec import AttentionOperands, AttentionSpec
from .devices import interpreted
from .flash_attention_mosaic_backward import backward as backward
from .flash_forward_config import ForwardConfig, default_config
from .mosaic_common import (
    PANEL,
    WGMMA,
    Ref,
    Scalar,
    broadcast,
    drain,
    dropout_row_keys,
    load_tile,
    multiply_transposed,
    padded,
    positions,
    same_id,
    slot,
    store_tile,
    tile_memory,
    tile_views,
)
from .mosaic_visits import ListedVisits, RangedVisits, Side, Visits, kept_tiles
from .online_softmax import LEAST, LOG2E


def unsupported(query: Array, key: Array, value: Array, operands: AttentionOperands, spec: AttentionSpec) -> str | None:
    """Why the Hopper kernels cannot serve, or None."""
    (_, T, _, H), S = query.shape, key.shape[1]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"its kernels take bfloat16 and float16, not {query.dtype}"
    if H > 256:
        return f"its kernels take head dims up to 256, not {H}"
    if min(T, S) == 0 or query.shape[0] == 0:
        return f"its kernels take no empty array, and the shapes are {query.shape} and {key.shape}"
    if spec.scale <= 0.0:
        return f"its kernels take positive scales, not {spec.scale}"
    for name, array in (("a bias", operands.bias), ("a dense mask", operands.mask)):
        if array is not None:
            return f"its kernels have no {name}: segment ids, lengths, windows and block masks cost less"
    blocks = operands.block_mask
    if blocks is not None and (blocks.block_q % 64 or blocks.block_kv % 64):
        return f"its kernels take block masks in multiples of 64, not {blocks.block_q} x {blocks.block_kv}"
    return None


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    operands: AttentionOperands,
    spec: AttentionSpec,
    config: ForwardConfig | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """The output, in the inputs' dtype, and the float32 log-sum-exp; -inf in rows that see no key.

    Args:
      query, key, value: bfloat16 or float16; H at most 256. H that is no multiple of 64 is padded.
      operands, spec: what hides entries, the soft cap, and dropout; `operands.bias` and `operands.mask` are None.
      config: tiles; None takes `default_config`.

    >>> out, lse = forward(q, k, v, AttentionOperands(), AttentionSpec(scale=0.125, upper=0))  # doctest: +SKIP
    """
    H = query.shape[-1]
    padding = ((0, 0), (0, 0), (0, 0), (0, -H % PANEL))
    query, key, value = (x if H % PANEL == 0 else jnp.pad(x, padding) for x in (query, key, value))
    out, lse = _run(config or default_config(query.shape[-1], operands, spec), operands, spec, query, key, value)
    return out[..., :H], lse


@dataclass(frozen=True)
class _Launch:
    """One launch of the kernel: what is static about it."""

    config: ForwardConfig
    spec: AttentionSpec
    visits: Visits
    heads: int
    group: int  # query heads a kv head
    panels: int
    dtype: jnp.dtype

    def memory(self) -> dict[str, Any]:
        """The shared memory of a block."""
        config, panels, dtype = self.config, self.panels, self.dtype
        rows, keys, warpgroups, stages = config.rows, config.keys, config.warpgroups, config.stages
        segmented = self.visits.step.segments is not None
        free = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)
        memory = {
            "q": tile_memory(warpgroups, panels, rows, PANEL, dtype=dtype),
            "k": tile_memory(stages, panels, keys, PANEL, dtype=dtype),
            "v": tile_memory(stages, panels, keys, PANEL, dtype=dtype),
            "lse": plgpu.SMEM((warpgroups, rows), jnp.float32),
            "q_full": plgpu.Barrier(num_arrivals=panels + segmented, num_barriers=warpgroups),
            "k_full": plgpu.Barrier(num_arrivals=panels + segmented, num_barriers=stages),
            "v_full": plgpu.Barrier(num_arrivals=panels, num_barriers=stages),
            "k_free": free,
            "v_free": free,
        }
        if segmented:
            memory["q_segments"] = plgpu.SMEM((warpgroups, rows), jnp.int32)
            memory["k_segments"] = plgpu.SMEM((stages, keys), jnp.int32)
        if interpreted():
            vector = plgpu.SMEM((warpgroups, rows), jnp.float32)
            memory["staging"] = plgpu.SMEM((warpgroups, rows, keys), dtype)
            memory["state"] = (vector, vector, [plgpu.SMEM((warpgroups, rows, PANEL), jnp.float32)] * panels)
        return memory


class _Block:
    """What one block does, in the kernel. `refs` are the inputs and outputs, `memory` its shared memory."""

    def __init__(self, launch: _Launch, refs: dict[str, Any], memory: dict[str, Any]):
        self.launch, self.config, self.refs, self.memory = launch, launch.config, refs, memory
        visits, heads = launch.visits, launch.heads
        number = lax.axis_index("block")
        block = lax.rem(lax.div(number, jnp.int32(heads)), jnp.int32(visits.blocks))
        self.block = visits.blocks - 1 - block if visits.longest_last else block
        self.b, self.head = lax.div(number, jnp.int32(heads * visits.blocks)), lax.rem(number, jnp.int32(heads))
        self.warpgroup = lax.axis_index("warpgroup")
        self.start = (self.block * self.config.warpgroups + self.warpgroup) * self.config.rows
        self.rows = pl.ds(self.start, self.config.rows)
        self.visits: RangedVisits | ListedVisits = visits.of_block(refs["tables"], self.b, self.head, self.block)

    def load(self) -> None:
        """The part of the warpgroup that fills the rings of keys and values."""
        config, memory = self.config, self.memory
        plgpu.set_max_registers(config.registers[1], action="decrease")
        rings = {x: (tile_views(memory[x])[0], memory[f"{x}_full"], memory[f"{x}_free"]) for x in "kv"}
        head = lax.div(self.head, jnp.int32(self.launch.group))

        @pl.loop(0, self.visits.count)
        def _(index):
            at = slot(index, config.stages)
            keys = pl.ds(self.visits.tile(index) * config.keys, config.keys)
            for x, (tiles, full, free) in rings.items():
                pl.when(index >= config.stages)(lambda free=free: plgpu.barrier_wait(free.at[at]))
                load_tile(self.refs[x], (self.b, keys, head), tiles.at[at], full.at[at])
                if f"{x}_segments" in memory:
                    ids = self.refs[f"{x}_segments"].at[self.b, keys]
                    plgpu.copy_gmem_to_smem(ids, memory[f"{x}_segments"].at[at], full.at[at])

        for _, _, free in rings.values():
            drain(self.visits.count, config.stages, free)

    def compute(self) -> None:
        """The part of a warpgroup that computes its tile of rows."""
        plgpu.set_max_registers(self.config.registers[0], action="increase")
        q_tma, _ = tile_views(self.memory["q"])
        q_full = self.memory["q_full"].at[self.warpgroup]
        load_tile(self.refs["q"], (self.b, self.rows, self.head), q_tma.at[self.warpgroup], q_full)
        if "q_segments" in self.memory:
            ids = self.refs["q_segments"].at[self.b, self.rows]
            plgpu.copy_gmem_to_smem(ids, self.memory["q_segments"].at[self.warpgroup], q_full)
        plgpu.barrier_wait(q_full)
        row_keys = self.row_keys()

        def idle(index):
            at = slot(index, self.config.stages)
            for x in "kv":
                plgpu.barrier_wait(self.memory[f"{x}_full"].at[at])
                plgpu.barrier_arrive(self.memory[f"{x}_free"].at[at])

        def sweep(m, total, accs):
            self.visits.sweep(
                self.warpgroup,
                idle,
                lambda index, tile, partial: self.step(index, tile, partial, row_keys, m, total, accs),
            )

        self.finish(*self.running(sweep))

    def running(self, sweep: Callable[[Ref, Ref, Sequence[Ref]], None]) -> Any:
        """Runs sweep on the running maximum, sum and output, and returns what it leaves in them.

        They are in registers; interpreted, which knows no such state, in shared memory.
        """
        rows = self.config.rows
        m, total = jnp.full((rows,), LEAST, jnp.float32), jnp.zeros((rows,), jnp.float32)
        acc = jnp.zeros((rows, PANEL), jnp.float32)
        if not interpreted():
            m, total = (plgpu.layout_cast(x, WGMMA.reduce(1)) for x in (m, total))
            accs = [plgpu.ACC.init(plgpu.layout_cast(acc, WGMMA))] * self.launch.panels
            return pl.run_state(lambda refs: sweep(*refs))((m, total, accs))
        refs = jax.tree.map(lambda ref: ref.at[self.warpgroup], self.memory["state"])
        for ref, value in zip(jax.tree.leaves(refs), [m, total] + [acc] * self.launch.panels, strict=True):
            ref[...] = value
        sweep(*refs)
        m, total, accs = refs
        return m[...], total[...], [acc[...] for acc in accs]

    def row_keys(self) -> list[Array]:
        """The dropout keys of the warpgroup's rows, which it holds in registers; none without dropout."""
        if "row_keys" not in self.refs:
            return []
        keys = self.refs["row_keys"].at[self.b, self.head]
        return [plgpu.load(keys.at[i, self.rows], layout=WGMMA.reduce(1), optimized=False) for i in range(2)]

    def step(
        self,
        index: Scalar,
        tile: Scalar,
        partial: Scalar,
        row_keys: list[Array],
        m: Ref,
        total: Ref,
        accs: Sequence[Ref],
    ) -> None:
        """One tile of keys and values into the running state."""
        memory, spec, shape = self.memory, self.launch.spec, (self.config.rows, self.config.keys)
        at = slot(index, self.config.stages)
        q_tile, k_tile, v_tile = (
            tile_views(memory[x])[1].at[i] for x, i in (("q", self.warpgroup), ("k", at), ("v", at))
        )

        def product(acc):
            multiply_transposed(acc, q_tile, k_tile)
            return acc[...]

        plgpu.barrier_wait(memory["k_full"].at[at])
        s = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
        if "k_segments" not in memory:  # which are read below
            plgpu.barrier_arrive(memory["k_free"].at[at])
        factor = spec.scale * LOG2E
        if spec.soft_cap is not None:
            s, factor = jnp.tanh(s * (spec.scale / spec.soft_cap)), spec.soft_cap * LOG2E
        if partial is not False:
            s = self.hide(s, tile, partial, at)
        if "k_segments" in memory:
            plgpu.commit_smem()  # ids were read, and TMA will write there
            plgpu.barrier_arrive(memory["k_free"].at[at])
        m_old = m[...]
        m_new = jnp.maximum(m_old, s.max(axis=1) * factor)
        alpha = jnp.exp2(m_old - m_new)
        p = jnp.exp2(s * factor - broadcast(m_new, shape, 0))
        total[...] = total[...] * alpha + p.sum(axis=1)
        m[...] = m_new
        for acc in accs:
            acc[...] = acc[...] * broadcast(alpha, acc.shape, 0)
        if row_keys:
            p = self.drop(p, tile, row_keys)
        p = p.astype(self.launch.dtype)
        plgpu.barrier_wait(memory["v_full"].at[at])
        self.accumulate(accs, p, v_tile)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(memory["v_free"].at[at])

    def accumulate(self, accs: Sequence[Ref], p: Array, tile: Ref) -> None:
        """accs += p tile, one accumulator a panel. Interpreted, p goes through shared memory, and wgmma into zeros."""
        if not interpreted():
            for panel, acc in enumerate(accs):
                plgpu.wgmma(acc, p, tile.at[panel])
            return
        staging = self.memory["staging"].at[self.warpgroup]
        staging[...] = p
        plgpu.commit_smem()
        for panel, acc in enumerate(accs):

            def product(zero, panel=panel):
                plgpu.wgmma(zero, staging, tile.at[panel])
                return zero[...]

            acc[...] = acc[...] + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))

    def hide(self, s: Array, tile: Scalar, partial: Scalar, at: Scalar) -> Array:
        """Scores with -inf where a mask hides the key, in a tile that is seen in part; at: its slot.

        Each mask is a branch of its own. In one branch the compiler would keep what each says of all entries in
        registers until it has the last.
        """
        asked = partial
        for number, shows in enumerate(self.masks(s.shape, tile, at)):
            if number > 0:  # else the branches become one
                s, again = lax.optimization_barrier((s, jnp.where(partial, 1, 0)))
                asked = again == 1
            s = lax.cond(asked, lambda s, shows=shows: jnp.where(shows(), s, -jnp.inf), lambda s: s, s)
        return s

    def masks(self, shape: tuple[int, ...], tile: Scalar, at: Scalar) -> Iterator[Callable[[], Array]]:
        """What says which entries of a tile a mask shows, mask by mask."""
        visits, lower, upper = self.launch.visits, self.launch.spec.lower, self.launch.spec.upper
        ends_within = "key_lengths" in self.refs or visits.step.length % self.config.keys != 0

        def places() -> tuple[Array, Array, Array, Array]:
            """The tile's first key, and of each entry the row from there, and the column in two summands."""
            # A thread's columns are a constant of each register plus the lane's share, bits 1 and 2: with that on the
            # side of the limit, of which a thread has one or two, each comparison is with a constant.
            column, first = positions(shape, 1), lax.optimization_barrier(tile * self.config.keys)
            return first, positions(shape, 0) + (self.start - first), column & ~6, column & 6

        def before_the_end() -> Array:
            first, row, column, lane = places()
            limits = []
            if ends_within:
                end = self.refs["key_lengths"][self.b] if "key_lengths" in self.refs else visits.step.length
                limits.append(end - 1 - first - lane)
            if upper is not None:
                limits.append(row - lane + upper)
            return column <= functools.reduce(jnp.minimum, limits)

        if ends_within or upper is not None:
            yield before_the_end
        if lower is not None:

            def from_the_first() -> Array:
                _, row, column, lane = places()
                return column >= row - lane + lower

            yield from_the_first
        if "k_segments" in self.memory:

            def in_the_segment() -> Array:
                return same_id((self.memory["q_segments"].at[self.warpgroup], self.memory["k_segments"].at[at]), shape)

            yield in_the_segment

    def drop(self, p: Array, tile: Scalar, row_keys: list[Array]) -> Array:
        """Probabilities with zeros where dropout drops them; the factor 1 / (1 - rate) comes at the end."""
        key1, key2 = (broadcast(x, p.shape, 0) for x in row_keys)
        column = (positions(p.shape, 1) + tile * self.config.keys).astype(jnp.uint32)
        return jnp.where(dropout.keep(key1, key2, column, self.launch.spec.dropout_rate), p, 0.0)

    def finish(self, m: Array, total: Array, accs: Sequence[Array]) -> None:
        """Writes the rows' output and log-sum-exp."""
        (q_tma, q_tile), lse = (
            [view.at[self.warpgroup] for view in tile_views(self.memory["q"])],
            self.memory["lse"].at[self.warpgroup],
        )
        if "query_lengths" in self.refs:
            row = plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=WGMMA.reduce(1)) + self.start
            total = jnp.where(row < self.refs["query_lengths"][self.b], total, 0.0)
        safe = jnp.where(total > 0, total, 1.0)
        inverse = (1.0 / (1.0 - self.launch.spec.dropout_rate)) / safe
        for panel, acc in enumerate(accs):
            out = acc * broadcast(inverse, acc.shape, 0)
            if "query_lengths" in self.refs:
                out = jnp.where(broadcast(total > 0, acc.shape, 0), out, 0.0)
            q_tile[panel] = out.astype(self.launch.dtype)
        lse[...] = jnp.where(total > 0, m * (1 / LOG2E) + jnp.log(safe), -jnp.inf)
        plgpu.commit_smem()
        store_tile(q_tma, self.refs["out"], (self.b, self.rows, self.head))
        plgpu.copy_smem_to_gmem(lse, self.refs["lse"].at[self.b, self.head, self.rows])
        plgpu.wait_smem_to_gmem(0)


def _run(
    config: ForwardConfig, operands: AttentionOperands, spec: AttentionSpec, query: Array, key: Array, value: Array
) -> tuple[Array, Array]:
    """Launches the kernel."""
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    own = Side(config.rows, T, operands.query_lengths, operands.query_segments)
    step = Side(config.keys, S, operands.key_lengths, operands.key_segments)
    kept = kept_tiles(operands.block_mask, own, step)
    visits = Visits(own, step, config.warpgroups, (spec.lower, spec.upper), True, kept)
    launch = _Launch(config, spec, visits, N, N // K, H // PANEL, query.dtype)
    all_rows = visits.blocks * config.warpgroups * config.rows

    inputs = {"q": query, "k": key, "v": value}
    if operands.query_lengths is not None:
        inputs["query_lengths"] = operands.query_lengths
    if operands.key_lengths is not None:
        inputs["key_lengths"] = jnp.minimum(operands.key_lengths, S)
    if own.segments is not None and step.segments is not None:
        inputs["q_segments"] = padded(own.segments, all_rows - T, 0)
        inputs["k_segments"] = padded(step.segments, step.tiles * step.tile - S, 0)
    if operands.dropout_seeds is not None:
        inputs["row_keys"] = padded(dropout_row_keys(operands.dropout_seeds, N, T), all_rows - T, 0)
    tables = visits.tables()

    def kernel(*refs):
        *refs, out, lse, memory = refs
        named = dict(zip(inputs, refs[: len(inputs)], strict=True))
        block = _Block(launch, named | {"tables": tuple(refs[len(inputs) :]), "out": out, "lse": lse}, memory)
        pl.when(block.warpgroup == config.warpgroups)(block.load)
        pl.when(block.warpgroup < config.warpgroups)(block.compute)

    out, lse = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((B, N, all_rows), jnp.float32),
        ],
        grid=(B * visits.blocks * N,),
        grid_names=("block",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[launch.memory()],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="flash_forward",
    )(*inputs.values(), *tables)
    return out, lse[:, :, :T]

"""Flash attention on Hopper GPUs: FlashAttention's forward pass (arXiv 2205.14135, algorithm 1, in the loop order of
arXiv 2307.08691), with the division of labour of FlashAttention-3 (arXiv 2407.08608).

A thread block owns one tile of query rows for each computing warpgroup. One warpgroup loads tiles of keys and of values
by TMA into two rings of shared memory; the others, each at its own pace, compute S = Q K^T, its softmax, and O += P V
with P kept in registers. While one has its softmax, the tensor cores work for the others.
"""

import functools
import math
import operator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from . import dropout
from .attention_spec import AttentionOperands, AttentionSpec
from .devices import interpreted
from .flash_forward_config import ForwardConfig, default_config
from .mosaic_common import (
    PANEL,
    WGMMA,
    Ref,
    Scalar,
    broadcast,
    drain,
    load_tile,
    multiply_transposed,
    positions,
    slot,
    store_tile,
    tile_memory,
    tile_views,
)
from .mosaic_visits import Side, Visits

LOG2E = math.log2(math.e)
# Where the running maximum starts: finite, so that rows that have seen nothing give exp2(-inf - start) = 0 and not NaN.
LEAST = -1e30


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    operands: AttentionOperands,
    spec: AttentionSpec,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    return attend(query, key, value, operands, spec, default_config(query.shape[-1], operands, spec))


def attend(query, key, value, operands, spec, config):
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    dtype = query.dtype
    group, panels = N // K, H // PANEL
    rows, keys, stages, warpgroups = config.rows, config.keys, config.stages, config.warpgroups
    visits = Visits(
        Side(tile=rows, length=T),
        Side(tile=keys, length=S),
        warpgroups,
        (spec.lower, spec.upper),
        mask_tail=True,
    )
    blocks = visits.blocks
    tables = visits.tables()

    def kernel(q_ref, k_ref, v_ref, *refs):
        *table_refs, o_ref, lse_ref, memory = refs
        number, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        head = lax.rem(number, jnp.int32(N))
        block = lax.rem(lax.div(number, jnp.int32(N)), jnp.int32(blocks))
        if visits.longest_last:
            block = blocks - 1 - block
        b = lax.div(number, jnp.int32(N * blocks))
        (q_tma, q_tiles), (k_tma, k_tiles), (v_tma, v_tiles) = (tile_views(memory[name]) for name in "qkv")
        k_full, v_full, k_free, v_free = (memory[name] for name in ("k_full", "v_full", "k_free", "v_free"))
        seen = visits.of_block(table_refs, b, head, block)

        @pl.when(warpgroup == warpgroups)
        def load():
            plgpu.set_max_registers(config.registers[1], action="decrease")

            @pl.loop(0, seen.count)
            def _(index):
                at = slot(index, stages)
                place = (b, pl.ds(seen.tile(index) * keys, keys), lax.div(head, jnp.int32(group)))
                for source, tiles, full, free in ((k_ref, k_tma, k_full, k_free), (v_ref, v_tma, v_full, v_free)):

                    @pl.when(index >= stages)
                    def _(free=free):
                        plgpu.barrier_wait(free.at[at])

                    load_tile(source, place, tiles.at[at], full.at[at])

            drain(seen.count, stages, k_free)
            drain(seen.count, stages, v_free)

        @pl.when(warpgroup < warpgroups)
        def compute():
            plgpu.set_max_registers(config.registers[0], action="increase")
            start = (block * warpgroups + warpgroup) * rows
            place = (b, pl.ds(start, rows), head)
            q_tile, q_full = q_tiles.at[warpgroup], memory["q_full"].at[warpgroup]
            load_tile(q_ref, place, q_tma.at[warpgroup], q_full)
            plgpu.barrier_wait(q_full)
            staging = memory["staging"].at[warpgroup] if interpreted() else None

            def idle(index):
                at = slot(index, stages)
                for full, free in ((k_full, k_free), (v_full, v_free)):
                    plgpu.barrier_wait(full.at[at])
                    plgpu.barrier_arrive(free.at[at])

            def hide(s, tile):
                checks = []
                row, column = positions(s.shape, 0), positions(s.shape, 1)
                # A thread's columns are a constant of each register plus the lane's share, bits 1 and 2: with that
                # on the side of the row, of which a thread has two, each comparison is with a constant.
                lane = column & 6
                column = column & ~6
                first = lax.optimization_barrier(tile * keys)
                if spec.upper is not None:
                    checks.append(column <= row - lane + (start - first + spec.upper))
                if spec.lower is not None:
                    checks.append(column >= row - lane + (start - first + spec.lower))
                if S % keys:
                    checks.append(column < S - first - lane)
                return jnp.where(functools.reduce(operator.and_, checks), s, -jnp.inf)

            def step(index, tile, masked, m, l, accs):
                at = slot(index, stages)
                plgpu.barrier_wait(k_full.at[at])

                def product(acc):
                    multiply_transposed(acc, q_tile, k_tiles.at[at])
                    return acc[...]

                s = pl.run_scoped(product, plgpu.ACC((rows, keys), jnp.float32))
                plgpu.barrier_arrive(k_free.at[at])
                factor = spec.scale * LOG2E
                if spec.soft_cap is not None:
                    s, factor = jnp.tanh(s * (spec.scale / spec.soft_cap)), spec.soft_cap * LOG2E
                if masked is True:
                    s = hide(s, tile)
                elif masked is not False:
                    s = lax.cond(masked, lambda s: hide(s, tile), lambda s: s, s)
                m_old = m[...]
                m_new = jnp.maximum(m_old, s.max(axis=1) * factor)
                alpha = jnp.exp2(m_old - m_new)
                p = jnp.exp2(s * factor - broadcast(m_new, s.shape, 0))
                l[...] = l[...] * alpha + p.sum(axis=1)
                m[...] = m_new
                for acc in accs:
                    acc[...] = acc[...] * broadcast(alpha, acc.shape, 0)
                p = p.astype(dtype)
                plgpu.barrier_wait(v_full.at[at])
                accumulate(accs, p, v_tiles.at[at], staging)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(v_free.at[at])

            def sweep(m, l, accs):
                seen.sweep(warpgroup, idle, lambda index, tile, masked: step(index, tile, masked, m, l, accs))

            m, l, accs = running(sweep, rows, panels, memory["state"], warpgroup)
            safe = jnp.where(l > 0, l, 1.0)
            for panel, acc in enumerate(accs):
                q_tile[panel] = (acc * broadcast(1 / safe, acc.shape, 0)).astype(dtype)
            memory["lse"][warpgroup] = jnp.where(l > 0, m * (1 / LOG2E) + jnp.log(safe), -jnp.inf)
            plgpu.commit_smem()
            store_tile(q_tma.at[warpgroup], o_ref, place)
            plgpu.copy_smem_to_gmem(memory["lse"].at[warpgroup], lse_ref.at[b, head, pl.ds(start, rows)])
            plgpu.wait_smem_to_gmem(0)

    memory = {
        "q": tile_memory(warpgroups, panels, rows, PANEL, dtype=dtype),
        "k": tile_memory(stages, panels, keys, PANEL, dtype=dtype),
        "v": tile_memory(stages, panels, keys, PANEL, dtype=dtype),
        "lse": plgpu.SMEM((warpgroups, rows), jnp.float32),
        "q_full": plgpu.Barrier(num_arrivals=panels, num_barriers=warpgroups),
        "k_full": plgpu.Barrier(num_arrivals=panels, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=panels, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        "state": None,
    }
    if interpreted():
        memory["staging"] = plgpu.SMEM((warpgroups, rows, keys), dtype)
        memory["state"] = (
            plgpu.SMEM((warpgroups, rows), jnp.float32),
            plgpu.SMEM((warpgroups, rows), jnp.float32),
            [plgpu.SMEM((warpgroups, rows, PANEL), jnp.float32)] * panels,
        )
    out, lse = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(query.shape, dtype),
            jax.ShapeDtypeStruct((B, N, blocks * warpgroups * rows), jnp.float32),
        ],
        grid=(N * blocks * B,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[memory],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(query, key, value, *tables)
    return out, lse[:, :, :T]


def running(sweep, rows, panels, memory, warpgroup):
    """Runs sweep(m, l, accs) and returns what it left in them. In registers; interpreted, in shared memory."""
    m = jnp.full((rows,), LEAST, jnp.float32)
    l = jnp.zeros((rows,), jnp.float32)
    acc = jnp.zeros((rows, PANEL), jnp.float32)
    if memory is None:
        m, l = (plgpu.layout_cast(x, WGMMA.reduce(1)) for x in (m, l))
        acc = plgpu.layout_cast(acc, WGMMA)
        return pl.run_state(lambda refs: sweep(*refs))((m, l, [plgpu.ACC.init(acc)] * panels))
    refs = jax.tree.map(lambda ref: ref.at[warpgroup], memory)
    refs[0][...] = m
    refs[1][...] = l
    for ref in refs[2]:
        ref[...] = acc
    sweep(*refs)
    return refs[0][...], refs[1][...], [ref[...] for ref in refs[2]]


def accumulate(accs, p, tile, staging):
    """accs += p tile."""
    if staging is None:
        for panel, acc in enumerate(accs):
            plgpu.wgmma(acc, p, tile.at[panel])
        return
    staging[...] = p
    plgpu.commit_smem()
    for panel, acc in enumerate(accs):

        def product(zero, panel=panel):
            plgpu.wgmma(zero, staging, tile.at[panel])
            return zero[...]

        acc[...] = acc[...] + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))

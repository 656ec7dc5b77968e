"""The parts of each sequence's attention added up by their log-sum-exp, on Hopper GPUs.

A thread block for each sequence and query head reads the parts by TMA, some at a time, and adds them up one after the
other: in the same order whatever else the batch holds.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from .mosaic_common import LEAST, WGMMA

COPY = 8  # parts of one copy
PARTS = 32  # parts in shared memory at once: 16 KB at head dim 128, so that a multiprocessor holds many blocks


class Parts(NamedTuple):
    """What one launch leaves."""

    out: Float[Array, "parts N H"]
    lse: Float[Array, "parts columns"]
    """log2-sum-exp2."""
    runs: Int32[Array, "R 3"]
    """Of each sequence, its first part, how many there are, and the sequences before it in their columns."""
    columns: Int32[Array, " N"]
    """Where in `lse` each query head stands, `group` further on for the next sequence."""


def merge(sources: Sequence[Parts], *, group: int, dtype: DTypeLike) -> Float[Array, "R N H"]:
    """Softmax-weighted sums of the parts of all sources, zeros where there are none. group: query heads a kv head."""
    N, H = sources[0].out.shape[1:]
    R = sources[0].runs.shape[0]

    def add_parts(source, row, head, memory, state):
        """One source's parts into the running maximum, sum and output."""
        parts_ref, lse_ref, runs_ref, column_ref = source
        first, count, column = runs_ref[row, 0], runs_ref[row, 1], column_ref[head] + runs_ref[row, 2] * group
        near = lax.div(column, jnp.int32(COPY)) * COPY  # a copy takes 16 bytes at least

        def turn(index, state):
            done = index * PARTS
            for i in range(PARTS // COPY):
                here = pl.ds(i * COPY, COPY)
                there = pl.ds(first + done + i * COPY, COPY)

                @pl.when(done + i * COPY < count)
                def _(here=here, there=there):
                    plgpu.copy_gmem_to_smem(parts_ref.at[there, head], memory["parts"].at[here], memory["full"])
                    plgpu.copy_gmem_to_smem(
                        lse_ref.at[there, pl.ds(near, COPY)], memory["lse"].at[here], memory["full"]
                    )

                @pl.when(done + i * COPY >= count)
                def _():
                    plgpu.barrier_arrive(memory["full"])
                    plgpu.barrier_arrive(memory["full"])

            plgpu.barrier_wait(memory["full"])
            here = lax.min(count - done, jnp.int32(PARTS))
            m, total, out = state
            m_new = lax.fori_loop(0, here, lambda i, m: jnp.maximum(m, memory["lse"][i, column - near]), m)
            alpha = jnp.exp2(m - m_new)

            def add(i, state):
                total, out = state
                weight = jnp.exp2(memory["lse"][i, column - near] - m_new)
                part = plgpu.load(memory["parts"].at[i], layout=WGMMA.reduce(0))
                return total + weight, out + part * weight

            total, out = lax.fori_loop(0, here, add, (total * alpha, out * alpha))
            plgpu.commit_smem()  # all have read, and TMA will write there
            return m_new, total, out

        return lax.fori_loop(0, lax.div(count + (PARTS - 1), jnp.int32(PARTS)), turn, state)

    def kernel(*refs):
        *refs, out_ref, memory = refs
        row, head = lax.axis_index("row"), lax.axis_index("head")
        nothing = plgpu.layout_cast(jnp.zeros((H,), jnp.float32), WGMMA.reduce(0))
        state = (jnp.float32(LEAST), jnp.float32(0.0), nothing)
        for source in itertools.batched(refs, len(Parts._fields)):
            state = add_parts(source, row, head, memory, state)
        _, total, out = state
        memory["out"][...] = (out * (1 / jnp.where(total > 0, total, 1.0))).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory["out"], out_ref.at[row, head])
        plgpu.wait_smem_to_gmem(0)

    memory = {
        "parts": plgpu.SMEM((PARTS, H), jnp.float32),
        "lse": plgpu.SMEM((PARTS, COPY), jnp.float32),
        "out": plgpu.SMEM((H,), dtype),
        "full": plgpu.Barrier(num_arrivals=2 * (PARTS // COPY)),
    }
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((R, N, H), dtype),
        grid=(R, N),
        grid_names=("row", "head"),
        scratch_types=[memory],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*itertools.chain(*sources))

"""The parts of each sequence's attention added up by their log-sum-exp, on Hopper GPUs.

A thread block for each sequence and SEGMENT output elements, of one head or two, a thread an element, reads the parts
straight from device memory, where they have just been written, and adds them up one after the other: in the same order
whatever else the batch holds.
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

from .mosaic_common import Ref, Scalar
from .online_softmax import LEAST

SEGMENT = 128  # elements of a row that a thread block works on
TOGETHER = 8  # parts that are being read at once: one read takes about as long as another
STRIDED = plgpu.Layout.WG_STRIDED((SEGMENT,), vec_size=1)


class Parts(NamedTuple):
    """What one launch leaves."""

    out: Float[Array, "parts N H"]
    lse: Float[Array, "parts columns"]
    """log2-sum-exp2."""
    runs: Int32[Array, "R 3"]
    """Of each sequence, its first part, how many there are, and the sequences before it in their columns."""
    columns: Int32[Array, " N"]
    """Where in `lse` each query head stands, `group` further on for the next sequence."""


def whole_segments(heads: int, head_dim: int) -> int:
    """As many heads or more, together whole segments. head_dim: a multiple of SEGMENT / 2."""
    return heads + heads * head_dim // (SEGMENT // 2) % 2


def merge(sources: Sequence[Parts], *, group: int, dtype: DTypeLike) -> Float[Array, "R N H"]:
    """Softmax-weighted sums of the parts of all sources, zeros where there are none. group: query heads a kv head.

    The parts' heads are whole segments together (`whole_segments`), the last one nobody's where N is odd.
    """
    heads, H = sources[0].out.shape[1:]
    R, N = len(sources[0].runs), len(sources[0].columns)

    def add_parts(source: Sequence[Ref], row: Scalar, start: Scalar, state: tuple[Array, ...]) -> tuple[Array, ...]:
        """One source's parts into the running maximum, sum and output."""
        parts_ref, lse_ref, runs_ref, columns_ref = source
        first, count, shift = runs_ref[row, 0], runs_ref[row, 1], runs_ref[row, 2] * group
        halves = [
            columns_ref[lax.min(lax.div(start + half, jnp.int32(H)), N - 1)] + shift for half in (0, SEGMENT // 2)
        ]
        in_first_half = plgpu.broadcasted_iota(jnp.int32, (SEGMENT,), 0, layout=STRIDED) < SEGMENT // 2

        def turn(index, state):
            m, total, out = state
            logs, parts = [], []
            for i in range(TOGETHER):
                nth = index * TOGETHER + i
                part = first + lax.min(nth, count - 1)
                log = [jnp.where(nth < count, lse_ref[part, column], -jnp.inf) for column in halves]
                logs.append(jnp.where(in_first_half, *(lax.broadcast(x, (SEGMENT,)) for x in log)))
                parts.append(plgpu.load(parts_ref.at[part, pl.ds(start, SEGMENT)], layout=STRIDED))
            m_new = m
            for log in logs:
                m_new = jnp.maximum(m_new, log)
            alpha = jnp.exp2(m - m_new)
            total, out = total * alpha, out * alpha
            for log, part in zip(logs, parts, strict=True):
                weight = jnp.exp2(log - m_new)
                total, out = total + weight, out + part * weight
            return m_new, total, out

        return lax.fori_loop(0, lax.div(count + (TOGETHER - 1), jnp.int32(TOGETHER)), turn, state)

    def paged_merge(*refs: Ref) -> None:
        *inputs, out_ref = refs
        row, start = lax.axis_index("row"), lax.axis_index("segment") * SEGMENT
        state = tuple(
            plgpu.layout_cast(jnp.full((SEGMENT,), value, jnp.float32), STRIDED) for value in (LEAST, 0.0, 0.0)
        )
        for source in itertools.batched(inputs, len(Parts._fields)):
            state = add_parts(source, row, start, state)
        _, total, out = state
        out_ref[row, pl.ds(start, SEGMENT)] = (out / jnp.where(total > 0, total, 1.0)).astype(dtype)

    flat = [source._replace(out=source.out.reshape(-1, heads * H)) for source in sources]
    out = plgpu.kernel(
        paged_merge,
        out_type=jax.ShapeDtypeStruct((R, heads * H), dtype),
        grid=(R, heads * H // SEGMENT),
        grid_names=("row", "segment"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*itertools.chain(*flat))
    return out.reshape(R, heads, H)[:, :N]

"""What the Hopper kernels share: tiles in shared memory, the loader's ring, matrix products into accumulators.

A tile of rows with H columns lies in shared memory as panels [H / 64, rows, 64], one TMA copy each: 64 columns of a
16-bit dtype are the 128 bytes of the widest swizzle, and rows need not come in eights as they would if TMA itself cut
the tensor into 8 x 64 pieces.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, UInt32

from . import dropout
from .devices import interpreted

WGMMA = plgpu.Layout.WGMMA
PANEL = 64
SWIZZLE: Any = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
TILING: Any = plgpu.TilingTransform((8, PANEL))  # pyright: ignore[reportAbstractUsage]

Ref = Any  # a reference to memory inside a kernel
Scalar = int | jax.Array


def tile_memory(*shape: int, dtype: jnp.dtype) -> Any:
    """Shared memory for tiles [..., panels, rows, 64]: a view for TMA and, over the same bytes, one for wgmma."""
    for_wgmma = plgpu.SMEM(shape, dtype, transforms=(TILING, SWIZZLE))
    return for_wgmma if interpreted() else plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=(SWIZZLE,)), for_wgmma)


def tile_views(memory: Ref) -> Any:  # JAX unpacks a RefUnion like a tuple of references
    """The views of a `tile_memory`: (for TMA, for wgmma and registers)."""
    return (memory, memory) if interpreted() else memory


def columns(panel: int) -> Any:
    return pl.ds(panel * PANEL, PANEL)


def load_tile(source: Ref, index: tuple, tile: Ref, full: Ref) -> None:
    """Starts the copies of source[*index, :] into a tile, each of which arrives at `full` once."""
    for panel in range(tile.shape[0]):
        plgpu.copy_gmem_to_smem(source.at[(*index, columns(panel))], tile.at[panel], full)


def store_tile(tile: Ref, target: Ref, index: tuple) -> None:
    """Starts the copies of a tile to target[*index, :]; rows beyond the target's end are left out."""
    for panel in range(tile.shape[0]):
        plgpu.copy_smem_to_gmem(tile.at[panel], target.at[(*index, columns(panel))])


def store_untiled(target: Ref, value: jax.Array) -> None:
    """target[...] = value for shared memory as it is, where threads may meet on a bank."""
    if hasattr(plgpu, "store") and not interpreted():  # jax 0.12 wants that said
        plgpu.store(target, value, optimized=False)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        target[...] = value


def multiply_transposed(accumulator: Ref, a: Ref, b: Ref) -> None:
    """accumulator += a b^T, two tiles; one wgmma group a panel."""
    for panel in range(a.shape[0]):
        plgpu.wgmma(accumulator, a.at[panel], b.at[panel].transpose((1, 0)))


def multiply(accumulators: Sequence[Ref], a: jax.Array, b: Ref, staging: Ref | None) -> None:
    """accumulators += a b for `a` in registers and a tile b, an accumulator and a wgmma group each panel of b.

    Interpreted, `a` passes through `staging` in shared memory.
    """
    left = a
    if staging is not None:
        staging[...] = a
        plgpu.commit_smem()
        left = staging
    for panel, accumulator in enumerate(accumulators):
        plgpu.wgmma(accumulator, left, b.at[panel])


def broadcast(vector: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector that runs along `axis` of `shape`."""
    return lax.broadcast_in_dim(vector, shape, (axis,))


def positions(shape: tuple[int, ...], axis: int, dtype: jnp.dtype = jnp.int32) -> jax.Array:
    return plgpu.broadcasted_iota(dtype, shape, axis, layout=WGMMA)


def same_id(sides: Sequence[Ref], shape: tuple[int, ...]) -> jax.Array:
    """Which entries of a tile have one id on both sides, the ids that run along axis 0 and those along axis 1."""
    along = [plgpu.load(ids, layout=WGMMA.reduce(1 - axis), optimized=False) for axis, ids in enumerate(sides)]
    return broadcast(along[0], shape, 0) == broadcast(along[1], shape, 1)


def slot(step: Scalar, stages: int) -> jax.Array:
    return lax.rem(jnp.int32(step), jnp.int32(stages))


def drain(steps: Scalar, stages: int, free: Ref) -> None:
    """Waits until every slot that the loader filled is free: a barrier's phase that completes must be waited for."""

    @pl.loop(lax.max(jnp.int32(steps) - stages, 0), steps)
    def _(step):
        plgpu.barrier_wait(free.at[slot(step, stages)])


def padded(x: Array, padding: int, value: float | int) -> Array:
    """x with its last axis longer by `padding`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)], constant_values=value)


def dropout_row_keys(seeds: UInt32[Array, "B 2"], heads: int, rows: int) -> UInt32[Array, "B N 2 T"]:
    """Dropout's two keys of each row."""
    head = jnp.arange(heads, dtype=jnp.uint32)[None, :, None]
    row = jnp.arange(rows, dtype=jnp.uint32)[None, None]
    seed0, seed1 = (seeds[:, i, None, None] for i in range(2))
    return jnp.stack(dropout.row_keys(*jnp.broadcast_arrays(seed0, seed1, head, row)), 2)

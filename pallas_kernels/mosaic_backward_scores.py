"""What the Hopper backward kernels share: a launch, and from a tile of Q K^T the probabilities and their gradient.

S, P, dP and dS are FlashAttention's (arXiv 2205.14135, algorithm 4). Owning keys a block works on S^T = K Q^T and
dP^T = V dO^T, so that P^T and dS^T, like dS in a block that owns queries, are left operands straight from registers.
Probabilities are powers of two, of logits in base 2.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import dropout
from .attention_spec import AttentionSpec
from .devices import interpreted
from .flash_backward_config import Gradient, TileConfig
from .mosaic_common import PANEL, WGMMA, Ref, Scalar, broadcast, positions, same_id, tile_memory
from .mosaic_visits import Visits
from .online_softmax import LOG2E


@dataclass(frozen=True)
class Launch:
    """One launch of the kernel. The side it owns and the side it steps through follow from the gradients wanted."""

    wanted: tuple[Gradient, ...]
    tiles: TileConfig
    spec: AttentionSpec
    visits: Visits
    group: int  # query heads a kv head
    heads: int  # of the side that a block owns
    panels: int
    dtype: jnp.dtype

    @property
    def fused(self) -> bool:
        """Whether one launch computes all three."""
        return len(self.wanted) == 3

    @property
    def owns_keys(self) -> bool:
        return self.wanted != ("dq",)

    @property
    def row_axis(self) -> int:
        """The axis of a tile of scores along which the queries run; axis 0 is the side owned."""
        return 1 if self.owns_keys else 0

    @property
    def sums_ds(self) -> bool:
        """Whether dS times the stepped keys or queries is wanted: dQ or dK."""
        return self.wanted != ("dv",)

    @property
    def sums_p(self) -> bool:
        """Whether P^T times dO is wanted: dV."""
        return "dv" in self.wanted

    @property
    def shape(self) -> tuple[int, int]:
        """Of the scores that a warpgroup has in registers at a time."""
        return self.tiles.own, PANEL if self.fused else self.tiles.step

    def memory(self) -> dict[str, Any]:
        """The shared memory of a block."""
        warpgroups, stages = self.tiles.warpgroups, self.tiles.stages
        own = tile_memory(warpgroups, self.panels, self.tiles.own, PANEL, dtype=self.dtype)
        step = tile_memory(stages, self.panels, self.tiles.step, PANEL, dtype=self.dtype)
        copies = 2 * self.panels
        memory = {"own0": own, "step0": step, "step1": step}
        if self.sums_ds:
            memory["own1"] = own
        if self.owns_keys:
            copies += 1
            memory["rows"] = plgpu.SMEM((stages, 2, self.tiles.step), jnp.float32)
            if self.spec.dropout_rate > 0.0:
                copies += 1
                memory["row_keys"] = plgpu.SMEM((stages, 2, self.tiles.step), jnp.uint32)
        own_copies = self.panels * (1 + self.sums_ds)
        if self.fused and self.visits.step.segments is not None:
            copies, own_copies = copies + 1, own_copies + 1
            memory["step_segments"] = plgpu.SMEM((stages, self.tiles.step), jnp.int32)
            memory["own_segments"] = plgpu.SMEM((warpgroups, self.tiles.own), jnp.int32)
        memory["own_full"] = plgpu.Barrier(num_arrivals=own_copies, num_barriers=warpgroups)
        memory["full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
        memory["free"] = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)
        if interpreted():
            memory["staging"] = plgpu.SMEM((warpgroups, *self.shape), self.dtype)
        return memory


class Block:
    """One block of a launch, in the kernel: where it is, and the arithmetic of a tile of scores.

    refs: the inputs and outputs. memory: the block's shared memory.
    """

    def __init__(self, launch: Launch, members: int, refs: dict[str, Any], memory: dict[str, Any]):
        self.launch, self.tiles, self.refs, self.memory = launch, launch.tiles, refs, memory
        pair = lax.axis_index("section") * members + lax.axis_index("member")
        self.b, self.own_head = lax.div(pair, jnp.int32(launch.heads)), lax.rem(pair, jnp.int32(launch.heads))
        block = lax.axis_index("block")
        # Fused, blocks wait for those before.
        reverse = launch.visits.longest_last and not launch.fused
        self.block = launch.visits.blocks - 1 - block if reverse else block
        self.warpgroup = lax.axis_index("warpgroup")
        self.own_start = (self.block * self.tiles.warpgroups + self.warpgroup) * self.tiles.own
        self.own_rows = pl.ds(self.own_start, self.tiles.own)

    def positions(self, axis: int) -> jax.Array:
        """0, 1, ... along an axis of the tile."""
        return plgpu.broadcasted_iota(jnp.int32, (self.launch.shape[axis],), 0, layout=WGMMA.reduce(1 - axis))

    def weights(
        self, product: jax.Array, start: Scalar, partial: Scalar, row_values: Callable, place: tuple = ()
    ) -> tuple[jax.Array, jax.Array]:
        """From Q K^T: P, and dS / scale as a factor of dP - delta. start: of the step side; place: see `segments`.

        With dropout both are negative where the entry is dropped: the sign holds the bit that a register would.
        """
        launch, spec = self.launch, self.launch.spec
        if spec.soft_cap is None:
            capped = None
            logits = product * (spec.scale * LOG2E)
        else:
            capped = jnp.tanh(product * (spec.scale / spec.soft_cap))
            logits = capped * (spec.soft_cap * LOG2E)
        p = jnp.exp2(logits - broadcast(row_values("rows", 0), launch.shape, launch.row_axis))
        if spec.dropout_rate > 0.0:
            p = jnp.where(self.kept_entries(start, row_values), p, -p)
        if (launch.visits.masks_entries or (launch.fused and self.has_tail)) and partial is not False:

            def masked() -> jax.Array:
                return jnp.where(self.visible(start, place), p, 0.0)

            p = masked() if partial is True else lax.cond(partial, masked, lambda: p)
        return p, p if capped is None else p * (1.0 - capped * capped)

    def kept_entries(self, start: Scalar, row_values: Callable) -> jax.Array:
        """Which entries dropout keeps."""
        launch = self.launch
        key1, key2 = (broadcast(row_values("row_keys", i), launch.shape, launch.row_axis) for i in range(2))
        start = self.own_start if launch.owns_keys else start
        key = (self.positions(1 - launch.row_axis) + start).astype(jnp.uint32)
        return dropout.keep(key1, key2, broadcast(key, launch.shape, 1 - launch.row_axis), launch.spec.dropout_rate)

    def kept(self, p: jax.Array) -> jax.Array:
        """P without what dropout drops."""
        return p if self.launch.spec.dropout_rate == 0.0 else jnp.maximum(p, 0.0)

    def logit_gradient(self, weight: jax.Array, dp: jax.Array, delta: jax.Array) -> jax.Array:
        """dS / scale = P (dP - delta), where dropout cuts and scales dP alone."""
        delta = broadcast(delta, self.launch.shape, self.launch.row_axis)
        rate = self.launch.spec.dropout_rate
        if rate == 0.0:
            return weight * (dp - delta)
        return jnp.maximum(weight, 0.0) * (dp * (1.0 / (1.0 - rate))) - jnp.abs(weight) * delta

    @property
    def key_end(self) -> Scalar:
        """How many keys count."""
        visits = self.launch.visits
        if "key_lengths" in self.refs:
            return self.refs["key_lengths"][self.b]
        return (visits.own if self.launch.owns_keys else visits.step).length

    @property
    def has_tail(self) -> bool:
        """Whether the last keys that are owned may not count."""
        return "key_lengths" in self.refs or self.launch.visits.own.length % self.tiles.own != 0

    def visible(self, step_start: Scalar, place: tuple) -> jax.Array:
        """Which entries of a tile the masks show."""
        launch, shape = self.launch, self.launch.shape
        lower, upper = launch.visits.band
        # A thread's columns are a constant of each register plus the lane's share, bits 1 and 2: with that on the side
        # of the limit, of which a thread has one or two, each comparison is with a constant.
        column = positions(shape, 1)
        lane, column = column & 6, column & ~6
        first = lax.optimization_barrier(step_start)
        own = positions(shape, 0) + (self.own_start - first)
        checks, limits = [], []
        if upper is not None:
            limits.append(own + upper - lane)
        if launch.visits.mask_tail:
            limits.append(self.key_end - 1 - first - lane)
        if limits:
            checks.append(column <= functools.reduce(jnp.minimum, limits))
        if lower is not None:
            checks.append(column >= own + lower - lane)
        if launch.fused and self.has_tail:
            checks.append(own < self.key_end - first)
        if "own_segments" in self.refs:
            checks.append(same_id(self.segments(step_start, place), shape))
        return functools.reduce(operator.and_, checks)

    def segments(self, step_start: Scalar, place: tuple) -> tuple[Ref, Ref]:
        """The segment ids along both axes of a tile, where fused in shared memory, at `place` in the ring.

        Split, at head dim 256, the kernels have no registers for that.
        """
        if "own_segments" in self.memory:
            return self.memory["own_segments"].at[self.warpgroup], self.memory["step_segments"].at[place]
        step = pl.ds(step_start, self.launch.shape[1])
        return self.refs["own_segments"].at[self.b, self.own_rows], self.refs["step_segments"].at[self.b, step]

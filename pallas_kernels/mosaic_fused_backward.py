"""The block of the fused Hopper backward kernel: dK and dV in registers, and dQ added up in memory in a fixed order.

A block owns a tile of keys for each computing warpgroup and steps through tiles of queries, the last first. Of each it
adds dS K to dQ in device memory. Additions of float32 depend on their order, so for each tile of queries a semaphore
counts the blocks that have added theirs, and a block waits until all blocks of earlier keys that visit the tile have.
It waits only for blocks that were launched before it, and the first of all for none: no deadlock. With the last queries
first nobody waits for long under a causal mask either, where each block visits fewer tiles than the one before.

The warpgroup that loads also waits and adds; the computing ones wait only when no tile of dQ in shared memory is free.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .devices import interpreted
from .mosaic_backward_scores import Block, Launch
from .mosaic_common import (
    PANEL,
    SWIZZLE,
    TILING,
    WGMMA,
    Ref,
    Scalar,
    columns,
    load_tile,
    multiply,
    multiply_transposed,
    slot,
    store_tile,
    tile_views,
)
from .mosaic_visits import RangedVisits

FLOAT_TILING: Any = plgpu.TilingTransform((8, 32))  # pyright: ignore[reportAbstractUsage]


def memory(launch: Launch) -> dict[str, Any]:
    """The shared memory of a block."""
    tiles = launch.tiles
    ds = (tiles.stages, tiles.warpgroups, tiles.step // PANEL, tiles.own, PANEL)
    dq = (tiles.dq_tiles, tiles.warpgroups, PANEL, PANEL)
    return launch.memory() | {
        "ds": plgpu.SMEM(ds, launch.dtype, transforms=(TILING, SWIZZLE)),
        "dq": plgpu.SMEM(dq, jnp.float32, transforms=(FLOAT_TILING, SWIZZLE)),
        # [0]: all that compute are there; those after: a tile of dQ is free. In one, whose phases are one register.
        "met_dq_free": plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=1 + tiles.dq_tiles),
        "dq_full": plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=tiles.dq_tiles),
        "own_summed": plgpu.Barrier(num_arrivals=tiles.warpgroups),
    }


class FusedBlock(Block):
    """The two parts of a block: `load` moves tiles, `compute` is of the other warpgroups."""

    def __init__(self, launch: Launch, *arguments: Any):
        super().__init__(launch, *arguments)
        self.visits = RangedVisits(launch.visits, self.refs["tables"], self.b, self.block)
        self.steps = self.visits.count * launch.group

    def place(self, number: Scalar) -> tuple[Scalar, Scalar]:
        """The query head and the tile of a step: all heads of a tile, then those of the tile before."""
        group = self.launch.group
        index, head = (number, 0) if group == 1 else (lax.div(number, group), lax.rem(number, group))
        return self.own_head * group + head, self.visits.tile(self.visits.count - 1 - index)

    def load(self) -> None:
        """The part of the warpgroup that moves tiles between device memory and shared memory."""
        plgpu.set_max_registers(self.tiles.registers[1], action="decrease")
        memory, stages = self.memory, self.tiles.stages
        for at in range(self.tiles.dq_tiles):
            self.free_dq(at)
        own = self.own_tiles()
        for warpgroup, place in enumerate(own):
            for name in ("own0", "own1"):
                tile = tile_views(memory[name])[0].at[warpgroup]
                load_tile(self.refs[name], place, tile, memory["own_full"].at[warpgroup])
            if "own_segments" in memory:
                ids = self.refs["own_segments"].at[place[:2]]
                plgpu.copy_gmem_to_smem(ids, memory["own_segments"].at[warpgroup], memory["own_full"].at[warpgroup])
        pl.loop(0, stages)(lambda number: pl.when(number < self.steps)(lambda: self.fill(number)))

        @pl.loop(0, self.steps)
        def _(number):
            plgpu.barrier_wait(memory["free"].at[slot(number, stages)])
            pl.when(number + stages < self.steps)(lambda: self.fill(number + stages))
            at = slot(number, self.tiles.dq_tiles)
            plgpu.barrier_wait(memory["dq_full"].at[at])
            self.add(number, at)
            self.free_dq(at)

        plgpu.barrier_wait(memory["own_summed"])
        for warpgroup, place in enumerate(own):
            for name, gradient in (("own0", "dk"), ("own1", "dv")):
                store_tile(tile_views(memory[name])[0].at[warpgroup], self.refs[gradient], place)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def dq_free(self, at: Scalar) -> Ref:
        """The barrier of a tile of dQ that was added and may be written to."""
        return self.memory["met_dq_free"].at[1 + at]

    def free_dq(self, at: Scalar) -> None:
        """Lets the warpgroups write to a tile of dQ."""
        for _ in range(self.tiles.warpgroups):
            plgpu.barrier_arrive(self.dq_free(at))

    def own_tiles(self) -> list[tuple[Scalar, Any, Scalar]]:
        """Where the keys and values of the warpgroups are."""
        count, rows = self.tiles.warpgroups, self.tiles.own
        return [(self.b, pl.ds((self.block * count + i) * rows, rows), self.own_head) for i in range(count)]

    def fill(self, number: Scalar) -> None:
        """Starts the copies into the slot of a step."""
        refs, memory, b = self.refs, self.memory, self.b
        at = slot(number, self.tiles.stages)
        full = memory["full"].at[at]
        head, tile = self.place(number)
        rows = pl.ds(tile * self.tiles.step, self.tiles.step)
        load_tile(refs["step0"], (b, rows, head), tile_views(memory["step0"])[0].at[at], full)
        for name in ("rows", "row_keys"):
            if name in memory:
                plgpu.copy_gmem_to_smem(refs[name].at[b, head, :, rows], memory[name].at[at], full)
        if "step_segments" in memory:
            plgpu.copy_gmem_to_smem(refs["step_segments"].at[b, rows], memory["step_segments"].at[at], full)
        load_tile(refs["step1"], (b, rows, head), tile_views(memory["step1"])[0].at[at], full)

    def add(self, number: Scalar, at: Scalar) -> None:
        """Adds a step's tile to dQ when it is the block's turn; who is first stores it."""
        refs = self.refs
        head, tile = self.place(number)

        def copy(summand: tuple, **how: Any) -> None:
            for piece in range(self.tiles.warpgroups):
                part, panel = divmod(piece, self.launch.panels)
                rows = pl.ds(tile * self.tiles.step + part * PANEL, PANEL)
                target = refs["dq"].at[(*summand, self.b, rows, head, columns(panel))]
                plgpu.copy_smem_to_gmem(self.memory["dq"].at[at, piece], target, **how)

        if interpreted():
            copy((self.block,))
            plgpu.wait_smem_to_gmem(0)
            return
        added = refs["added"].at[self.b, head, tile]
        turn = self.launch.visits.turn(refs["turns"], self.b, self.block, tile)
        plgpu.semaphore_wait(added, turn, decrement=False, memory_scope="gpu")
        pl.when(turn == 0)(lambda: copy(()))
        pl.when(turn > 0)(lambda: copy((), reduction_op="add"))
        plgpu.wait_smem_to_gmem(0)
        plgpu.semaphore_signal(added, 1, memory_scope="gpu")

    def compute(self) -> None:
        """The part of a warpgroup that sums the gradients of its own tiles."""
        plgpu.set_max_registers(self.tiles.registers[0], action="increase")
        launch, memory, panels = self.launch, self.memory, self.launch.panels
        plgpu.barrier_wait(memory["own_full"].at[self.warpgroup])
        sums = [plgpu.ACC((self.tiles.own, PANEL), jnp.float32)] * (2 * panels)
        totals = pl.run_scoped(lambda *accumulators: self.sum(accumulators), *sums)
        factors = (launch.spec.scale, 1.0 / (1.0 - launch.spec.dropout_rate))
        for i, factor in enumerate(factors):
            tile = tile_views(memory[f"own{i}"])[1].at[self.warpgroup]
            for panel in range(panels):
                tile[panel] = (totals[i * panels + panel] * factor).astype(launch.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(memory["own_summed"])
        for at in range(self.tiles.dq_tiles):
            plgpu.barrier_wait(self.dq_free(at))

    def sum(self, accumulators: Sequence[Ref]) -> list[jax.Array]:
        """Runs all steps; returns the sums."""
        visits = self.launch.visits
        masked_before = visits.partial_before or self.has_tail
        if visits.masked_after and masked_before and self.refs["tables"] and self.launch.panels > 1:
            # At head dim 128 the compiler has no registers for three loops whose ends are read from memory.
            runs = [(0, self.steps, lambda number: self.visits.is_partial(self.place(number)[1]) | self.tail())]
        else:
            # A loop that never masks is some 5 % faster than one that asks at every step.
            after, whole = (count * self.launch.group for count in self.visits.runs_from_last(self.tail()))
            first = after if visits.masked_after else 0
            last = whole if masked_before else self.steps
            runs = [(0, first, lambda number: True)] * visits.masked_after + [(first, last, lambda number: False)]
            runs += [(last, self.steps, lambda number: True)] * masked_before
        for start, stop, partial in runs:

            @pl.loop(start, stop)
            def _(number, partial=partial):
                number = lax.optimization_barrier(number)
                self.step(number, partial(number), accumulators)

        self.meet()  # all have multiplied by the keys, whose memory dK takes
        return [accumulator[...] for accumulator in accumulators]

    def step(self, number: Scalar, partial: Scalar, accumulators: Sequence[Ref]) -> None:
        """Adds what the tiles in the ring's slot contribute."""
        memory, tiles = self.memory, self.tiles
        _, tile = self.place(number)
        # Made anew at every step: else the addresses derived from them take up registers throughout.
        at, mine = lax.optimization_barrier((slot(number, tiles.stages), self.warpgroup))
        plgpu.barrier_wait(memory["full"].at[at])
        for part in range(tiles.step // PANEL):
            scores = plgpu.ACC(self.launch.shape, jnp.float32)
            pl.run_scoped(
                lambda s, dp, part=part: self.part(at, mine, part, tile, partial, s, dp, accumulators), scores, scores
            )
        plgpu.commit_smem()
        self.meet()
        self.add_queries(number, at, mine)

    def meet(self) -> None:
        """Waits for the other computing warpgroups."""
        plgpu.barrier_arrive(self.memory["met_dq_free"].at[0])
        plgpu.barrier_wait(self.memory["met_dq_free"].at[0])

    def part(self, at, mine, part, tile, partial, s, dp, accumulators) -> None:
        """What 64 of a tile's queries contribute to dK and dV, and their dS for dQ."""
        launch, memory, panels = self.launch, self.memory, self.launch.panels
        rows = pl.ds(part * PANEL, PANEL)
        keys, values = (tile_views(memory[name])[1].at[mine] for name in ("own0", "own1"))
        queries, douts = (tile_views(memory[name])[1].at[at, :, rows] for name in ("step0", "step1"))
        staging = memory["staging"].at[mine] if interpreted() else None

        def row_values(name, index):
            return plgpu.load(memory[name].at[at, index, rows], layout=WGMMA.reduce(0))

        multiply_transposed(s, keys, queries)
        multiply_transposed(dp, values, douts)
        logits = plgpu.wgmma_accumulator_load(s, wait_n=panels)
        p, weight = self.weights(logits, tile * self.tiles.step + part * PANEL, partial, row_values, (at, rows))
        product = plgpu.wgmma_accumulator_load(dp, wait_n=0)
        ds = self.logit_gradient(weight, product, row_values("rows", 1)).astype(launch.dtype)
        # Both before either is multiplied: what that takes is in registers until it is done.
        p, ds = lax.optimization_barrier((self.kept(p).astype(launch.dtype), ds))
        multiply(accumulators[panels:], p, douts, staging)
        memory["ds"].at[at, mine, part][...] = ds
        multiply(accumulators[:panels], ds, queries, staging)

    def add_queries(self, number: Scalar, at: Scalar, mine: Scalar) -> None:
        """Hands over the warpgroup's piece of dS K: 64 rows by 64 columns, of the keys of all warpgroups."""
        memory = self.memory
        part, panel = (mine, 0) if self.launch.panels == 1 else (0, mine)

        def product(dq):
            for warpgroup in range(self.tiles.warpgroups):
                ds, keys = memory["ds"].at[at, warpgroup, part], tile_views(memory["own0"])[1].at[warpgroup, panel]
                plgpu.wgmma(dq, ds.transpose((1, 0)), keys)
            return dq[...]

        dq = pl.run_scoped(product, plgpu.ACC((PANEL, PANEL), jnp.float32))
        plgpu.barrier_arrive(memory["free"].at[at])  # dV and dK, begun before, are done as well
        at = slot(number, self.tiles.dq_tiles)
        plgpu.barrier_wait(self.dq_free(at))
        memory["dq"].at[at, mine][...] = dq
        plgpu.commit_smem()
        plgpu.barrier_arrive(memory["dq_full"].at[at])

    def tail(self) -> Scalar:
        """Whether there are keys in the block that do not count."""
        rows = self.tiles.own * self.tiles.warpgroups
        return self.has_tail and (self.block + 1) * rows > self.key_end

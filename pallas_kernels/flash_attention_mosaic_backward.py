"""The gradients of flash attention on Hopper GPUs: FlashAttention's backward pass (arXiv 2205.14135, algorithm 4).

With S, P, dP and dS as in the paper, dQ = dS K, dK = dS^T Q and dV = P^T dO. One kernel, launched for the keys and for
the queries, computes them: a block owns tiles of one side, holds their gradients in registers, and steps through the
tiles of the other side. Owning keys it works on S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T, like dS in the
other launch, are left operands straight from registers. Scores are computed twice this way, but nothing is added up in
memory: the same input gives the same bits.

One warpgroup loads by TMA, two or three compute. Probabilities are powers of two, of logits in base 2.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from . import dropout
from .attention_spec import AttentionOperands, AttentionSpec
from .devices import interpreted
from .mosaic_common import (
    LOG2E,
    PANEL,
    WGMMA,
    Ref,
    Scalar,
    broadcast,
    drain,
    dropout_row_keys,
    load_tile,
    multiply,
    multiply_transposed,
    padded,
    slot,
    store_tile,
    tile_memory,
    tile_views,
)
from .mosaic_visits import ListedVisits, RangedVisits, Side, Visits, kept_tiles
from .tiles import transposed

L2_BYTES = 24 * 2**20  # of the 50 MiB that H100 and H200 have; outputs and other tensors take the rest

Gradient = Literal["dq", "dk", "dv"]


@dataclass(frozen=True)
class TileConfig:
    """Tiles of one launch: a warpgroup owns `own` rows and steps through tiles of `step` rows in a ring of slots.

    overlaps: dP is computed under the exponentials of S, and takes registers beside them.
    """

    own: int = 64
    step: int = 64
    warpgroups: int = 2
    stages: int = 2
    overlaps: bool = True

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that computes and of one that loads; all threads together have 65,536."""
        return (240, 24) if self.warpgroups < 3 else (160, 32)


@dataclass(frozen=True)
class BackwardConfig:
    """The launches: which gradients each computes, and its tiles."""

    launches: tuple[tuple[tuple[Gradient, ...], TileConfig], ...]


def default_config(head_dim: int, operands: AttentionOperands, spec: AttentionSpec) -> BackwardConfig:
    """What compiles for a Hopper GPU without spills. head_dim: a multiple of 64.

    Two accumulators of 64 x 192, or of 64 x 128 beside what a soft cap keeps for each entry or dropout and segments
    together do, do not fit: there dK and dV are launches of their own.
    """
    tiles = TileConfig()
    crowded = spec.soft_cap is not None or (spec.dropout_rate > 0.0 and operands.query_segments is not None)
    if head_dim <= 64 or (head_dim <= 128 and not crowded):
        return BackwardConfig(((("dk", "dv"), tiles), (("dq",), tiles)))
    if head_dim <= 192:
        return BackwardConfig(((("dk",), tiles), (("dv",), tiles), (("dq",), tiles)))
    # Here ptxas is at its limit, and a register more or less decides: these are what gave none away to memory.
    segmented, dropping = operands.query_segments is not None, spec.dropout_rate > 0.0
    crowded = segmented or dropping or spec.soft_cap is not None or spec.lower is not None
    dk = TileConfig(
        stages=1, warpgroups=1 if crowded and not segmented else 2, overlaps=spec.upper is not None and not crowded
    )
    dq = TileConfig(stages=1, warpgroups=1 if dropping else 2, overlaps=not crowded)
    return BackwardConfig(((("dk",), dk), (("dv",), tiles), (("dq",), dq)))


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    operands: AttentionOperands,
    spec: AttentionSpec,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    dout: Float[Array, "B T N H"],
    config: BackwardConfig | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"], None]:
    """The gradients by query, key and value, in their dtype, and None for the bias, which this backend does not take.

    Args:
      query, key, value, dout: bfloat16 or float16; H at most 256. H that is no multiple of 64 is padded.
      operands, spec: what hides entries, the soft cap, and dropout; `operands.bias` and `operands.mask` are None.
      lse: float32, the forward pass's log-sum-exp, +inf in rows that saw no key.
      delta: float32, rowsum(dout * out) less the gradient by lse.
      config: tiles; None takes `default_config`.

    >>> dq, dk, dv, _ = backward(q, k, v, AttentionOperands(), AttentionSpec(scale=0.125), lse, delta, dout)
    """
    H = query.shape[-1]
    padding = ((0, 0), (0, 0), (0, 0), (0, -H % PANEL))
    query, key, value, dout = (x if H % PANEL == 0 else jnp.pad(x, padding) for x in (query, key, value, dout))
    launches = (config or default_config(query.shape[-1], operands, spec)).launches
    gradients = {}
    for wanted, tiles in launches:
        results = _run(wanted, tiles, operands, spec, query, key, value, dout, lse, delta)
        gradients |= zip(wanted, results, strict=True)
    dq, dk, dv = (gradients[name][..., :H] for name in ("dq", "dk", "dv"))
    return dq, dk, dv, None


@dataclass(frozen=True)
class _Launch:
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
    def owns_keys(self) -> bool:
        return "dq" not in self.wanted

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
        return self.tiles.own, self.tiles.step

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
        memory["own_full"] = plgpu.Barrier(num_arrivals=self.panels * (1 + self.sums_ds), num_barriers=warpgroups)
        memory["full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
        memory["free"] = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)
        if interpreted():
            memory["staging"] = plgpu.SMEM((warpgroups, *self.shape), self.dtype)
        return memory


class _Block:
    """What one block of a launch does, in the kernel. `refs` are the inputs and outputs, `memory` its shared memory."""

    def __init__(self, launch: _Launch, members: int, refs: dict[str, Any], memory: dict[str, Any]):
        self.launch, self.tiles, self.refs, self.memory = launch, launch.tiles, refs, memory
        pair = lax.axis_index("section") * members + lax.axis_index("member")
        self.b, self.own_head = lax.div(pair, jnp.int32(launch.heads)), lax.rem(pair, jnp.int32(launch.heads))
        block = lax.axis_index("block")
        self.block = launch.visits.blocks - 1 - block if launch.visits.longest_last else block
        self.warpgroup = lax.axis_index("warpgroup")
        self.own_start = (self.block * self.tiles.warpgroups + self.warpgroup) * self.tiles.own
        self.own_rows = pl.ds(self.own_start, self.tiles.own)

    def each_head(self, body: Callable[[RangedVisits | ListedVisits, Scalar, Scalar], None]) -> Scalar:
        """Runs body(visits, query head, steps done before) for the block's query heads; returns the steps of all."""
        launch, count = self.launch, self.launch.group if self.launch.owns_keys else 1

        def one(index, done):
            head = self.own_head * count + index
            visits = launch.visits.of_block(self.refs["tables"], self.b, head, self.block)
            body(visits, head, done)
            return done + jnp.int32(visits.count)

        return lax.fori_loop(0, count, one, jnp.int32(0))

    def load(self) -> None:
        """The part of the warpgroup that fills the ring of step tiles."""
        plgpu.set_max_registers(self.tiles.registers[1], action="decrease")
        refs, memory, b = self.refs, self.memory, self.b
        step0, step1 = (tile_views(memory[name])[0] for name in ("step0", "step1"))

        def load_head(visits, head, done):
            step_head = head if self.launch.owns_keys else lax.div(head, jnp.int32(self.launch.group))

            @pl.loop(0, visits.count)
            def _(index):
                at = slot(done + index, self.tiles.stages)
                full = memory["full"].at[at]
                rows = pl.ds(visits.tile(index) * self.tiles.step, self.tiles.step)
                pl.when(done + index >= self.tiles.stages)(lambda: plgpu.barrier_wait(memory["free"].at[at]))
                load_tile(refs["step0"], (b, rows, step_head), step0.at[at], full)
                for name in ("rows", "row_keys"):
                    if name in memory:
                        plgpu.copy_gmem_to_smem(refs[name].at[b, head, :, rows], memory[name].at[at], full)
                load_tile(refs["step1"], (b, rows, step_head), step1.at[at], full)

        drain(self.each_head(load_head), self.tiles.stages, memory["free"])

    def compute(self) -> None:
        """The part of a warpgroup that sums the gradients of its own tile."""
        plgpu.set_max_registers(self.tiles.registers[0], action="increase")
        launch, place = self.launch, (self.b, self.own_rows, self.own_head)
        full = self.memory["own_full"].at[self.warpgroup]
        for name in ("own0", "own1")[: 1 + launch.sums_ds]:
            load_tile(self.refs[name], place, tile_views(self.memory[name])[0].at[self.warpgroup], full)
        plgpu.barrier_wait(full)
        sums = plgpu.ACC((self.tiles.own, PANEL), jnp.float32)
        count = launch.panels * len(launch.wanted)
        totals = pl.run_scoped(lambda *accumulators: self.sum(accumulators), *[sums] * count)

        factors = {"dq": launch.spec.scale, "dk": launch.spec.scale, "dv": 1.0 / (1.0 - launch.spec.dropout_rate)}
        for i, name in enumerate(launch.wanted):
            for_tma, tile = (view.at[self.warpgroup] for view in tile_views(self.memory[f"own{i}"]))
            for panel in range(launch.panels):
                total = totals[i * launch.panels + panel] * factors[name]
                tile[panel] = self.without_padding(total).astype(launch.dtype)
            plgpu.commit_smem()
            store_tile(for_tma, self.refs[name], place)
        plgpu.wait_smem_to_gmem(0)

    def without_padding(self, gradient: jax.Array) -> jax.Array:
        """Zeros in the rows of keys past the sequence's length, whose scores no mask hides."""
        if not self.launch.owns_keys or "key_lengths" not in self.refs:
            return gradient
        key = self.own_start + self.positions(0)
        counts = broadcast(key < self.refs["key_lengths"][self.b], gradient.shape, 0)
        return jnp.where(counts, gradient, 0.0)

    def sum(self, accumulators: Sequence[Ref]) -> list[jax.Array]:
        """Runs the steps of all heads; returns the sums."""
        launch = self.launch
        held = {} if launch.owns_keys else self.own_row_values()

        def idle(number):
            at = slot(number, self.tiles.stages)
            plgpu.barrier_wait(self.memory["full"].at[at])
            plgpu.barrier_arrive(self.memory["free"].at[at])

        def sum_head(visits, head, done):
            def step(index, tile, partial):
                products = [plgpu.ACC(launch.shape, jnp.float32)] * (1 + (launch.sums_ds and self.tiles.overlaps))
                pl.run_scoped(
                    lambda *products: self.step(done + index, tile, partial, held, products, accumulators), *products
                )

            visits.sweep(self.warpgroup, lambda index: idle(done + index), step)

        self.each_head(sum_head)
        return [accumulator[...] for accumulator in accumulators]

    def step(self, number, tile, partial, held, products, accumulators) -> None:
        """Adds what the tile in the ring's slot contributes."""
        launch, memory = self.launch, self.memory
        # Made anew at every step: else the addresses derived from them take up registers throughout.
        at, mine = lax.optimization_barrier((slot(number, self.tiles.stages), self.warpgroup))
        own = [tile_views(memory[name])[1].at[mine] for name in ("own0", "own1")[: 1 + launch.sums_ds]]
        step = [tile_views(memory[name])[1].at[at] for name in ("step0", "step1")]
        staging = memory["staging"].at[mine] if interpreted() else None

        def row_values(name, index):
            if held:
                return held[name][index]
            return plgpu.load(memory[name].at[at, index], layout=WGMMA.reduce(0))

        plgpu.barrier_wait(memory["full"].at[at])
        for product, a, b in zip(products, own, step, strict=False):
            multiply_transposed(product, a, b)
        logits = plgpu.wgmma_accumulator_load(products[0], wait_n=launch.panels * (len(products) - 1))
        p, weight = self.weights(logits, tile, partial, row_values)
        if launch.sums_p:
            multiply(accumulators[-launch.panels :], self.kept(p).astype(launch.dtype), step[1], staging)
        if launch.sums_ds:
            if self.tiles.overlaps:
                dp = plgpu.wgmma_accumulator_load(products[1], wait_n=launch.panels * launch.sums_p)
            else:

                def product(acc):
                    multiply_transposed(acc, own[1], step[1])
                    return acc[...]

                dp = pl.run_scoped(product, plgpu.ACC(launch.shape, jnp.float32))
            ds = self.logit_gradient(weight, dp, row_values("rows", 1)).astype(launch.dtype)
            multiply(accumulators[: launch.panels], ds, step[0], staging)
        if launch.owns_keys:
            plgpu.commit_smem()  # rows were read, and TMA will write there
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(memory["free"].at[at])

    def own_row_values(self) -> dict[str, list[jax.Array]]:
        """lse and delta of the queries that the warpgroup owns, and their dropout keys."""
        return {
            name: [
                plgpu.load(
                    self.refs[name].at[self.b, self.own_head, i, self.own_rows], layout=WGMMA.reduce(1), optimized=False
                )
                for i in range(2)
            ]
            for name in ("rows", "row_keys")
            if name in self.refs
        }

    def positions(self, axis: int) -> jax.Array:
        """0, 1, ... along an axis of the tile."""
        return plgpu.broadcasted_iota(jnp.int32, (self.launch.shape[axis],), 0, layout=WGMMA.reduce(1 - axis))

    def weights(self, product: jax.Array, tile: Scalar, partial: Scalar, row_values: Callable) -> tuple:
        """From Q K^T: P, and dS / scale as a factor of dP - delta.

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
            p = jnp.where(self.kept_entries(tile, row_values), p, -p)
        if launch.visits.masks_entries and partial is not False:
            p = lax.cond(partial, lambda: jnp.where(self.visible(tile), p, 0.0), lambda: p)
        return p, p if capped is None else p * (1.0 - capped * capped)

    def kept_entries(self, tile: Scalar, row_values: Callable) -> jax.Array:
        """Which entries dropout keeps."""
        launch = self.launch
        key1, key2 = (broadcast(row_values("row_keys", i), launch.shape, launch.row_axis) for i in range(2))
        start = self.own_start if launch.owns_keys else tile * self.tiles.step
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

    def visible(self, tile: Scalar) -> jax.Array:
        """Which entries of a tile the masks show."""
        launch, shape = self.launch, self.launch.shape
        step_start = tile * self.tiles.step
        lower, upper = launch.visits.band
        # A thread holds two positions of axis 0, which take all offsets, and sixteen or more of axis 1: those are made
        # anew here, else they take up registers throughout. And only where they are used: Mosaic finds no layout for
        # a vector that is not.
        own = functools.cache(lambda: self.positions(0) + (self.own_start - step_start))
        step = functools.cache(lambda: broadcast(lax.optimization_barrier(self.positions(1)), shape, 1))
        checks = []
        if upper is not None:
            checks.append(step() <= broadcast(own() + upper, shape, 0))
        if lower is not None:
            checks.append(step() >= broadcast(own() + lower, shape, 0))
        if launch.visits.mask_tail:
            end = self.refs["key_lengths"][self.b] if "key_lengths" in self.refs else launch.visits.step.length
            checks.append(step() < end - step_start)
        if "own_segments" in self.refs:
            places = (self.own_rows, pl.ds(step_start, self.tiles.step))
            own_segments, step_segments = (
                broadcast(
                    plgpu.load(self.refs[name].at[self.b, place], layout=WGMMA.reduce(1 - axis), optimized=False),
                    shape,
                    axis,
                )
                for axis, (name, place) in enumerate(zip(("own_segments", "step_segments"), places, strict=True))
            )
            checks.append(own_segments == step_segments)
        return functools.reduce(operator.and_, checks)


def _run(wanted, tiles, operands, spec, query, key, value, dout, lse, delta) -> list[jax.Array]:
    """Launches the kernel for the gradients wanted."""
    B, T, N, H = query.shape
    K = key.shape[2]
    owns_keys = "dq" not in wanted
    queries = (T, operands.query_lengths, operands.query_segments)
    keys = (key.shape[1], operands.key_lengths, operands.key_segments)
    own = Side(tiles.own, *(keys if owns_keys else queries))
    step = Side(tiles.step, *(queries if owns_keys else keys))
    band = (spec.lower, spec.upper)
    kept = kept_tiles(operands.block_mask, own, step, transpose=owns_keys)
    visits = Visits(own, step, tiles.warpgroups, transposed(*band) if owns_keys else band, not owns_keys, kept)
    launch = _Launch(wanted, tiles, spec, visits, N // K, K if owns_keys else N, H // PANEL, query.dtype)

    own_arrays, step_arrays = ((key, value), (query, dout)) if owns_keys else ((query, dout), (key, value))
    own_padding = visits.blocks * tiles.warpgroups * tiles.own - own.length
    step_padding = step.tiles * step.tile - step.length
    row_padding = step_padding if owns_keys else own_padding
    inputs = {"own0": own_arrays[0], "own1": own_arrays[1], "step0": step_arrays[0], "step1": step_arrays[1]}
    # No row past the end contributes: its probabilities are exp2(. - inf) = 0.
    rows = (padded(lse * LOG2E, row_padding, math.inf), padded(delta, row_padding, 0.0))
    inputs["rows"] = jnp.stack(rows, 2)
    if operands.dropout_seeds is not None:
        inputs["row_keys"] = padded(dropout_row_keys(operands.dropout_seeds, N, T), row_padding, 0)
    if operands.key_lengths is not None:
        inputs["key_lengths"] = operands.key_lengths
    if own.segments is not None and step.segments is not None:
        inputs["own_segments"] = padded(own.segments, own_padding, 0)
        inputs["step_segments"] = padded(step.segments, step_padding, 0)
    tables = visits.tables()
    stepped_bytes = 2 * math.prod(step_arrays[0].shape) * query.dtype.itemsize
    members = _members(B * launch.heads, stepped_bytes // (B * launch.heads))

    def kernel(*refs):
        *refs, memory = refs
        named = dict(zip((*inputs, *wanted), refs[: len(inputs)] + refs[len(refs) - len(wanted) :], strict=True))
        named["tables"] = tuple(refs[len(inputs) : len(inputs) + len(tables)])
        block = _Block(launch, members, named, memory)
        pl.when(block.warpgroup == tiles.warpgroups)(block.load)
        pl.when(block.warpgroup < tiles.warpgroups)(block.compute)

    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(own_arrays[0].shape, query.dtype)] * len(wanted),
        grid=(members, visits.blocks, B * launch.heads // members),
        grid_names=("member", "block", "section"),
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[launch.memory()],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="_".join(("flash_backward", *wanted)),
    )(*inputs.values(), *tables)


def _members(pairs: int, bytes_each: int) -> int:
    """How many (sequence, head) pairs run side by side, a divisor of all: what they step through fits in L2."""
    return max(d for d in range(1, pairs + 1) if pairs % d == 0 and (d == 1 or d * bytes_each <= L2_BYTES))

"""The gradients of flash attention on Hopper GPUs: FlashAttention's backward pass (arXiv 2205.14135, algorithm 4).

With S, P, dP and dS as in the paper, dQ = dS K, dK = dS^T Q and dV = P^T dO. A block owns tiles of one side, the keys
or the queries, holds their gradients in registers, and steps through the tiles of the other side. Fused
(`mosaic_fused_backward`), blocks that own keys also add up dQ in memory. Where registers do not suffice for that, the
kernel is launched for the keys and for the queries, and scores are computed twice. Both ways the same input gives the
same bits.

One warpgroup loads by TMA, two or three compute.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from .attention_spec import AttentionOperands, AttentionSpec
from .devices import interpreted
from .flash_backward_config import BackwardConfig, default_config
from .mosaic_backward_scores import Block, Launch
from .mosaic_common import (
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
    tile_views,
)
from .mosaic_fused_backward import FusedBlock
from .mosaic_fused_backward import memory as fused_memory
from .mosaic_visits import ListedVisits, RangedVisits, Side, Visits, kept_tiles
from .online_softmax import LOG2E
from .tiles import transposed


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


class _SplitBlock(Block):
    """A block of a launch that computes some of the gradients, those of the side that it owns."""

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
        p, weight = self.weights(logits, tile * self.tiles.step, partial, row_values)
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


def _run(wanted, tiles, operands, spec, query, key, value, dout, lse, delta) -> list[jax.Array]:
    """Launches the kernel for the gradients wanted."""
    B, T, N, H = query.shape
    K = key.shape[2]
    owns_keys = wanted != ("dq",)
    queries = (T, operands.query_lengths, operands.query_segments)
    keys = (key.shape[1], operands.key_lengths, operands.key_segments)
    own = Side(tiles.own, *(keys if owns_keys else queries))
    step = Side(tiles.step, *(queries if owns_keys else keys))
    band = (spec.lower, spec.upper)
    kept = kept_tiles(operands.block_mask, own, step, transpose=owns_keys)
    visits = Visits(own, step, tiles.warpgroups, transposed(*band) if owns_keys else band, not owns_keys, kept)
    launch = Launch(wanted, tiles, spec, visits, N // K, K if owns_keys else N, H // PANEL, query.dtype)
    pairs = B * launch.heads
    members = max(d for d in range(1, min(tiles.heads, pairs) + 1) if pairs % d == 0)

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
    outputs = {name: jax.ShapeDtypeStruct(own_arrays[0].shape, query.dtype) for name in wanted}
    turns = ()
    if launch.fused:
        # Interpreted, where nothing adds to memory, dQ has a summand of each block.
        summands = (visits.blocks,) * interpreted()
        outputs["dq"] = jax.ShapeDtypeStruct((*summands, B, step.tiles * step.tile, N, H), jnp.float32)
        turns = visits.turns()

    def kernel(*refs):
        *refs, memory = refs
        named = dict(zip((*inputs, *outputs), refs[: len(inputs)] + refs[len(refs) - len(outputs) :], strict=True))
        after = len(inputs) + len(tables)
        named["tables"], named["turns"] = tuple(refs[len(inputs) : after]), tuple(refs[after : after + len(turns)])
        if launch.fused and not interpreted():
            named["added"] = pl.get_global(plgpu.SemaphoreType.REGULAR((B, N, step.tiles)))
        block = (FusedBlock if launch.fused else _SplitBlock)(launch, members, named, memory)
        pl.when(block.warpgroup == tiles.warpgroups)(block.load)
        pl.when(block.warpgroup < tiles.warpgroups)(block.compute)

    results = plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        grid=(pairs // members, visits.blocks, members),  # in this order: the last axis varies fastest
        grid_names=("section", "block", "member"),
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[fused_memory(launch) if launch.fused else launch.memory()],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="_".join(("flash_backward", *wanted)),
    )(*inputs.values(), *tables, *turns)
    if launch.fused:
        results[wanted.index("dq")] = _finished(results[wanted.index("dq")], visits, T, spec.scale, query.dtype)
    return results


def _finished(
    dq: Float[Array, "*blocks B rows N H"], visits: Visits, T: int, scale: float, dtype: jnp.dtype
) -> Float[Array, "B T N H"]:
    """dQ from what the blocks have added up; zeros in the tiles that none of them visits, which are unwritten."""
    visited = jnp.repeat(visits.visited(), visits.step.tile, 2)[..., None, None]
    dq = jnp.where(visited.swapaxes(0, 1), dq, 0.0).sum(0) if interpreted() else jnp.where(visited.any(1), dq, 0.0)
    return (dq[:, :T] * scale).astype(dtype)

"""Which tiles a block of a Hopper kernel visits, and in what order, whatever mixture of masks was asked for.

A block owns one tile of rows (or of keys) for each computing warpgroup and steps through the tiles of the other side,
loaded once for all of them. The loops of its loader and of its warpgroups both come from here, so that they agree.
Where the band of diagonals alone decides, that is arithmetic in the kernel. Lengths and segments become a small table
of ranges, and a BlockMask a list of the tiles kept, made beforehand.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int32

from .block_mask import BlockMask
from .mosaic_common import Ref, Scalar
from .tiles import TileRange, segment_tiles, tile_range, transposed

Band = tuple[int | None, int | None]


@dataclass(frozen=True)
class Side:
    """The rows or the keys, in tiles: how many, how many count in each sequence and each one's segment, if given."""

    tile: int
    length: int
    lengths: Int32[Array, " B"] | None = None
    segments: Int32[Array, "B length"] | None = None

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.length, self.tile)


@dataclass(frozen=True)
class Visits:
    """The tiles of side `step` that tiles of side `own` see, for blocks of `warpgroups` tiles.

    band: the AttentionSpec's as `own` sees it: lower <= step position - own position <= upper.
    mask_tail: whether positions of `step` past the end must be masked (else they contribute nothing anyway).
    kept: bool [N|1, own tiles, step tiles], from a BlockMask.
    """

    own: Side
    step: Side
    warpgroups: int
    band: Band
    mask_tail: bool
    kept: Bool[Array, "#N own step"] | None = None

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.own.length, self.own.tile * self.warpgroups)

    @property
    def longest_last(self) -> bool:
        """Whether later blocks visit more tiles than earlier ones."""
        lower, upper = self.band
        return upper is not None and lower is None

    @property
    def partial_before(self) -> bool:
        """Whether a run may begin with tiles that a warpgroup sees in part or not at all."""
        return self.band[0] is not None or self.own.segments is not None

    @property
    def partial_after(self) -> bool:
        """Whether a run may end with such tiles."""
        return self.masked_after or self.own.lengths is not None

    @property
    def masked_after(self) -> bool:
        """Whether a run may end with tiles that a warpgroup sees in part."""
        tail = self.mask_tail and (self.step.length % self.step.tile != 0 or self.step.lengths is not None)
        return tail or self.band[1] is not None or self.own.segments is not None

    @property
    def masks_entries(self) -> bool:
        """Whether there is anything that hides single entries of a tile."""
        return self.mask_tail or self.band != (None, None) or self.own.segments is not None

    def tables(self) -> tuple[Int32[Array, "..."], ...]:
        """The arrays that the kernel reads, none where arithmetic does: (entries, counts) or (own, block) ranges."""
        sides = (self.own, self.step)
        if self.kept is not None:
            return self._lists(self.kept)
        if all(side.lengths is None and side.segments is None for side in sides):
            return ()
        per_own = jnp.stack(self._ranges(1), -1)
        per_block = jnp.stack(self._ranges(self.warpgroups), -1)
        return per_own, per_block

    def _ranges(self, tiles: int) -> TileRange:
        """The ranges, int32 [B|1, n], of runs of so many tiles of `own`."""
        rows = self.own.tile * tiles
        first = jnp.arange(self.blocks * self.warpgroups // tiles, dtype=jnp.int32)[None] * rows
        length = self._counted(jnp.int32(self.step.length), self.step.lengths)
        band = tile_range(first, first + (rows - 1), length, self.step.tile, *self.band)
        bounds = (jnp.asarray(bound, jnp.int32) for bound in band)
        start, full_start, full_stop, stop, _ = jnp.broadcast_arrays(*bounds, first)
        if self.own.segments is not None and self.step.segments is not None:
            own = jnp.pad(self.own.segments, ((0, 0), (0, first.size * rows - self.own.length)), mode="edge")
            seg_start, seg_stop, uniform = segment_tiles(own, self.step.segments, rows, self.step.tile)
            start, stop = jnp.maximum(start, seg_start), jnp.minimum(stop, seg_stop)
            tile = jnp.arange(self.step.tiles, dtype=jnp.int32)[None, None]
            low = jnp.maximum(start, full_start)[..., None]
            whole = uniform & (tile >= low) & (tile < jnp.minimum(stop, full_stop)[..., None])
            # The first run of whole tiles; ids that come in order have no other.
            full_start = jnp.argmax(whole, -1).astype(jnp.int32)
            broken = ~whole & (tile >= full_start[..., None])
            first_broken = jnp.where(broken.any(-1), jnp.argmax(broken, -1), self.step.tiles).astype(jnp.int32)
            full_stop = jnp.where(whole.any(-1), first_broken, full_start)
        if self.own.lengths is not None:
            stop = jnp.where(first < self.own.lengths[:, None], stop, start)
        start = jnp.minimum(start, stop)
        full_start = jnp.clip(full_start, start, stop)
        return TileRange(start, full_start, jnp.clip(full_stop, full_start, stop), stop)

    def _counted(self, length: Array, lengths: Int32[Array, " B"] | None) -> Array:
        """The step side's length, scalar or [B, 1]; up to a tile's end where what lies past it need not be masked."""
        if lengths is not None:
            length = jnp.clip(lengths, 0, length)[:, None]
        return length if self.mask_tail else -(-length // self.step.tile) * self.step.tile

    def _lists(self, kept: Bool[Array, "#N own step"]) -> tuple[Int32[Array, "B N blocks step"], Int32[Array, "..."]]:
        """For each block the tiles kept, those that are whole for all its warpgroups first, and how many of each.

        An entry is the tile's number and, in its lowest bits, which warpgroups keep it.
        """
        ranges = TileRange(*(bound[:, None, :, None] for bound in self._ranges(1)))
        tile = jnp.arange(self.step.tiles, dtype=jnp.int32)[None, None, None]
        missing = self.blocks * self.warpgroups - kept.shape[1]
        kept = jnp.pad(kept, ((0, 0), (0, missing), (0, 0)))[None]
        some = kept & (tile >= ranges.start) & (tile < ranges.stop)
        whole = some & (tile >= ranges.full_start) & (tile < ranges.full_stop)
        by_block = (*some.shape[:2], self.blocks, self.warpgroups, self.step.tiles)
        some, whole = some.reshape(by_block), whole.reshape(by_block).all(3)
        weight = 1 << jnp.arange(self.warpgroups, dtype=jnp.int32)[None, None, None, :, None]
        bits = jnp.where(some, weight, 0).sum(3, dtype=jnp.int32)
        order = jnp.argsort(jnp.where(whole, 0, jnp.where(bits > 0, 1, 2)), axis=-1, stable=True)
        entries = jnp.take_along_axis((tile << self.warpgroups) | bits, order, axis=-1)
        counts = jnp.stack((whole.sum(-1, dtype=jnp.int32), (bits > 0).sum(-1, dtype=jnp.int32)), -1)
        return entries, counts

    def visited(self) -> Bool[Array, "#B blocks step"]:
        """Which tiles each block visits. Not with `kept`."""
        blocks = self._ranges(self.warpgroups)
        tile = jnp.arange(self.step.tiles, dtype=jnp.int32)[None, None]
        return (tile >= blocks.start[..., None]) & (tile < blocks.stop[..., None])

    def turns(self) -> tuple[Int32[Array, "#B blocks step"], ...]:
        """What `turn` reads: how many blocks before each visit each tile; nothing where arithmetic does."""
        if not self.tables():
            return ()
        visited = self.visited().astype(jnp.int32)
        return (jnp.cumsum(visited, 1, dtype=jnp.int32) - visited,)

    def turn(self, turns: tuple[Ref, ...], b: Scalar, block: Scalar, tile: Scalar) -> Scalar:
        """How many blocks before this one visit the tile, inside the kernel. Not with `kept`."""
        if turns:
            return turns[0][_pick(turns[0], 0, b), block, tile]
        lower, _ = transposed(*self.band)
        if lower is None:
            return block
        first = lax.max(tile * self.step.tile + lower, jnp.int32(0))
        return block - lax.div(first, jnp.int32(self.own.tile * self.warpgroups))

    def of_block(
        self, tables: tuple[Ref, ...], b: Scalar, head: Scalar, block: Scalar
    ) -> "RangedVisits | ListedVisits":
        """What one block visits, inside the kernel, where `tables` are references to those of `tables()`."""
        if self.kept is not None:
            entries, counts = tables
            return ListedVisits(self.warpgroups, entries, counts, (_pick(counts, 0, b), _pick(counts, 1, head), block))
        return RangedVisits(self, tables, b, block)


class RangedVisits:
    """A run of tiles, of which each warpgroup sees a run: first tiles to mask, then whole ones, then tiles to mask."""

    def __init__(self, visits: Visits, tables: tuple[Ref, ...], b: Scalar, block: Scalar):
        self._visits, self._tables, self._b, self._block = visits, tables, b, block
        self._start, self._full_start, self._full_stop, self._stop = self._range(b, block, visits.warpgroups)
        self.count = self._stop - self._start

    def tile(self, index: Scalar) -> Scalar:
        """The number of the tile that the block loads as its `index`-th."""
        return self._start + index

    def is_partial(self, tile: Scalar) -> bool | Array:
        """Whether a warpgroup may see the tile in part. The bounds are found anew, which no loop has to keep."""
        b, block = lax.optimization_barrier((self._b, self._block))
        _, full_start, full_stop, _ = self._range(b, block, self._visits.warpgroups)
        return (tile < full_start) | (tile >= full_stop)

    def sweep(self, warpgroup: Scalar, idle: Callable[[Scalar], None], step: Callable[[Scalar, Scalar, Scalar], None]):
        """Runs step(index, tile, whether some entries are hidden) for the tiles that the warpgroup sees, and
        idle(index) for the others."""
        visits = self._visits
        own = self._range(self._b, self._block * visits.warpgroups + warpgroup, 1)
        start, full_start, full_stop, stop = (_clip(bound, self._start, self._stop) for bound in own)

        def skipped(tile):
            idle(tile - self._start)

        def seen(tile):
            partial = [tile < full_start] * visits.partial_before + [tile >= full_stop] * visits.partial_after
            step(tile - self._start, tile, functools.reduce(operator.or_, partial, False))

        if visits.partial_before:
            pl.loop(self._start, start)(skipped)
        pl.loop(start if visits.partial_before else self._start, stop if visits.partial_after else self._stop)(seen)
        if visits.partial_after:
            pl.loop(stop, self._stop)(skipped)

    def runs_from_last(self, hides: Scalar) -> tuple[Scalar, Scalar]:
        """Where the tiles, counted from the last, begin to be whole and where that ends. hides: none is whole."""
        full_start, full_stop = self._full_start, self._full_stop
        if hides is not False:
            full_start, full_stop = (jnp.where(hides, self._stop, bound) for bound in (full_start, full_stop))
        return self._stop - full_stop, self._stop - full_start

    def _range(self, b: Scalar, index: Scalar, tiles: int) -> TileRange:
        """What the `index`-th run of so many tiles of `own` sees; as many as a warpgroup's or a block's."""
        if self._tables:
            per_own, per_block = self._tables
            table = per_own if tiles == 1 else per_block
            return TileRange(*(table[_pick(table, 0, b), index, i] for i in range(4)))
        rows, step = self._visits.own.tile * tiles, self._visits.step
        first, length = index * rows, step.length if self._visits.mask_tail else step.tiles * step.tile
        return tile_range(first, first + (rows - 1), length, step.tile, *self._visits.band)


class ListedVisits:
    """Tiles by their numbers: first those that no warpgroup has to mask, then those that some mask or do not see."""

    def __init__(self, warpgroups: int, entries: Ref, counts: Ref, place: tuple[Scalar, ...]):
        self._warpgroups, self._entries, self._place = warpgroups, entries, place
        self._whole, self.count = (counts[(*place, i)] for i in range(2))

    def tile(self, index: Scalar) -> Scalar:
        """The number of the tile that the block loads as its `index`-th."""
        return lax.shift_right_logical(self._entry(index), jnp.int32(self._warpgroups))

    def sweep(self, warpgroup: Scalar, idle: Callable[[Scalar], None], step: Callable[[Scalar, Scalar, Scalar], None]):
        """Runs step(index, tile, whether some entries are hidden) for the tiles that the warpgroup sees, and
        idle(index) for the others."""

        @pl.loop(0, self.count)
        def _(index):
            entry = self._entry(index)
            seen = (lax.shift_right_logical(entry, warpgroup) & 1) == 1
            tile = lax.shift_right_logical(entry, jnp.int32(self._warpgroups))
            pl.when(seen)(lambda: step(index, tile, index >= self._whole))
            pl.when(~seen)(lambda: idle(index))

    def _entry(self, index: Scalar) -> Array:
        return self._entries[(*self._place, index)]


def _pick(ref: Ref, axis: int, index: Scalar) -> Scalar:
    """The index into an axis that is 1 where all share it."""
    return index if ref.shape[axis] > 1 else 0


def _clip(value: Scalar, low: Scalar, high: Scalar) -> Scalar:
    return lax.clamp(jnp.int32(low), jnp.int32(value), jnp.int32(high))


def kept_tiles(
    block_mask: BlockMask | None, own: Side, step: Side, *, transpose: bool = False
) -> Bool[Array, "#N own step"] | None:
    """The BlockMask tile by tile; transposed where the owning side is that of the keys."""
    if block_mask is None:
        return None
    mask = block_mask.mask if block_mask.mask.ndim == 3 else block_mask.mask[None]
    block_own, block_step = block_mask.block_q, block_mask.block_kv
    if transpose:
        mask, block_own, block_step = mask.swapaxes(1, 2), block_step, block_own
    tiles = jnp.repeat(jnp.repeat(mask, block_own // own.tile, 1), block_step // step.tile, 2)
    return tiles[:, : own.tiles, : step.tiles]

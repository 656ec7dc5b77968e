"""How the xla backend cuts a call into tiles, which of them it visits, and what it hides of one."""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from . import dropout
from .attention_spec import AttentionOperands, AttentionSpec
from .tiles import TileList, TileRange, block_tiles, list_tiles, segment_tiles, tile_range

Scalar = Int32[Array, ""]

TILE = 512
LEAST_TILE = 128
SCORES = 2**20  # at once: enough for large matmuls, few enough for the caches


@dataclass(frozen=True)
class XlaConfig:
    """Rows and keys of a tile, how many lanes, pairs of a sequence and a query head, a step takes at once, and how many
    tiles of keys that need no mask it visits at once, wherever they lie."""

    rows: int
    keys: int
    lanes: int
    span: int = 1


def default_config(query: Array, key: Array, operands: AttentionOperands, spec: AttentionSpec) -> XlaConfig:
    """What two cores like best."""
    (B, T, N, _), (S, K) = query.shape, key.shape[1:3]
    block_mask = operands.block_mask
    # Twice the rows make faster matmuls; where something cuts tiles, more of what is multiplied would be hidden.
    is_cut = _arrays_decide(operands) or spec.lower is not None or spec.upper is not None
    rows = _part(T, None if block_mask is None else block_mask.block_q, TILE if is_cut else 2 * TILE)
    keys = _part(S, None if block_mask is None else block_mask.block_kv)
    span = 1 if block_mask is None else max(min(TILE // keys, -(-S // keys)), 1)
    # The lanes of a step visit the same tiles, and have bias and mask from one sequence.
    of_batch = (operands.bias, operands.mask, operands.query_lengths, operands.key_lengths, operands.query_segments)
    together = B * N if all(x is None for x in of_batch) else N
    if block_mask is not None and block_mask.mask.ndim == 3:
        together = 1
    group = N // K
    most = min(SCORES // (rows * keys * span), together)

    def fits(lanes: int) -> bool:
        """Some heads of one kv head, all heads of some kv heads of one sequence, or all of some sequences."""
        sizes = (group, N, together)
        return any(lanes % part == 0 and whole % lanes == 0 for part, whole in zip((1, *sizes), sizes, strict=False))

    return XlaConfig(rows, keys, next(filter(fits, range(most, 1, -1)), 1), span)


def _arrays_decide(operands: AttentionOperands) -> bool:
    """Whether it is not the band alone that says which tiles are visited."""
    arrays = (operands.query_lengths, operands.key_lengths, operands.query_segments, operands.block_mask)
    return any(x is not None for x in arrays)


def _pad(x: Array, tile: int, fill: float = 0.0) -> Array:
    ends = [(0, -n % tile if axis == 1 else 0) for axis, n in enumerate(x.shape)]
    return jnp.pad(x, ends, constant_values=fill)


def _part(length: int, block: int | None, tile: int = TILE) -> int:
    """Of a length, few equal parts; of blocks, one, equal parts of a large one, or several small ones."""
    if block is not None and block < length:
        return -(-block // -(-block // tile)) if block >= LEAST_TILE else block * (LEAST_TILE // block)
    if length <= tile:
        return length
    part = -(-length // -(-length // tile))
    return -(-part // 16) * 16


@dataclass(frozen=True)
class Tiling:
    """The scores of one call by lane, row and key.

    Lanes are numbered by sequence, then by head. A chunk is all lanes of `kv_lanes` pairs of a sequence and a kv head:
    those that share keys and values. A step is one tile of rows of as many of them as the config says.
    """

    shape: tuple[int, int, int, int, int]  # B, T, N, S, K
    operands: AttentionOperands  # bias, mask and segment ids padded to whole tiles
    spec: AttentionSpec
    config: XlaConfig
    visits: TileList | None  # None where the band alone decides

    @classmethod
    def of(cls, query: Array, key: Array, operands: AttentionOperands, spec: AttentionSpec) -> "Tiling":
        (B, T, N, _), (S, K) = query.shape, key.shape[1:3]
        config = default_config(query, key, operands, spec)

        def pad(x: Array | None, *tiles: int) -> Array | None:
            if x is None:
                return None
            kept = x.ndim - len(tiles)
            ends = [0 if n == 1 else -n % tile for n, tile in zip(x.shape[kept:], tiles, strict=True)]
            return jnp.pad(x, [(0, 0)] * kept + [(0, n) for n in ends])

        padded = replace(
            operands,
            bias=pad(operands.bias, config.rows, config.keys),
            mask=pad(operands.mask, config.rows, config.keys),
            query_segments=pad(operands.query_segments, config.rows),
            key_segments=pad(operands.key_segments, config.keys),
        )
        return cls((B, T, N, S, K), padded, spec, config, _list_visits(T, S, operands, spec, config))

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.shape[2] // self.shape[4]

    @property
    def kv_lanes(self) -> int:
        return max(self.config.lanes // self.group, 1)

    @property
    def sequences(self) -> int:
        """Of a step."""
        return max(self.kv_lanes // self.shape[4], 1)

    @property
    def heads(self) -> int:
        """Lanes of a step for each of its kv lanes."""
        return self.config.lanes // self.kv_lanes

    @property
    def row_tiles(self) -> int:
        return -(-self.shape[1] // self.config.rows)

    @property
    def chunks(self) -> Int32[Array, " chunks"]:
        return jnp.arange(self.shape[0] * self.shape[4] // self.kv_lanes, dtype=jnp.int32)

    @property
    def steps(self) -> Int32[Array, " steps"]:
        """Of a chunk."""
        return jnp.arange(self.group // self.heads * self.row_tiles, dtype=jnp.int32)

    def pad_rows(self, x: Float[Array, "B T N *rest"], fill: float = 0.0) -> Float[Array, "B rows N *rest"]:
        """To whole tiles."""
        return _pad(x, self.config.rows, fill)

    def pad_keys(self, x: Float[Array, "B S K H"]) -> Float[Array, "B keys K H"]:
        """To whole tiles."""
        return _pad(x, self.config.keys)

    def join_rows(self, x: Float[Array, "chunks steps kv hr *rest"]) -> Float[Array, "B T N *rest"]:
        return self._join(x, self.heads, self.config.rows, self.shape[1])

    def join_keys(self, x: Float[Array, "chunks tiles kv keys H"]) -> Float[Array, "B S K H"]:
        return self._join(x, 1, self.config.keys, self.shape[3])

    def _join(self, x: Array, heads: int, tile: int, length: int) -> Array:
        rest = x.shape[4:]
        x = x.reshape(x.shape[0], -1, -(-length // tile), self.kv_lanes, heads, tile, *rest)
        x = x.transpose(0, 3, 1, 4, 2, 5, *range(6, x.ndim))
        x = x.reshape(self.shape[0], -1, x.shape[4] * tile, *rest)[:, :, :length]
        return jnp.swapaxes(x, 1, 2)

    def step(self, chunk: Scalar, number: Scalar) -> "Step":
        part = lax.div(number, jnp.int32(self.row_tiles))
        lane = chunk * (self.kv_lanes * self.group) + part * self.heads
        return Step(self, lane, lax.rem(number, jnp.int32(self.row_tiles)))

    def band(self, row_tile: Any) -> TileRange:
        """The tiles of keys that a tile of rows sees of the band alone."""
        first = row_tile * self.config.rows
        last = first + (self.config.rows - 1)
        return tile_range(first, last, self.shape[3], self.config.keys, self.spec.lower, self.spec.upper)

    @functools.cached_property
    def may_be(self) -> tuple[bool, bool]:
        """Whether any tile may need no mask, and whether any may need one: a loop that never runs is not compiled."""
        start, full_start, full_stop, stop = self.band(np.arange(self.row_tiles))
        whole = full_stop - full_start
        hidden = self.operands.key_lengths is not None or self.operands.query_segments is not None or self.cuts_blocks
        hidden |= self.config.span > 1  # of the tiles that need no mask, some may be left over
        return bool(np.any(whole > 0)), hidden or bool(np.any(stop - start > whole))

    @property
    def cuts_blocks(self) -> bool:
        """Whether a tile may hold blocks that are kept and blocks that are not."""
        blocks = self.operands.block_mask
        return blocks is not None and bool(blocks.block_q % self.config.rows or blocks.block_kv % self.config.keys)


class Tiles(NamedTuple):
    """Tiles of keys that are visited at once, by their numbers."""

    numbers: list[Scalar]

    def add_to(
        self, x: Float[Array, "tiles kv H keys"], part: Float[Array, "kv H some_keys"]
    ) -> Float[Array, "tiles kv H keys"]:
        """An array of tiles with `part` added to these."""
        for number, one in zip(self.numbers, jnp.split(part, len(self.numbers), -1), strict=True):
            x = lax.dynamic_update_index_in_dim(x, x[number] + one, number, 0)
        return x


class Step:
    """One tile of rows of some lanes, against the tiles of keys that it sees."""

    def __init__(self, tiling: Tiling, lane: Scalar, row_tile: Scalar):
        N = tiling.shape[2]
        self._tiling, self._row_tile = tiling, row_tile
        self._rows, self._keys, self._lanes = tiling.config.rows, tiling.config.keys, tiling.config.lanes
        self._sequence, self._head = lax.div(lane, jnp.int32(N)), lax.rem(lane, jnp.int32(N))
        seeds = tiling.operands.dropout_seeds
        if seeds is not None:
            lanes = lane + jnp.arange(self._lanes, dtype=jnp.int32)
            seed = seeds[lax.div(lanes, jnp.full_like(lanes, N))]
            head = lax.rem(lanes, jnp.full_like(lanes, N)).astype(jnp.uint32)
            row = (row_tile * self._rows + jnp.arange(self._rows, dtype=jnp.int32)).astype(jnp.uint32)
            self._row_keys = dropout.row_keys(seed[:, :1], seed[:, 1:], head[:, None], row[None])

    def sweep(self, visit: Callable[["Tiles", Any, bool], Any], state: Any) -> Any:
        """The last of `state = visit(tiles, state, partial)`: first tiles that need no mask, several at once and then
        fewer; then, one by one, the last of them and those that need one."""
        visits, span = self._tiling.visits, self._tiling.config.span
        if visits is None:
            start, full_start, full_stop, stop = self._tiling.band(self._row_tile)
            whole, count = full_stop - full_start, stop - start

            def tile_at(index: Scalar) -> Scalar:
                rest = start + index - whole
                return jnp.where(index < whole, full_start + index, jnp.where(rest < full_start, rest, rest + whole))
        else:
            order, whole, count = (
                x[_pick(x, 0, self._sequence), _pick(x, 1, self._head), self._row_tile] for x in visits
            )

            def tile_at(index: Scalar) -> Scalar:
                return order[index]

        may_be_whole, may_be_partial = self._tiling.may_be
        first = jnp.zeros_like(whole)
        for at_once in range(span, min(span, 2) - 1, -1) if may_be_whole else ():
            rest = whole - first
            groups = lax.div(rest, jnp.full_like(rest, at_once))
            if at_once > 2:  # a tile alone takes as long as two: rather three and two than four and one
                groups = jnp.where((rest > 1) & (rest - groups * at_once == 1), groups - 1, groups)

            def visit_group(group: Scalar, state: Any, first: Scalar = first, at_once: int = at_once) -> Any:
                index = first + group * at_once
                return visit(Tiles([tile_at(index + i) for i in range(at_once)]), state, False)

            state = lax.fori_loop(jnp.int32(0), groups, visit_group, state)
            first += groups * at_once
        if may_be_partial:
            state = lax.fori_loop(first, count, lambda index, state: visit(Tiles([tile_at(index)]), state, True), state)
        return state

    def rows_of(self, x: Float[Array, "B rows N *rest"]) -> Float[Array, "kv hr *rest"]:
        """Of an array of whole tiles, those of the step, a kv lane's heads one after the other."""
        tiling, group = self._tiling, jnp.int32(self._tiling.group)
        x = x.reshape(*x.shape[:2], -1, tiling.group, *x.shape[3:])
        size = (tiling.sequences, self._rows, tiling.kv_lanes // tiling.sequences, tiling.heads, *x.shape[4:])
        heads = lax.div(self._head, group), lax.rem(self._head, group)
        place = (self._sequence, self._row_tile * self._rows, *heads, *[0] * (x.ndim - 4))
        return jnp.moveaxis(lax.dynamic_slice(x, place, size), 1, 3).reshape(tiling.kv_lanes, -1, *x.shape[4:])

    def keys_of(self, x: Float[Array, "B keys K H"], tiles: "Tiles") -> Float[Array, "kv some_keys H"]:
        """Of an array of whole tiles, these of the step's kv lanes, side by side."""
        tiling, head = self._tiling, lax.div(self._head, jnp.int32(self._tiling.group))
        size = (tiling.sequences, self._keys, tiling.kv_lanes // tiling.sequences, x.shape[3])
        parts = [lax.dynamic_slice(x, (self._sequence, tile * self._keys, head, 0), size) for tile in tiles.numbers]
        return jnp.swapaxes(jnp.concatenate(parts, 1), 1, 2).reshape(tiling.kv_lanes, -1, x.shape[3])

    def logits(
        self, tiles: "Tiles", scores: Float[Array, "L rows keys"], partial: bool
    ) -> tuple[Float[Array, "L rows keys"], float, Float[Array, "L rows keys"] | None]:
        """x, factor and slope: the logits are x * factor, -inf where hidden, and their derivative is scale * slope."""
        operands, spec = self._tiling.operands, self._tiling.spec
        x, factor, slope = scores, abs(spec.scale) or 1.0, None
        if spec.soft_cap is not None:
            x, factor = jnp.tanh(x * (factor / spec.soft_cap)), spec.soft_cap
            slope = 1 - x * x
        if operands.bias is not None:
            x, factor = x * factor + self._tile_of(operands.bias, tiles).astype(jnp.float32), 1.0
        checks = self._checks(*tiles.numbers) if partial else []
        if operands.mask is not None:
            checks.append(self._tile_of(operands.mask, tiles))
        if checks:
            x = jnp.where(functools.reduce(operator.and_, checks), x, -jnp.inf)
        return x, factor, slope

    def _checks(self, tile: Scalar) -> list[Bool[Array, "#L #rows #keys"]]:
        """What hides entries of a tile, beside the mask."""
        tiling, operands, spec = self._tiling, self._tiling.operands, self._tiling.spec
        row = (self._row_tile * self._rows + jnp.arange(self._rows, dtype=jnp.int32))[None, :, None]
        column = (tile * self._keys + jnp.arange(self._keys, dtype=jnp.int32))[None, None]
        checks = []
        if spec.lower is not None:
            checks.append(column >= row + spec.lower)
        if spec.upper is not None:
            checks.append(column <= row + spec.upper)
        if operands.key_lengths is not None:
            checks.append(column < operands.key_lengths[self._sequence])
        if tiling.shape[3] % self._keys:
            checks.append(column < tiling.shape[3])
        if operands.query_segments is not None and operands.key_segments is not None:
            of_rows = lax.dynamic_slice(
                operands.query_segments, (self._sequence, self._row_tile * self._rows), (1, self._rows)
            )
            of_keys = lax.dynamic_slice(operands.key_segments, (self._sequence, tile * self._keys), (1, self._keys))
            checks.append(of_rows[:, :, None] == of_keys[:, None])
        blocks = operands.block_mask
        if blocks is not None and tiling.cuts_blocks:
            mask = blocks.mask[_pick(blocks.mask, 0, self._head)] if blocks.mask.ndim == 3 else blocks.mask
            of_row = jnp.minimum(lax.div(row, jnp.full_like(row, blocks.block_q)), mask.shape[0] - 1)
            of_column = jnp.minimum(lax.div(column, jnp.full_like(column, blocks.block_kv)), mask.shape[1] - 1)
            checks.append(mask[of_row[0, :, 0]][:, of_column[0, 0]][None])
        return checks

    def kept(self, tiles: "Tiles") -> Bool[Array, "L rows keys"]:
        """What dropout keeps."""
        of_tile = jnp.arange(self._keys, dtype=jnp.int32)
        column = jnp.concatenate([tile * self._keys + of_tile for tile in tiles.numbers]).astype(jnp.uint32)
        key1, key2 = self._row_keys
        return dropout.keep(key1[..., None], key2[..., None], column[None, None], self._tiling.spec.dropout_rate)

    def _tile_of(self, x: Float[Array, "#B #N #T S"] | Bool[Array, "#B #N #T S"], tiles: "Tiles") -> Array:
        """The tiles of bias or mask, [lanes|1, rows|1, keys]."""
        size = self._size_in(x)
        return jnp.concatenate([lax.dynamic_slice(x, self._place_in(x, tile), size) for tile in tiles.numbers], 3)[0]

    def add_to(self, x: Float[Array, "#B #N #T S"], tiles: "Tiles", gradient: Float[Array, "L rows keys"]) -> Array:
        """x, the gradient of bias, with that of some tiles added."""
        ones = tuple(axis for axis in (0, 1) if x.shape[axis + 1] == 1)
        parts = jnp.split(gradient.sum(ones, keepdims=True)[None], len(tiles.numbers), 3)
        for tile, part in zip(tiles.numbers, parts, strict=True):
            place = self._place_in(x, tile)
            x = lax.dynamic_update_slice(x, lax.dynamic_slice(x, place, self._size_in(x)) + part, place)
        return x

    def _place_in(self, x: Array, tile: Scalar) -> tuple[Any, ...]:
        place = self._sequence, self._head, self._row_tile * self._rows
        return (*(_pick(x, axis, index) for axis, index in enumerate(place)), tile * self._keys)

    def _size_in(self, x: Array) -> tuple[int, ...]:
        return (1, min(x.shape[1], self._lanes), min(x.shape[2], self._rows), self._keys)


def _list_visits(
    T: int, S: int, operands: AttentionOperands, spec: AttentionSpec, config: XlaConfig
) -> TileList | None:
    """Where arrays decide which tiles are visited: these, by sequence, head and tile of rows."""
    if not _arrays_decide(operands):
        return None
    blocks = operands.block_mask
    first = jnp.arange(-(-T // config.rows), dtype=jnp.int32)[None, :, None] * config.rows
    tile = jnp.arange(-(-S // config.keys), dtype=jnp.int32)[None, None]
    length = S if operands.key_lengths is None else jnp.clip(operands.key_lengths, 0, S)[:, None, None]
    start, full_start, full_stop, stop = tile_range(
        first, first + (config.rows - 1), length, config.keys, spec.lower, spec.upper
    )
    some, whole = (tile >= start) & (tile < stop), (tile >= full_start) & (tile < full_stop)
    if operands.query_lengths is not None:
        some &= first < operands.query_lengths[:, None, None]
    if operands.query_segments is not None and operands.key_segments is not None:
        seg_start, seg_stop, uniform = segment_tiles(
            operands.query_segments, operands.key_segments, config.rows, config.keys
        )
        some &= (tile >= seg_start[..., None]) & (tile < seg_stop[..., None])
        whole &= uniform
    some, whole = some[:, None], whole[:, None]
    if blocks is not None:
        some_kept, all_kept = block_tiles(blocks, T, S, config.rows, config.keys)
        some, whole = some & some_kept[None], whole & all_kept[None]
    return list_tiles(some, whole)


def _pick(x: Array, axis: int, index: Scalar) -> Scalar:
    """The index into an axis that is 1 where all share it."""
    return index if x.shape[axis] > 1 else jnp.int32(0)

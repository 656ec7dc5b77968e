"""Which tiles of the T x S score matrix a kernel visits.

Row i sees key j when lower <= j - i <= upper (`AttentionSpec`), so a tile of rows sees one run of key tiles, and within
it one run of tiles that every row sees whole: those need no mask. The functions take Python integers, NumPy arrays,
JAX arrays and the scalars of a kernel alike; the kernels' loops and the IO model both come from here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .block_mask import BlockMask

Integer = Any  # int, a NumPy integer or array, or a JAX int32 array, scalar or not


class TileRange(NamedTuple):
    """Tiles start <= t < stop are visited; of these, full_start <= t < full_stop need no mask."""

    start: Integer
    full_start: Integer
    full_stop: Integer
    stop: Integer


def tile_range(
    first: Integer, last: Integer, length: Integer, tile: int, lower: int | None, upper: int | None
) -> TileRange:
    """The key tiles that rows first..last (inclusive) see, of `length` keys in tiles of `tile`.

    Since j - i within [lower, upper] means i - j within [-upper, -lower], the row tiles that keys first..last see are
    `tile_range(first, last, number_of_rows, tile, *transposed(lower, upper))`.

    >>> tile_range(128, 255, 512, 64, None, 0)  # causal, the second 128 rows
    TileRange(start=0, full_start=0, full_stop=2, stop=4)
    """
    start_key = 0 if lower is None else _maximum(first + lower, 0)
    stop_key = length if upper is None else _minimum(_maximum(last + upper + 1, 0), length)
    full_start_key = 0 if lower is None else _maximum(last + lower, 0)
    full_stop_key = length if upper is None else _minimum(_maximum(first + upper + 1, 0), length)
    start = _divide(start_key, tile)
    stop = _maximum(_divide(stop_key + (tile - 1), tile), start)
    full_start = _minimum(_divide(full_start_key + (tile - 1), tile), stop)
    full_stop = _minimum(_maximum(_divide(full_stop_key, tile), full_start), stop)
    return TileRange(start, full_start, full_stop, stop)


def transposed(lower: int | None, upper: int | None) -> tuple[int | None, int | None]:
    """The band as the keys see the rows."""
    return (None if upper is None else -upper), (None if lower is None else -lower)


def segment_tiles(
    row_segments: jax.Array, key_segments: jax.Array, row_tile: int, key_tile: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which tiles of keys can hold a row's segment, by the least and greatest id of each tile.

    Args:
      row_segments: int32 [B, T]; key_segments: int32 [B, S].

    Returns (start, stop, uniform): int32 [B, row tiles] twice, a run that holds every tile of the row's segments, and
    bool [B, row tiles, key tiles], True where both tiles are whole and of one and the same segment.
    """
    row_min, row_max, row_whole = _extent(row_segments, row_tile)
    key_min, key_max, key_whole = _extent(key_segments, key_tile)
    meet = (row_min[:, :, None] <= key_max[:, None]) & (key_min[:, None] <= row_max[:, :, None])
    count = meet.shape[-1]
    any_met = meet.any(-1)
    start = jnp.where(any_met, jnp.argmax(meet, -1).astype(jnp.int32), 0)
    stop = jnp.where(any_met, count - jnp.argmax(meet[..., ::-1], -1).astype(jnp.int32), 0)
    one = (row_min == row_max)[:, :, None] & (key_min == key_max)[:, None] & (row_min[:, :, None] == key_min[:, None])
    return start, stop, one & row_whole[:, :, None] & key_whole[:, None]


def _extent(segments: jax.Array, tile: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Least and greatest id of each tile, int32 [B, tiles], and whether the tile is whole."""
    B, length = segments.shape
    count = -(-length // tile)
    padding = ((0, 0), (0, count * tile - length))
    info = jnp.iinfo(segments.dtype)
    least = jnp.pad(segments, padding, constant_values=info.max).reshape(B, count, tile).min(-1)
    greatest = jnp.pad(segments, padding, constant_values=info.min).reshape(B, count, tile).max(-1)
    whole = jnp.broadcast_to((jnp.arange(count) + 1) * tile <= length, (B, count))
    return least, greatest, whole


class TileList(NamedTuple):
    """Tiles by their numbers, a list for each tile of rows.

    order[..., :num_whole] need no mask, order[..., num_whole:num_kept] do, and the rest is not visited. int32.
    """

    order: jax.Array
    num_whole: jax.Array
    num_kept: jax.Array


def list_tiles(some: jax.Array, whole: jax.Array) -> TileList:
    """From two flags for each tile, bool [..., key tiles]: whether it is visited, and if so, whether without a mask."""
    whole = some & whole
    order = jnp.argsort(jnp.where(whole, 0, jnp.where(some, 1, 2)), axis=-1, stable=True)
    return TileList(order.astype(jnp.int32), whole.sum(-1, dtype=jnp.int32), some.sum(-1, dtype=jnp.int32))


def block_tiles(blocks: BlockMask, T: int, S: int, row_tile: int, key_tile: int) -> tuple[jax.Array, jax.Array]:
    """Whether some and whether all of the blocks that a tile touches are kept: bool [N|1, row tiles, key tiles]."""
    mask = blocks.mask if blocks.mask.ndim == 3 else blocks.mask[None]
    # kept[:, i, j]: how many of the first i x j blocks. A tile touches blocks first <= block < last of each axis.
    kept = jnp.pad(mask.cumsum(1, dtype=jnp.int32).cumsum(2, dtype=jnp.int32), ((0, 0), (1, 0), (1, 0)))
    (row_first, row_last), (key_first, key_last) = (
        (start // block, np.minimum(-(-(start + tile) // block), mask.shape[axis]))
        for axis, block, tile, start in (
            (1, blocks.block_q, row_tile, np.arange(0, T, row_tile)),
            (2, blocks.block_kv, key_tile, np.arange(0, S, key_tile)),
        )
    )
    rows = kept[:, row_last] - kept[:, row_first]
    count = rows[:, :, key_last] - rows[:, :, key_first]
    touched = np.outer(row_last - row_first, key_last - key_first)
    return count > 0, count == touched[None]


def _on_host(*values: Integer) -> bool:
    return not any(isinstance(v, jax.Array) for v in values)


def _maximum(a: Integer, b: Integer) -> Integer:
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return np.maximum(a, b) if _on_host(a, b) else jnp.maximum(a, b)


def _minimum(a: Integer, b: Integer) -> Integer:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return np.minimum(a, b) if _on_host(a, b) else jnp.minimum(a, b)


def _divide(a: Integer, tile: int) -> Integer:
    """a // tile for a >= 0, where a kernel's truncating division is as good and cheaper."""
    return a // tile if _on_host(a) else lax.div(a, jnp.full_like(a, tile))
